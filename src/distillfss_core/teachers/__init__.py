"""Few-shot teachers: what they need, two kinds of them, and voting."""

from distillfss_core.teachers.dcama import PUBLISHED, DcamaSettings, DcamaTeacher
from distillfss_core.teachers.protocol import SupportKeys, Teacher, vote
from distillfss_core.teachers.prototype import PrototypeTeacher
from distillfss_core.teachers.voting import VotingTeacher

__all__ = [
    "PUBLISHED",
    "DcamaSettings",
    "DcamaTeacher",
    "PrototypeTeacher",
    "SupportKeys",
    "Teacher",
    "VotingTeacher",
    "vote",
]
