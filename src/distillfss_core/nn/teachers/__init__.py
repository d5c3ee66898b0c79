"""Few-shot teachers: their protocol, two kinds of them, and voting."""

from distillfss_core.nn.teachers.dcama import PUBLISHED, DcamaSettings, DcamaTeacher, position_encoding
from distillfss_core.nn.teachers.protocol import SupportKeys, Teacher, vote
from distillfss_core.nn.teachers.prototype import PrototypeTeacher
from distillfss_core.nn.teachers.voting import VotingTeacher

__all__ = [
    "PUBLISHED",
    "DcamaSettings",
    "DcamaTeacher",
    "PrototypeTeacher",
    "SupportKeys",
    "Teacher",
    "VotingTeacher",
    "position_encoding",
    "vote",
]
