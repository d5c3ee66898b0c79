"""The protocol of few-shot teachers: encode a support once, then segment queries with it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from distillfss_core.nn.decoder import Decoder
from distillfss_core.nn.features import CoarseMaps, EncodedSupport, FeaturePyramid, Prediction


class SupportKeys:
    """A support set, encoded by one kind of teacher; other code does not read it."""


@runtime_checkable
class Teacher(Protocol):
    """A teacher segments queries by the examples in a support."""

    @property
    def local(self) -> bool:
        """Whether the output at a pixel depends on a bounded neighborhood only, so that tiles agree."""
        ...

    def encode(self, support: EncodedSupport) -> SupportKeys:
        """Turn support features into the form that queries are compared with."""
        ...

    def __call__(self, query: FeaturePyramid, keys: SupportKeys) -> Prediction:
        """Coarse maps and logits for a batch of queries against one support."""
        ...


@dataclass(frozen=True, eq=False)
class LearnedKeys(SupportKeys):
    """A support set, encoded by a `LearnedTeacher`: it knows at least which classes the support shows."""

    present: Bool[Tensor, " k"]


class LearnedTeacher(nn.Module):
    """Interface of teachers that learn: modules of their own make coarse maps, and the student's decoder reads them.

    Parameters
    ----------
    decoder : Decoder
        Usually shared with the student.
    """

    def __init__(self, decoder: Decoder) -> None:
        super().__init__()
        self.decoder: Decoder = decoder

    @property
    def local(self) -> bool:
        """Whether tiles agree; see `Teacher`."""
        return self.decoder.local

    @property
    def own_modules(self) -> Sequence[nn.Module]:
        """The modules that learn beside the decoder."""
        raise NotImplementedError

    @property
    def prompt_modules(self) -> Sequence[nn.Module]:
        """Of these the ones that read the support; they can be trained alone, with all others frozen."""
        return self.own_modules

    @property
    def max_keys(self) -> int | None:
        """The budget of keys; None if all are kept, whatever `encode` is given."""
        raise NotImplementedError

    def encode(self, support: EncodedSupport, *, max_keys: int | None = None, offset: float = 0.0) -> LearnedKeys:
        """Turn support features into the form that queries are compared with.

        Parameters
        ----------
        max_keys : int, optional
            A smaller budget than `max_keys`.
        offset : float
            0..1: which of the evenly spaced keys are kept where there are more than the budget.

        Raises
        ------
        ValueError
            If no pixel of the support is annotated.
        """
        raise NotImplementedError

    def coarse(self, query: FeaturePyramid, keys: LearnedKeys) -> CoarseMaps:
        """Coarse maps of a batch of queries against one support; every value lies in [0, 1]."""
        raise NotImplementedError

    def outputs(self, query: FeaturePyramid, keys: LearnedKeys) -> tuple[CoarseMaps, Float[Tensor, "b k 2 h w"] | None]:
        """Coarse maps, and logits of a decoder that is the teacher's own; None where it has none."""
        return self.coarse(query, keys), None

    def alignment(
        self, query: FeaturePyramid, predicted: Int[Tensor, "b h w"], support: EncodedSupport
    ) -> Float[Tensor, ""] | None:
        """Loss of the support when it is segmented by the predicted labels of the queries; None if there is none."""
        return None

    def forward(self, query: FeaturePyramid, keys: SupportKeys) -> Prediction:
        """Coarse maps and logits; the foreground of an absent class is -inf."""
        assert isinstance(keys, LearnedKeys)
        coarse, own = self.outputs(query, keys)
        logits = self.decoder(coarse, query) if own is None else own
        return Prediction(coarse, hide_absent(logits, keys.present))


def check_annotated(support: EncodedSupport) -> None:
    """Refuse a support that says nothing.

    Raises
    ------
    ValueError
        If no pixel of it is annotated.
    """
    if not bool((support.valid > 0).any()):
        raise ValueError("no pixel of this support is annotated")


def present_classes(support: EncodedSupport) -> Bool[Tensor, " k"]:
    """Which classes have at least one annotated pixel in this support."""
    return (support.masks * support.valid[:, None] > 0.5).flatten(2).any(-1).any(0)


def hide_absent(logits: Float[Tensor, "b k 2 h w"], present: Bool[Tensor, " k"]) -> Float[Tensor, "b k 2 h w"]:
    """Foreground logit -inf for classes without an example."""
    if bool(present.all()):
        return logits
    hidden = torch.zeros_like(logits)
    hidden[:, ~present, 1] = -torch.inf
    return logits + hidden


def vote(logits: Iterable[Float[Tensor, "b k 2 h w"]]) -> Float[Tensor, "b k 2 h w"]:
    """Combine the logits of several support groups by voting [1]_.

    At each pixel, the group with the largest foreground logit gives both logits.

    References
    ----------
    .. [1] De Marinis, Blok, Kaymak, Brussee, Vessio, Castellano, "DistillFSS: Synthesizing Few-Shot Knowledge into a
       Lightweight Segmentation Model", arXiv:2512.05613, 2025.
    """
    return reduce(lambda best, new: torch.where(new[:, :, 1:] > best[:, :, 1:], new, best), logits)
