"""Losses between tokens of a student and those of a teacher: query-based soft distillation [1]_, MSE and CWD [2]_.

Tokens are the cells of a feature map. Teacher tokens carry no gradient.

References
----------
.. [1] Lv et al., "Generalizable Knowledge Distillation from Vision Foundation Models for Semantic Segmentation",
   CVPR 2026, arXiv:2603.02554.
.. [2] Shu, Liu, Gao, Yan, Shen, "Channel-wise Knowledge Distillation for Dense Prediction", ICCV 2021.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

from distillfss_core.errors import SettingsError

LOSSES = ("qsd", "mse", "cwd")


def attend(
    queries: Float[Tensor, "b n c"], teacher: Float[Tensor, "b n c"], values: Float[Tensor, "b n c"], tau: float = 1.0
) -> Float[Tensor, "b n c"]:
    """Assemble student values where each query finds them in the teacher's map: softmax(q t^T / tau) v [1]_.

    Keys are the teacher's tokens; one head. Each result lies within the range of the values, channel by channel.

    References
    ----------
    .. [1] Lv et al., arXiv:2603.02554, query-based soft distillation.
    """
    return F.scaled_dot_product_attention(queries, teacher, values, scale=1.0 / tau)


def qsd_loss(
    queries: Float[Tensor, "b n c"], values: Float[Tensor, "b n c"], teacher: Float[Tensor, "b n c"], tau: float = 1.0
) -> Float[Tensor, ""]:
    """Query-based soft distillation: mean over b, n, c of (softmax(q t^T / tau) v - t)^2."""
    teacher = teacher.detach()
    return mse_loss(attend(queries, teacher, values, tau), teacher)


def mse_loss(values: Float[Tensor, "b n c"], teacher: Float[Tensor, "b n c"]) -> Float[Tensor, ""]:
    """Mean over b, n, c of (v - t)^2: `qsd_loss` with attention that is the identity."""
    return F.mse_loss(values.float(), teacher.detach().float())


def cwd_loss(
    values: Float[Tensor, "b n c"], teacher: Float[Tensor, "b n c"], temperature: float = 1.0
) -> Float[Tensor, ""]:
    """Channel-wise distillation [1]_: T^2 KL(t || v) of each channel's softmax over the tokens; mean over b and c.

    References
    ----------
    .. [1] Shu et al., "Channel-wise Knowledge Distillation for Dense Prediction", ICCV 2021, equations 2 to 4.
    """
    log_values = (values.float() / temperature).log_softmax(1)
    log_teacher = (teacher.detach().float() / temperature).log_softmax(1)
    divergence = (log_teacher.exp() * (log_teacher - log_values)).sum(1)  # b c
    return temperature**2 * divergence.mean()


class TokenLoss(nn.Module):
    """One loss with the projections that it needs: phi for queries (QSD only), psi for values.

    Each is LayerNorm(c_s) and Linear(c_s, c_t). They are dropped after the training.

    Parameters
    ----------
    loss : {"qsd", "mse", "cwd"}
    student, teacher : int
        Channels c_s and c_t.
    temperature : float or "sqrt"
        tau of QSD, or T of CWD; "sqrt" is the square root of c_t. MSE has none.
    """

    def __init__(self, loss: str, student: int, teacher: int, temperature: float | str = 1.0) -> None:
        super().__init__()
        self.loss: str = loss
        self.temperature: float = teacher**0.5 if temperature == "sqrt" else float(temperature)
        self.phi: nn.Module | None = _projection(student, teacher) if loss == "qsd" else None
        self.psi: nn.Module = _projection(student, teacher)

    def forward(self, student: Float[Tensor, "b cs h w"], teacher: Float[Tensor, "b ct h2 w2"]) -> Float[Tensor, ""]:
        """The loss between two maps of the same grid.

        Raises
        ------
        SettingsError
            If the grids differ.
        """
        if student.shape[-2:] != teacher.shape[-2:]:
            grids = " and ".join("{} x {}".format(*x.shape[-2:]) for x in (student, teacher))
            raise SettingsError(f"student and teacher have grids of {grids} tokens; give backbones of equal stride")
        s, t = tokens(student), tokens(teacher).detach()
        values = self.psi(s)
        if self.phi is not None:
            return qsd_loss(self.phi(s), values, t.to(values.dtype), self.temperature)
        return cwd_loss(values, t, self.temperature) if self.loss == "cwd" else mse_loss(values, t)


def tokens(features: Float[Tensor, "b c h w"]) -> Float[Tensor, "b h*w c"]:
    """A feature map as tokens, row by row."""
    return features.flatten(2).transpose(1, 2)


def mask_images(
    images: Float[Tensor, "b 3 h w"], masked: Bool[Tensor, "b gh gw"], fill: Float[Tensor, "3 1 1"]
) -> Float[Tensor, "b 3 h w"]:
    """The images with every masked block of h/gh x w/gw pixels set to ``fill``, the mean that a backbone subtracts."""
    size = (images.shape[-2], images.shape[-1])
    pixels = F.interpolate(masked[:, None].float(), size, mode="nearest") > 0
    return torch.where(pixels, fill.to(images.dtype), images)


def _projection(inputs: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(nn.LayerNorm(inputs), nn.Linear(inputs, outputs))
