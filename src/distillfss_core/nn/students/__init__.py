"""Students, which give coarse maps without a support."""

from distillfss_core.nn.students.convdist import CoarseExtractor, ConvDist, LightConvDist, Student

__all__ = ["CoarseExtractor", "ConvDist", "LightConvDist", "Student"]
