"""Few-shot teachers: their protocol, the kinds of them, and voting."""

from distillfss_core.nn.teachers.alignment import AlignmentSettings, AlignmentTeacher
from distillfss_core.nn.teachers.dcama import PUBLISHED, DcamaSettings, DcamaTeacher, position_encoding
from distillfss_core.nn.teachers.protocol import LearnedKeys, LearnedTeacher, SupportKeys, Teacher, vote
from distillfss_core.nn.teachers.prototype import PrototypeTeacher
from distillfss_core.nn.teachers.uino import UinoSettings, UinoTeacher, uino_heads
from distillfss_core.nn.teachers.voting import VotingTeacher

__all__ = [
    "PUBLISHED",
    "AlignmentSettings",
    "AlignmentTeacher",
    "DcamaSettings",
    "DcamaTeacher",
    "LearnedKeys",
    "LearnedTeacher",
    "PrototypeTeacher",
    "SupportKeys",
    "Teacher",
    "UinoSettings",
    "UinoTeacher",
    "VotingTeacher",
    "position_encoding",
    "uino_heads",
    "vote",
]
