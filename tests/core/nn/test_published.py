"""Published checkpoints under the names of this package: equal outputs, and what is refused."""

from __future__ import annotations

import io
import os
import pickle
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from torch import Tensor

from checkpoints import (
    DINOV3,
    RESNET18,
    attention_maps,
    dcama,
    decoded,
    distilled,
    head_tensors,
    prefixed,
    resnet,
    resnet_blocks,
    sines,
    student_maps,
    student_tensors,
)
from distillfss_core.errors import ModelFileError
from distillfss_core.nn import published
from distillfss_core.nn.backbones import SPECS, BackboneSpec
from distillfss_core.nn.features import EncodedSupport, FeaturePyramid
from distillfss_core.nn.head import FewShotHead
from distillfss_core.nn.published import PUBLISHED_FORM, PublishedCheckpoint, map_published, read_published
from published import PublishedCase

SMALL = BackboneSpec(
    name="small",
    timm_name="resnet18",
    family="resnet",
    hub_id="nowhere/small",
    license="mit",
    strides=(4, 8, 16, 32),
    channels=(8, 16, 24, 32),
    blocks=(2, 2, 3, 2),
)
SIZES = (SMALL.channels, SMALL.blocks)
FLAT = BackboneSpec(**{**vars(SMALL), "name": "flat", "strides": (16,) * 4, "channels": (16,) * 4})


def _head(checkpoint: PublishedCheckpoint) -> FewShotHead:
    head = FewShotHead(checkpoint.spec, max(1, checkpoint.classes), PUBLISHED_FORM).eval()
    head.teacher.load_state_dict(checkpoint.teacher)
    if checkpoint.classes:
        head.student.load_state_dict(checkpoint.students)
    return head


def _with_encodings(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    codes = {f"pe.{i}.pe": torch.from_numpy(sines(100, c))[None] for i, c in enumerate(SMALL.channels[1:])}
    return weights | codes


def _stages(spec: BackboneSpec, batch: int, seed: int, side: int = 64) -> tuple[tuple[Tensor, ...], ...]:
    generator = torch.Generator().manual_seed(seed)
    return tuple(
        tuple(torch.randn(batch, c, side // s, side // s, generator=generator) for _ in range(n))
        for s, c, n in zip(spec.strides, spec.channels, spec.blocks, strict=True)
    )


# equal outputs


@pytest.mark.parametrize("shots", [1, 5])
def test_a_mapped_head_gives_the_published_numbers(shared: Path, shots: int) -> None:
    case = PublishedCase(shared / "parity", support_skip=False)
    head = _head(map_published(prefixed("model.", _with_encodings(case.weights())), "file", specs=[SMALL]))
    head.decoder.grid = 96
    with torch.no_grad():
        prediction = head.teacher(case.pyramid("query"), head.teacher.encode(case.support(shots)))
    for name, maps in zip(("1_8", "1_16", "1_32"), prediction.coarse, strict=True):
        torch.testing.assert_close(maps[:, 0], case.tensors[f"{shots}shot/coarse/{name}"], atol=1e-4, rtol=0)
    expected = case.tensors[f"{shots}shot/logits_every_8th_pixel"]
    torch.testing.assert_close(prediction.logits[:, 0, :, ::8, ::8], expected, atol=1e-4, rtol=0)


def test_a_mapped_student_gives_the_published_numbers(shared: Path) -> None:
    case = PublishedCase(shared / "parity", support_skip=False)
    tensors = prefixed("module.teacher.model.", _with_encodings(case.weights()))
    tensors |= prefixed("module.student.0.", case.weights("student/weights/"))
    checkpoint = map_published(tensors, "file", specs=[SMALL])
    assert (checkpoint.layout, checkpoint.classes) == ("DistillFSS", 1)
    head = _head(checkpoint)
    head.decoder.grid = 96
    with torch.no_grad():
        logits = head.student_logits(case.pyramid("query"))
    expected = case.tensors["student/logits_every_8th_pixel"]
    torch.testing.assert_close(logits[:, 0, :, ::8, ::8], expected, atol=1e-4, rtol=0)


def test_the_published_head_with_a_support_skip_is_refused(shared: Path) -> None:
    case = PublishedCase(shared / "parity", support_skip=True)
    tensors = prefixed("model.", _with_encodings(case.weights()))
    message = r"'model.mixer1.0.weight' has shape \(128, 176, 3, 3\), expected \(128, 152, 3, 3\): its decoder reads"
    with pytest.raises(ModelFileError, match=message):
        map_published(tensors, "file", specs=[SMALL])


@pytest.mark.parametrize("spec", [SMALL, FLAT], ids=lambda s: s.name)
@pytest.mark.parametrize("side", [64, 96])
def test_a_mapped_head_is_what_the_equations_say(spec: BackboneSpec, side: int) -> None:
    tensors = head_tensors((spec.channels, spec.blocks))
    students = student_tensors((spec.channels, spec.blocks), 2)
    checkpoint = map_published(
        prefixed("teacher.model.", tensors) | prefixed("student.", students), "file", specs=[spec]
    )
    head = _head(checkpoint)
    query, support = _stages(spec, 2, 0, side), _stages(spec, 3, 1, side)
    mask = (torch.rand(3, side, side, generator=torch.Generator().manual_seed(2)) > 0.5).float()
    encoded = EncodedSupport(FeaturePyramid(support, (side, side)), mask[:, None], torch.ones(3, side, side))
    pyramid = FeaturePyramid(query, (side, side))
    with torch.no_grad():
        prediction = head.teacher(pyramid, head.teacher.encode(encoded))
        logits = head.student_logits(pyramid)
    maps = attention_maps(tensors, query, support, mask)
    for ours, theirs in zip(prediction.coarse, maps, strict=True):
        torch.testing.assert_close(ours[:, 0], theirs, atol=1e-4, rtol=0)
    expected = decoded(tensors, maps, query, (side, side))
    torch.testing.assert_close(prediction.logits[:, 0], expected, atol=1e-4, rtol=0)
    for k in range(2):
        expected = decoded(tensors, student_maps(students, k, query), query, (side, side))
        torch.testing.assert_close(logits[:, k], expected, atol=1e-4, rtol=0)


def test_the_backbone_of_a_checkpoint_gives_its_features() -> None:
    checkpoint = map_published(dcama(18, RESNET18), "file", specs=[SPECS["resnet18"]])
    assert checkpoint.backbone is not None
    assert checkpoint.backbone.trained
    image = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    expected = resnet_blocks(resnet(18), image)
    for ours, theirs in zip(checkpoint.backbone(image).stages[1:], expected, strict=True):
        for a, b in zip(ours, theirs, strict=True):
            torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)


# the layouts


@pytest.mark.parametrize(
    ("name", "sizes"),
    [
        ("resnet50", ((256, 512, 1024, 2048), (3, 4, 6, 3))),
        ("resnet101", ((256, 512, 1024, 2048), (3, 4, 23, 3))),
        ("swin_base_384", ((128, 256, 512, 1024), (2, 2, 18, 2))),
        ("dinov3_large", DINOV3),
    ],
)
def test_the_backbone_of_a_head_is_told_by_its_shapes(name: str, sizes: Any) -> None:
    checkpoint = map_published(prefixed("model.", head_tensors(sizes, positions=20)), "file")
    assert checkpoint.spec is SPECS[name]
    assert checkpoint.backbone is None
    assert (checkpoint.layout, checkpoint.classes) == ("DCAMA", 0)


def test_every_tensor_is_used_once_as_it_is() -> None:
    tensors = head_tensors(SIZES)
    checkpoint = map_published(prefixed("module.model.", tensors), "file", specs=[SMALL])
    given = {name: value for name, value in tensors.items() if not name.startswith("pe.")}
    assert len(checkpoint.teacher) == len(given)
    for name, value in given.items():
        assert torch.equal(checkpoint.teacher[name if name.startswith("DCAMA") else f"decoder.{name}"], value)


def _changed(**changes: Tensor | None) -> dict[str, Tensor]:
    """A distilled checkpoint with some tensors replaced, or left out where None is given; "__" is a dot."""
    tensors = prefixed("teacher.model.", head_tensors(SIZES)) | prefixed("student.", student_tensors(SIZES, 2))
    named = {name.replace("__", "."): value for name, value in changes.items()}
    return {name: value for name, value in (tensors | named).items() if value is not None}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"teacher__model__conv4__3__weight": torch.zeros(128, 64, 3, 3)},
            "tensor 'teacher.model.conv4.3.weight' has shape (128, 64, 3, 3), expected (128, 128, 3, 3)",
        ),
        ({"teacher__model__mixer2__2__bias": None}, "tensor 'teacher.model.mixer2.2.bias' of shape (16,) is missing"),
        (
            {"teacher__model__conv6__0__bias": torch.zeros(1)},
            "tensor 'teacher.model.conv6.0.bias' has no place in this",
        ),
        (
            {"teacher__other": torch.zeros(1)},
            "tensor 'teacher.other' has no place in a checkpoint of teacher.model.*, ",
        ),
        (
            {"model__mixer3__2__bias": torch.zeros(2)},
            "tensor 'model.mixer3.2.bias' has no place in a checkpoint of teacher.model.*",
        ),
        (
            {"student__1__coarse_extractor__2__0__bias": None},
            "tensor 'student.1.coarse_extractor.2.0.bias' of shape (32,) is missing",
        ),
        (
            {"student__0__coarse_extractor__0__keys__weight": torch.zeros(32, 16)},
            "tensor 'student.0.coarse_extractor.0.keys.weight' has no place in this network",
        ),
        ({"student__all__bias": torch.zeros(1)}, "tensor 'student.all.bias' has no place; expected student.0.*"),
        ({"student__999999__bias": torch.zeros(1)}, "tensor 'student.999999.bias' has no place; expected student.0.*"),
        ({"student__3__bias": torch.zeros(1)}, "tensor 'student.3.bias' has no place in this network"),
        ({"teacher__model__pe__1__pe": None}, "tensor 'teacher.model.pe.1.pe' of shape (1, length, 24) is missing"),
        (
            {"teacher__model__pe__1__pe": torch.zeros(1, 9, 16)},
            "tensor 'teacher.model.pe.1.pe' has shape (1, 9, 16), expected (1, length, 24)",
        ),
        ({"teacher__model__pe__1__pe": torch.zeros(1, 9, 24)}, "'teacher.model.pe.1.pe' is no sinusoidal encoding"),
        (
            {"teacher__model__conv1__0__bias": torch.full((16,), torch.nan)},
            "tensor 'teacher.model.conv1.0.bias' holds values that are no finite floating numbers",
        ),
        (
            {"teacher__model__conv1__0__bias": torch.zeros(16, dtype=torch.int64)},
            "tensor 'teacher.model.conv1.0.bias' holds values that are no finite floating numbers",
        ),
    ],
)
def test_the_first_tensor_that_does_not_fit_is_named(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelFileError) as caught:
        map_published(_changed(**changes), "file", specs=[SMALL])
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("layer2.0.conv1.weight", torch.zeros(1, 64, 3, 3), "tensor 'layer2.0.conv1.weight' has shape (1, 64, 3, 3)"),
        ("layer2.0.conv1.weight", None, "tensor 'layer2.0.conv1.weight' is missing"),
        ("layer9.weight", torch.zeros(1), "tensor 'layer9.weight' has no place in this backbone"),
        ("layer2.0.bn1.bias", torch.full((128,), torch.inf), "tensor 'layer2.0.bn1.bias' holds values that are no"),
    ],
)
def test_a_tensor_of_the_backbone_that_does_not_fit_is_named(key: str, value: Tensor | None, message: str) -> None:
    tensors: dict[str, Any] = dcama(18, RESNET18) | {f"feature_extractor.{key}": value}
    with pytest.raises(ModelFileError) as caught:
        map_published({k: v for k, v in tensors.items() if v is not None}, "file", specs=[SPECS["resnet18"]])
    assert f"file, feature_extractor.*: {message}" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_prefixes_are_not_mixed() -> None:
    tensors = prefixed("module.model.", head_tensors(SIZES))
    tensors["model.mixer3.2.bias"] = tensors["module.model.mixer3.2.bias"]
    with pytest.raises(
        ModelFileError, match=r"'model.mixer3.2.bias' has no place in a checkpoint of module.model.\*, module.feat"
    ):
        map_published(tensors, "file", specs=[SMALL])


@pytest.mark.parametrize("tensors", [{"weight": torch.zeros(1)}, {"feature_extractor.conv1.weight": torch.zeros(1)}])
def test_a_checkpoint_of_something_else_is_refused(tensors: dict[str, Tensor]) -> None:
    with pytest.raises(
        ModelFileError, match=r"'weight' has no place in a checkpoint of model\.\*|'model.DCAMA_blocks.0.* is missing"
    ):
        map_published(tensors, "file")


# files


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> dict[str, Tensor]:
    """Tensors of a head for a small backbone, which is taken for a published one."""
    monkeypatch.setattr(published, "BACKBONES", (SMALL,))
    return prefixed("model.", head_tensors(SIZES))


def _saved(content: Any, path: Path) -> Path:
    torch.save(content, path)
    return path


def test_files_of_both_kinds_are_read_alike(small: dict[str, Tensor], tmp_path: Path) -> None:
    safetensors.torch.save_file(small, tmp_path / "a.safetensors", metadata={"format": "pt"})
    paths = [
        _saved(small, tmp_path / "a.pt"),
        _saved({"state_dict": small, "epoch": 3, "optimizer": {"state": {}, "lr": 0.1}}, tmp_path / "b.pt"),
        _saved({"model": small}, tmp_path / "c.pth"),
        _saved(prefixed("module.", small), tmp_path / "d"),
        tmp_path / "a.safetensors",
    ]
    torch.save(small, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    for path in (*paths, tmp_path / "old.pt"):
        teacher = read_published(path).teacher
        assert torch.equal(teacher["decoder.conv1.0.weight"], small["model.conv1.0.weight"])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([1, 2], "holds a list, no dictionary of tensors"),
        ({}, "holds a dict, no dictionary of tensors"),
        ({"model.a": 1.5}, "entry 'model.a' is no plain tensor"),
        ({1: torch.zeros(1)}, "entry 1 is no plain tensor"),
        ({"model.a": torch.eye(3).to_sparse()}, "entry 'model.a' is no plain tensor"),
        ({"state_dict": {}, "model": {}}, "holds several state dicts (state_dict, model)"),
        ({"state_dict": {"model.a": torch.zeros(1)}, "ema": {}}, "entry 'ema' beside 'state_dict' is not known"),
        ({"state_dict": {"model.a": 7}}, "entry 'model.a' is no plain tensor"),
    ],
)
def test_a_file_without_a_state_dict_is_refused(tmp_path: Path, content: Any, message: str) -> None:
    with pytest.raises(ModelFileError, match=re.escape(message)):
        read_published(_saved(content, tmp_path / "a.pt"))


class Code:
    """Runs a command when it is unpickled."""

    def __reduce__(self) -> Any:
        return os.system, (f"touch {Code.path}",)

    path = Path()


def test_code_in_a_file_is_not_run(tmp_path: Path) -> None:
    Code.path = tmp_path / "ran"
    path = _saved({"model.a": torch.zeros(1), "args": Code()}, tmp_path / "a.pt")
    with pytest.raises(
        ModelFileError, match=r"holds objects other than tensors \((posix|nt)\.system\), which could run"
    ):
        read_published(path)
    assert not Code.path.exists()
    path = _saved({"state_dict": {}, "miou": np.float64(0.5)}, tmp_path / "b.pt")
    with pytest.raises(ModelFileError, match=r"objects other than tensors \(numpy[\w.]+scalar\)"):
        read_published(path)


def test_a_damaged_file_is_one_line(small: dict[str, Tensor], tmp_path: Path) -> None:
    whole = {".pt": _saved(small, tmp_path / "a.pt").read_bytes(), ".safetensors": safetensors.torch.save(small)}
    buffer = io.BytesIO()
    torch.save(small, buffer, _use_new_zipfile_serialization=False)
    whole[".pth"] = buffer.getvalue()
    generator = np.random.default_rng(0)
    messages = []
    for suffix, data in whole.items():
        path = tmp_path / f"damaged{suffix}"
        variants = [data[: int(len(data) * part)] for part in (0, 1e-5, 0.3, 0.9, 0.999)]
        for _ in range(30):
            changed = bytearray(data)
            places = generator.integers(0, min(len(data), 20_000), 20)
            for place in places[: int(generator.integers(1, 20))]:
                changed[place] = int(generator.integers(0, 256))
            variants.append(bytes(changed))
        for variant in variants:
            path.write_bytes(variant)
            try:
                read_published(path)
            except ModelFileError as error:
                messages.append(str(error))
    assert all("damaged." in message and "\n" not in message for message in messages)
    assert len(messages) > 60


@pytest.mark.parametrize("content", [b"", b"\x89PNG\r\n\x1a\n" + bytes(50), b"%PDF-1.7 ", pickle.dumps({"a": 1.0})])
def test_a_file_of_another_kind_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "a.pt"
    path.write_bytes(content)
    with pytest.raises(ModelFileError, match=r"a\.pt: (no checkpoint of torch|entry 'a' is no plain tensor)"):
        read_published(path)


def test_what_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(ModelFileError, match=r"gone\.pt: cannot be read \(No such file"):
        read_published(tmp_path / "gone.pt")
    with pytest.raises(ModelFileError, match="cannot be read"):
        read_published(tmp_path)


def test_a_distilled_checkpoint_brings_its_backbone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(published, "BACKBONES", (SPECS["resnet18"],))
    path = _saved(prefixed("module.", distilled(18, RESNET18, 2)), tmp_path / "weeds.pt")
    checkpoint = read_published(path)
    assert checkpoint.backbone is not None
    assert checkpoint.backbone.weights == "trained:imported:weeds.pt"
    assert (checkpoint.layout, checkpoint.classes) == ("DistillFSS", 2)
