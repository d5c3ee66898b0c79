"""The protocol of few-shot teachers: encode a support once, then segment queries with it."""

from __future__ import annotations

from collections.abc import Iterable
from functools import reduce
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from distillfss_core.nn.features import EncodedSupport, FeaturePyramid, Prediction


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
