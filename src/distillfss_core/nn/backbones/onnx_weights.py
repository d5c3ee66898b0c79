"""Weights of DINOv2 in an ONNX file, whose initializers have the names of the model's authors in `transformers`.

Only the initializers are read; nothing of the graph is run. Exporters leave the biases their names, but not the
transposed matrices of linear layers. Those are found by the bias that is added to their product.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from distillfss_core.errors import WeightsUnavailableError

_TOP = {
    "embeddings.cls_token": "cls_token",
    "embeddings.patch_embeddings.projection.weight": "patch_embed.proj.weight",
    "embeddings.patch_embeddings.projection.bias": "patch_embed.proj.bias",
    "layernorm.weight": "norm.weight",
    "layernorm.bias": "norm.bias",
}
_BLOCK = {
    "norm1": "norm1",
    "norm2": "norm2",
    "attention.output.dense": "attn.proj",
    "mlp.fc1": "mlp.fc1",
    "mlp.fc2": "mlp.fc2",
}
_QKV = ("query", "key", "value")


def dinov2_tensors(data: bytes, source: str) -> dict[str, Tensor]:
    """The tensors of DINOv2 under timm's names.

    Parameters
    ----------
    data : bytes
        Of an ONNX file with the initializers ``backbone.*``; others, of a decoder for instance, are left out.
    source : str
        For messages.

    Raises
    ------
    WeightsUnavailableError
        If the package onnx is missing, or the file is damaged or holds no DINOv2.
    """
    try:
        import onnx
        from google.protobuf.message import DecodeError
    except ImportError:
        raise WeightsUnavailableError(
            f"reading {source} needs the package onnx; install it with: pip install onnx"
        ) from None
    try:
        graph = onnx.load_model_from_string(data).graph
    except DecodeError as error:
        raise WeightsUnavailableError(f"{source}: is damaged or no ONNX file; use another file") from error
    named = {item.name: torch.from_numpy(onnx.numpy_helper.to_array(item).copy()) for item in graph.initializer}
    named |= dict(_matrices(graph, named))
    prefix = "backbone."
    parts = {name.removeprefix(prefix): tensor for name, tensor in named.items() if name.startswith(prefix)}
    try:
        return dict(_renamed(parts)) | {"pos_embed": _positions(named)}
    except KeyError as error:
        raise WeightsUnavailableError(f"{source}: holds no tensor {error}, so it is no DINOv2; use another") from None


def _matrices(graph: Any, named: dict[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """Weights of the linear layers: where a named bias is added to a product with a matrix."""
    products = {node.output[0]: node for node in graph.node if node.op_type == "MatMul"}
    for node in graph.node:
        if node.op_type != "Add":
            continue
        bias = next((name for name in node.input if name in named and name.endswith(".bias")), None)
        product = next((products[name] for name in node.input if name in products), None)
        matrix = next((named[name] for name in product.input if name in named), None) if product else None
        if bias is not None and matrix is not None:
            yield f"{bias.removesuffix('bias')}weight", matrix.T.contiguous()


def _renamed(parts: dict[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    for name, new in _TOP.items():
        yield new, parts[name]
    blocks = {int(found[1]) for name in parts if (found := re.match(r"encoder\.layer\.(\d+)\.", name))}
    for index in sorted(blocks):
        old, new = f"encoder.layer.{index}", f"blocks.{index}"
        for kind in ("weight", "bias"):
            for name, place in _BLOCK.items():
                yield f"{new}.{place}.{kind}", parts[f"{old}.{name}.{kind}"]
            joined = [parts[f"{old}.attention.attention.{name}.{kind}"] for name in _QKV]
            yield f"{new}.attn.qkv.{kind}", torch.cat(joined)
        for number in (1, 2):
            yield f"{new}.ls{number}.gamma", parts[f"{old}.layer_scale{number}.lambda1"]


def _positions(named: dict[str, Tensor]) -> Tensor:
    """Position code of the class token and of the square grid of patches, which exporters give names of their own."""
    width = named["backbone.embeddings.cls_token"].shape[-1]
    others = [t for name, t in named.items() if not name.startswith("backbone.") and t.ndim == 3]
    codes = sorted((t for t in others if t.shape[0] == 1 and t.shape[2] == width), key=lambda t: t.shape[1])
    if [t.shape[1] == 1 for t in codes] != [True, False]:
        raise KeyError("backbone.embeddings.position_embeddings")
    return torch.cat(codes, 1)
