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

_INNER = {"conv_pw": 0, "bn1": 0, "conv_dw": 0, "bn2": 0, "conv_pwl": 1}
"""Axis of the inner channels in the parts of a block that expands."""
_STEM_BLOCK = {"conv_dw": 0, "bn1": 0, "conv_pw": 1}
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
    wanted = {name: t for name, t in net.state_dict().items() if t.ndim}  # no counters of batches
    depths = _depths(source)
    places = {
        f"blocks.{stage}.{block}.": f"blocks.{stage}.{evenly(depths[stage], depth)[block]}."
        for stage, depth in _depths(wanted).items()
        for block in range(depth)
    }
    result: dict[str, Tensor] = {}
    for place, origin in places.items():
        parts = _INNER if f"{place}conv_pwl.weight" in wanted else _STEM_BLOCK
        out = "conv_pwl" if parts is _INNER else "conv_pw"
        scale = source[f"{origin}{'bn2' if parts is _INNER else 'bn1'}.weight"]
        importance = scale.abs() * source[f"{origin}{out}.weight"].flatten(2).norm(dim=(0, 2))
        inner = wanted[f"{place}conv_dw.weight"].shape[0]
        kept = importance.topk(inner).indices.sort().values
        if parts is _STEM_BLOCK:
            stem = {name: t[kept] for name, t in source.items() if name.startswith(("conv_stem.", "bn1.")) and t.ndim}
            result |= stem
        for name in (name for name in wanted if name.startswith(place)):
            part = name.removeprefix(place)
            tensor = source[origin + part]
            axis = parts.get(part.partition(".")[0])
            if axis is not None:
                tensor = tensor.index_select(axis, kept)
            result[name] = tensor
    return result


def _depths(tensors: Mapping[str, Tensor]) -> dict[int, int]:
    """Number of blocks of each stage."""
    places = {tuple(int(n) for n in name.split(".")[1:3]) for name in tensors if name.startswith("blocks.")}
    return {stage: 1 + max(block for other, block in places if other == stage) for stage, _ in places}
