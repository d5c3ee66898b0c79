"""Prune an EfficientNet-Lite to fewer blocks and fewer inner channels; the outputs of its stages keep their channels.

A stage of fewer blocks takes the first ones and the last. Of the inner channels of a block, those are kept whose
depthwise convolution has the largest scale, times the norm of what the block makes of it [1]_. A pruned network is a
start for a distillation, and means little before it.

References
----------
.. [1] Li, Kadav, Durdanovic, Samet, Graf, "Pruning Filters for Efficient ConvNets", ICLR 2017.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from distillfss_core.types import evenly

_EXPANDING = ("conv_pwl", "bn2", {"conv_pw": 0, "bn1": 0, "conv_dw": 0, "bn2": 0, "conv_pwl": 1})
"""Of a block that expands: what reads its inner channels, the norm of its depthwise convolution, and where they lie."""
_FIRST = ("conv_pw", "bn1", {"conv_dw": 0, "bn1": 0, "conv_pw": 1})
"""The same for the first block, whose inner channels are those of the stem."""


def pruned_tensors(source: Mapping[str, Tensor], net: nn.Module) -> dict[str, Tensor]:
    """Tensors for a smaller network, from those of a larger one of the same family.

    Parameters
    ----------
    source : mapping of str to Tensor
        Of an EfficientNet-Lite, under timm's names.
    net : nn.Module
        The smaller network. Its stages have no more blocks, and these no more inner channels and the same kernels.
    """
    wanted = {name: tensor for name, tensor in net.state_dict().items() if tensor.ndim}  # no counters of batches
    depths = _depths(source)
    result: dict[str, Tensor] = {}
    for stage, depth in _depths(wanted).items():
        for block, taken in enumerate(evenly(depths[stage], depth)):
            place, origin = f"blocks.{stage}.{block}.", f"blocks.{stage}.{taken}."
            reader, norm, axes = _EXPANDING if f"{place}conv_pwl.weight" in wanted else _FIRST
            scale = source[f"{origin}{norm}.weight"].abs()
            importance = scale * source[f"{origin}{reader}.weight"].flatten(2).norm(dim=(0, 2))
            kept = importance.topk(len(wanted[f"{place}conv_dw.weight"])).indices.sort().values
            for name in (name for name in wanted if name.startswith(place)):
                part = name.removeprefix(place)
                axis, tensor = axes.get(part.partition(".")[0]), source[origin + part]
                result[name] = tensor if axis is None else tensor.index_select(axis, kept)
            if reader == "conv_pw":
                result |= {name: source[name][kept] for name in wanted if name.startswith(("conv_stem.", "bn1."))}
    return result


def _depths(tensors: Mapping[str, Tensor]) -> dict[int, int]:
    """Number of blocks of each stage."""
    places = sorted({tuple(int(n) for n in name.split(".")[1:3]) for name in tensors if name.startswith("blocks.")})
    return {stage: block + 1 for stage, block in places}
