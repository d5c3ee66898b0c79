"""Quantization of a network to integers of eight bits, for processors that multiply those fastest."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from jaxtyping import UInt8

from distillfss_core.errors import SettingsError
from distillfss_core.types import Array

_INTEGER = ("Conv", "Add", "Clip", "Relu")  # what else there is would gain nothing and lose accuracy
_NARROW = 8  # maps with fewer channels are slower in integers
_KEEPING = ("Add", "Resize", "Reshape", "Unsqueeze", "Squeeze", "Gather", "DepthToSpace")  # a narrow map stays one


def quantized(graph: bytes, input_name: str, samples: UInt8[Array, "n c h w"], *, narrow: bool = False) -> bytes:
    """An ONNX network with convolutions in eight bits: weights scaled by channel, activations by what samples show.

    The same graph and samples give the same network.

    Parameters
    ----------
    graph : bytes
        In ONNX.
    input_name : str
        Name of its input, "b c h w" float32 in [0, 1].
    samples : uint8 array "n c h w"
        Inputs (255 is 1.0) from which the ranges of activations are taken; sides are multiples of the network's.
    narrow : bool
        Weights of seven bits, for processors whose sums would be clipped with eight.

    Raises
    ------
    SettingsError
        If there is no room for temporary files (tens of megabytes).

    Notes
    -----
    ONNX Runtime quantizes the graph (static, QDQ), by the scheme of [1]_.

    References
    ----------
    .. [1] Jacob, Kligys, Chen, Zhu, Tang, Howard, Adam, Kalenichenko, "Quantization and Training of Neural Networks for
       Efficient Integer-Arithmetic-Only Inference", CVPR 2018.
    """
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Reader(CalibrationDataReader):  # type: ignore[misc]  # it has no types
        def __init__(self) -> None:
            self._left: Iterator[Array] = iter(samples)

        def get_next(self) -> dict[str, Array] | None:
            sample = next(self._left, None)
            return None if sample is None else {input_name: sample[None].astype(np.float32) / 255}

    try:
        with tempfile.TemporaryDirectory() as folder:
            whole, ready, done = (Path(folder) / name for name in ("whole.onnx", "ready.onnx", "done.onnx"))
            whole.write_bytes(graph)
            quant_pre_process(whole, ready, skip_symbolic_shape=True)
            quantize_static(
                ready,
                done,
                Reader(),
                quant_format=QuantFormat.QDQ,
                op_types_to_quantize=list(_INTEGER),
                nodes_to_exclude=_narrow_nodes(ready),
                per_channel=True,
                reduce_range=narrow,
                activation_type=QuantType.QUInt8,
                weight_type=QuantType.QInt8,
            )
            return done.read_bytes()
    except OSError as error:
        reason = error.strerror or error
        raise SettingsError(
            f"precision int8 needs temporary files in {tempfile.gettempdir()} ({reason}); free some room, set TMPDIR, "
            "or use precision float32"
        ) from error


def _narrow_nodes(path: Path) -> list[str]:
    """Names of the convolutions with few output channels or of a map of one channel, and of the sums of these."""
    import onnx

    graph = onnx.load(path).graph
    weights = {weight.name: tuple(weight.dims) for weight in graph.initializer}
    names, narrow = [], set[str]()
    for node in graph.node:
        if node.op_type == "Conv":
            shape = weights[node.input[1]]
            is_depthwise = any(value.name == "group" and value.i > 1 for value in node.attribute)
            is_narrow = shape[0] < _NARROW or (shape[1] == 1 and not is_depthwise)
        else:
            is_narrow = node.op_type in _KEEPING and not narrow.isdisjoint(node.input)
        if is_narrow:
            names.append(node.name)
            narrow.update(node.output)
    return names
