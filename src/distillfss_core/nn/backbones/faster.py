"""Equal results in less time: BatchNorm folded into convolutions, TensorFlow's SAME padding made static.

Measured for EfficientNet-Lite0, 512 x 512, 2 CPU threads, channels_last: 61 ms as timm builds it, 48 ms folded,
28 ms with static padding too (the padded copies cost more than the convolutions after them).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from distillfss_core.nn.backbones.lite import SameConv2d


@torch.no_grad()
def fold_batch_norms(module: nn.Module) -> None:
    """Fold every BatchNorm (eval statistics) into the convolution before it, in place; its activation is kept.

    "Before it" is the order in which children were registered, which in timm's blocks is the order they run in.
    """
    conv_name = None
    for name, child in list(module.named_children()):
        if isinstance(child, nn.Conv2d):
            conv_name = name
        elif isinstance(child, nn.BatchNorm2d) and conv_name is not None:
            setattr(module, conv_name, _folded(getattr(module, conv_name), child))
            setattr(module, name, getattr(child, "act", nn.Identity()))
            conv_name = None
        else:
            fold_batch_norms(child)


def _folded(conv: nn.Conv2d, norm: nn.BatchNorm2d) -> nn.Conv2d:
    """``norm(conv(x))`` as one convolution: w' = w * g / sqrt(var + eps), b' = (b - mean) * g / sqrt(var + eps) + beta.

    Computed in float64 and then rounded, so that nothing is lost on the way.
    """
    assert norm.running_mean is not None
    assert norm.running_var is not None
    scale = norm.weight.double() / torch.sqrt(norm.running_var.double() + norm.eps)
    bias = 0.0 if conv.bias is None else conv.bias.double()
    conv.bias = _frozen(((bias - norm.running_mean.double()) * scale + norm.bias.double()).to(conv.weight.dtype))
    conv.weight = _frozen((conv.weight.double() * scale[:, None, None, None]).to(conv.weight.dtype))
    return conv


@torch.no_grad()
def make_padding_static(module: nn.Module) -> None:
    """Replace a `SameConv2d`, whose stride is 2, by a plain convolution, in place; inputs must have even sides.

    TensorFlow pads an even side by (k-2)//2 before and one more behind. A kernel with one more row and column of
    zeros in front, padded by (k-1)//2 all around, sees the same pixels::

        SAME, k=3, stride 2      x0 x1 x2 | 0        taps w0 w1 w2 at 2i, 2i+1, 2i+2
        here, k=4, padding 1   0|x0 x1 x2 | 0        taps 0 w0 w1 w2 at 2i-1, 2i, 2i+1, 2i+2
    """
    for name, child in list(module.named_children()):
        if isinstance(child, SameConv2d):
            setattr(module, name, _static(child))
        else:
            make_padding_static(child)


def _static(conv: nn.Conv2d) -> nn.Conv2d:
    rows, columns = conv.kernel_size
    plain = nn.Conv2d(
        conv.in_channels,
        conv.out_channels,
        (rows + 1, columns + 1),
        stride=2,
        padding=((rows - 1) // 2, (columns - 1) // 2),
        groups=conv.groups,
        bias=conv.bias is not None,
        device="meta",
    )
    plain.weight = _frozen(F.pad(conv.weight, (1, 0, 1, 0)))
    plain.bias = None if conv.bias is None else _frozen(conv.bias)
    return plain


def _frozen(tensor: Tensor) -> nn.Parameter:
    return nn.Parameter(tensor.detach(), requires_grad=False)
