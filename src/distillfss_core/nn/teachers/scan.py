"""The selective scan of state-space models, in chunks and with torch alone."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn


def selective_scan(
    x: Float[Tensor, "b t heads p"],
    step: Float[Tensor, "b t heads"],
    rate: Float[Tensor, " heads"],
    write: Float[Tensor, "b t n"],
    read: Float[Tensor, "b t n"],
    *,
    chunk: int = 64,
) -> Float[Tensor, "b t heads p"]:
    """Run h_t = exp(step_t rate) h_(t-1) + step_t write_t x_t and return read_t h_t, chunk by chunk [1]_.

    Inside a chunk all pairs of positions are computed at once, and decays are exponentials of differences of a
    cumulative sum. One state goes on from chunk to chunk. The arithmetic is float32 at least.

    Parameters
    ----------
    x : tensor
        Sequences of length t; heads of p channels have states "p n" of their own.
    step : tensor
        Positive; a large one forgets what was before and takes in much of what is there.
    rate : tensor
        Negative, one decay rate a head.
    write, read : tensor
        How a position enters the state of n numbers, and how it is read from there.
    chunk : int
        Positions a chunk; it changes cost and memory, not the result.

    Returns
    -------
    tensor
        Of the dtype of ``x``.

    References
    ----------
    .. [1] Dao, Gu, "Transformers are SSMs: Generalized Models and Efficient Algorithms Through Structured State Space
       Duality", ICML 2024, section 6.
    """
    length, dtype = x.shape[1], torch.promote_types(x.dtype, torch.float32)

    def chunked(v: Tensor) -> Tensor:  # padding has step 0: it keeps the state and adds nothing
        padded = F.pad(v.to(dtype), (0, 0) * (v.ndim - 2) + (0, -length % chunk))
        chunks: Tensor = padded.unflatten(1, (-1, chunk))
        return chunks

    inputs = chunked(x * step[..., None])  # b m t heads p
    before, after = chunked(write), chunked(read)  # b m t n
    lower = torch.ones(chunk, chunk, dtype=dtype, device=x.device).tril()
    total = torch.einsum("tu,bmuh->bmth", lower, chunked(step) * rate.to(dtype))
    decay = (total[:, :, :, None] - total[:, :, None]).masked_fill(lower[..., None] == 0, -torch.inf).exp()
    weights = (after @ before.transpose(-1, -2))[..., None] * decay  # b m t u heads
    inside = torch.einsum("bmtuh,bmuhp->bmthp", weights, inputs)
    added = torch.einsum("bmun,bmuh,bmuhp->bmhpn", before, (total[:, :, -1:] - total).exp(), inputs)
    kept = total[:, :, -1].exp()[..., None, None]
    state, states = torch.zeros_like(added[:, 0]), []
    for m in range(added.shape[1]):
        states.append(state)
        state = kept[:, m] * state + added[:, m]
    across = torch.einsum("bmtn,bmth,bmhpn->bmthp", after, total.exp(), torch.stack(states, 1))
    result: Float[Tensor, "b t heads p"] = (inside + across).flatten(1, 2)[:, :length].to(x.dtype)
    return result


class SelectiveScan(nn.Module):
    """A scan whose steps, writing and reading depend on the input, with a direct path beside it.

    Parameters
    ----------
    width : int
        Channels; a multiple of ``heads``.
    heads : int
    state : int
        Numbers that each channel carries along.
    """

    def __init__(self, width: int, *, heads: int = 2, state: int = 8) -> None:
        super().__init__()
        self.heads: int = heads
        self.step: nn.Linear = nn.Linear(width, heads)
        self.write: nn.Linear = nn.Linear(width, state, bias=False)
        self.read: nn.Linear = nn.Linear(width, state, bias=False)
        self.log_rate: nn.Parameter = nn.Parameter(torch.linspace(0, 1, heads))
        self.direct: nn.Parameter = nn.Parameter(torch.ones(width))
        assert self.step.bias is not None
        nn.init.constant_(self.step.bias, -3.0)  # about twenty positions are remembered at first

    def decays(self, x: Float[Tensor, "b t c"]) -> Float[Tensor, "b t heads"]:
        """The share of the state that stays at each position, in (0, 1]."""
        result: Float[Tensor, "b t heads"] = torch.exp(F.softplus(self.step(x)) * self._rate())
        return result

    def _rate(self) -> Float[Tensor, " heads"]:
        return -self.log_rate.exp()

    def forward(self, x: Float[Tensor, "b t c"], *, reverse: bool = False) -> Float[Tensor, "b t c"]:
        """Scan from the first position to the last, or from the last to the first."""
        if reverse:
            backward: Float[Tensor, "b t c"] = self(x.flip(1)).flip(1)
            return backward
        heads = x.unflatten(-1, (self.heads, -1))
        y = selective_scan(heads, F.softplus(self.step(x)), self._rate(), self.write(x), self.read(x))
        return y.flatten(-2).to(x.dtype) + self.direct * x
