"""Few-shot teachers: what they need, and two kinds of them."""

from distillfss_core.teachers.dcama import PUBLISHED, DcamaSettings, DcamaTeacher
from distillfss_core.teachers.protocol import SupportKeys, Teacher, vote
from distillfss_core.teachers.prototype import PrototypeTeacher

__all__ = ["PUBLISHED", "DcamaSettings", "DcamaTeacher", "PrototypeTeacher", "SupportKeys", "Teacher", "vote"]
