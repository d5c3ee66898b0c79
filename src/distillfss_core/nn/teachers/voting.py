"""Voting: groups of shots segment a query separately, and the surest group wins at each pixel."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor

from distillfss_core.nn.features import CoarseMaps, EncodedSupport, FeaturePyramid, Prediction
from distillfss_core.nn.teachers.protocol import SupportKeys, Teacher, vote


@dataclass(frozen=True, eq=False)
class VotingKeys(SupportKeys):
    """The keys of every group."""

    groups: tuple[SupportKeys, ...]


class VotingTeacher:
    """A teacher of groups of shots: `vote` decides between them, and coarse maps are averaged over them.

    Without it, shots are concatenated: all their tokens stand in one attention.

    Parameters
    ----------
    teacher : Teacher
    group : int
        Shots a group.
    """

    def __init__(self, teacher: Teacher, group: int = 1) -> None:
        self.teacher: Teacher = teacher
        self.group: int = group

    @property
    def local(self) -> bool:
        """Whether tiles agree, as for the teacher that encodes each group."""
        return self.teacher.local

    def encode(self, support: EncodedSupport) -> VotingKeys:
        """Encode every group; groups in which nothing is annotated have no vote."""
        starts = range(0, support.features.batch, self.group)
        groups = [support[start : start + self.group] for start in starts]
        return VotingKeys(tuple(self.teacher.encode(g) for g in groups if bool((g.valid > 0).any())))

    def __call__(self, query: FeaturePyramid, keys: SupportKeys) -> Prediction:
        """Segment by the votes of all groups; see `Teacher`."""
        assert isinstance(keys, VotingKeys)
        sums: list[Tensor] = []

        def group_logits() -> Iterator[Tensor]:  # one group at a time: there may be many
            for group in keys.groups:
                logits_of_group = self.teacher(query, group)
                sums[:] = (
                    [a + b for a, b in zip(sums, logits_of_group.coarse, strict=True)]
                    if sums
                    else list(logits_of_group.coarse)
                )
                yield logits_of_group.logits

        logits = vote(group_logits())
        return Prediction(CoarseMaps(*(s / len(keys.groups) for s in sums)), logits)
