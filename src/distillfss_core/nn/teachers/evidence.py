"""From similarities to log-odds, for teachers that compare by cosines."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn


class Evidence(nn.Module):
    """Gain and offset of every block of the three coarse stages: from a difference of cosines to log-odds."""

    def __init__(self, blocks: Sequence[int], gain: float) -> None:
        super().__init__()
        self.log_gain: nn.ParameterList = nn.ParameterList(torch.full((n, 1), math.log(gain)) for n in blocks)
        self.offset: nn.ParameterList = nn.ParameterList(torch.zeros(n, 1) for n in blocks)

    def forward(self, stage: int, difference: Float[Tensor, "b k n q"]) -> Float[Tensor, "b k n q"]:
        """Log-odds of a stage."""
        odds: Float[Tensor, "b k n q"] = self.log_gain[stage].exp() * difference + self.offset[stage]
        return odds
