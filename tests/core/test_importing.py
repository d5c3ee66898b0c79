"""Imported heads and students: what they compute, their cards, and the command."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import tifffile
import torch
from torch import Tensor

from checkpoints import (
    DINOV3,
    RESNET18,
    RESNET50,
    SWIN,
    attention_maps,
    dcama,
    decoded,
    distilled,
    head_tensors,
    merged,
    prefixed,
    resnet,
    resnet_blocks,
    student_maps,
    student_tensors,
    swin_tensors,
)
from distillfss_core import (
    AnnotatedSlice,
    DistillSettings,
    ModelFileError,
    OutputError,
    SettingsError,
    StudentModel,
    SupportSet,
    WeightsUnavailableError,
    distill,
    import_checkpoint,
    unrefined_teacher,
)
from distillfss_core.cli.console import ERROR, FINE
from distillfss_core.cli.main import main
from distillfss_core.metatraining.run import PretrainRun
from distillfss_core.nn import published
from distillfss_core.nn.backbones import SPECS
from distillfss_core.nn.pretrained import load_head
from distillfss_core.settings import PretrainSettings

FEW = DistillSettings(
    steps=1, zoom=Fraction(1), crop_size=64, queries=1, shots=1, crops=2, device="cpu", orientation="any"
)


@pytest.fixture(autouse=True)
def small_backbone(monkeypatch: pytest.MonkeyPatch) -> None:
    """A small backbone is taken for one that heads were published for."""
    monkeypatch.setattr(published, "BACKBONES", (SPECS["resnet18"], *published.BACKBONES))


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """resnet18_fold2.pt of DCAMA, bare.pt without its backbone, weeds.safetensors of DistillFSS."""
    folder = tmp_path_factory.mktemp("checkpoints")
    torch.save(prefixed("module.", dcama(18, RESNET18)), folder / "resnet18_fold2.pt")
    torch.save(prefixed("model.", head_tensors(RESNET18)), folder / "bare.pt")
    tensors = {name: value.contiguous() for name, value in distilled(18, RESNET18, 2).items()}
    safetensors.torch.save_file(tensors, folder / "weeds.safetensors", metadata={"format": "pt"})
    return folder


def _photographs(count: int, side: int = 96) -> list[np.ndarray]:
    generator = np.random.default_rng(0)
    return [generator.integers(0, 256, (side, side, 3), dtype=np.uint8) for _ in range(count)]


def _as_tensor(image: np.ndarray) -> Tensor:
    return torch.from_numpy(image).permute(2, 0, 1)[None] / 255


def _student_probabilities(depth: int, sizes: Any, image: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """What the equations give for the checkpoint that `distilled` makes, two classes; and where one is the stronger.

    Where both are equally strong, rounding decides whose background counts.
    """
    head, students = head_tensors(sizes), student_tensors(sizes, 2)
    query = resnet_blocks(resnet(depth), _as_tensor(image))
    logits = [decoded(head, student_maps(students, k, query), query, image.shape[:2]) for k in range(2)]
    first, second = (one[0, 1] for one in logits)
    return merged(logits)[0].numpy(), ((first - second).abs() > 1e-4).numpy()


# heads


def test_an_imported_head_is_what_the_equations_say(checkpoints: Path, tmp_path: Path) -> None:
    import_checkpoint(checkpoints / "resnet18_fold2.pt", tmp_path / "head.safetensors")
    image, shown = _photographs(2)
    labels = np.zeros((96, 96), np.uint8)
    labels[20:70, 30:60] = 1
    settings = DistillSettings(head=str(tmp_path / "head.safetensors"), zoom=Fraction(1), crop_size=96, device="cpu")
    model = unrefined_teacher(SupportSet((AnnotatedSlice(shown, labels),)), settings)
    head, net = head_tensors(RESNET18), resnet(18)
    with torch.no_grad():
        x, y = (model.preprocess.to_tensor(i, model.preprocess.limits(i))[None] for i in (image, shown))
        query, support = resnet_blocks(net, x), resnet_blocks(net, y)
    maps = attention_maps(head, query, support, torch.from_numpy(labels)[None].float())
    expected = merged([decoded(head, maps, query, (96, 96))])[0]
    np.testing.assert_allclose(model.predict(image).probabilities, expected.numpy(), atol=1e-4)


def test_the_card_of_a_head_states_its_checkpoint(checkpoints: Path, tmp_path: Path) -> None:
    path = checkpoints / "resnet18_fold2.pt"
    card = import_checkpoint(path, tmp_path / "head.safetensors")
    assert card["imported"] == {
        "file": "resnet18_fold2.pt",
        "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
        "layout": "DCAMA",
        "fold": 2,
    }
    assert (card["name"], card["preset"], card["backbone_inside"]) == ("resnet18_fold2", "published", True)
    assert card["backbone"]["weights"] == "trained:imported:resnet18_fold2.pt"
    assert card["backbone"]["license"] == "that of the checkpoint"
    weights = load_head(tmp_path / "head.safetensors")
    backbone = weights.trained_backbone()
    assert backbone is not None
    assert backbone.digest() == card["backbone"]["digest"]
    given = head_tensors(RESNET18)
    assert torch.equal(weights.tensors["decoder.mixer1.0.weight"], given["mixer1.0.weight"])
    assert torch.equal(weights.tensors["DCAMA_blocks.2.linears.1.bias"], given["DCAMA_blocks.2.linears.1.bias"])


@pytest.mark.slow
def test_an_imported_head_selects_its_backbone_and_the_published_forms(checkpoints: Path, tmp_path: Path) -> None:
    import_checkpoint(checkpoints / "resnet18_fold2.pt", tmp_path / "head.safetensors")
    images = _photographs(2)
    labels = [np.pad(np.ones((40, 40), np.uint8), ((10, 46), (20, 36))) for _ in images]
    support = SupportSet(tuple(map(AnnotatedSlice, images, labels)))
    settings = replace(FEW, head=str(tmp_path / "head.safetensors"), learning_rate=1e-7)
    student = distill(support, settings)
    assert student.head.form.to_json() == {"student": "published", "decoder": "published", "teacher": "published"} | {
        "width": 32
    }
    record = student.training["settings"]
    assert (record["backbone"], record["loss"], record["probe"]) == ("resnet18", "published", "none")
    assert student.training["head"] == "resnet18_fold2"
    given = head_tensors(RESNET18)["mixer1.0.weight"]
    assert torch.allclose(student.head.decoder.state_dict()["mixer1.0.weight"], given, atol=1e-5)
    assert student.backbone.digest() == load_head(settings.head).backbone_digest
    with pytest.raises(SettingsError, match="in no package"):
        student.save(tmp_path / "student.safetensors", with_backbone=False)
    student.save(tmp_path / "student.safetensors")
    again = StudentModel.load(tmp_path / "student.safetensors", device="cpu")
    np.testing.assert_array_equal(again.predict(images[0]).probabilities, student.predict(images[0]).probabilities)


def test_a_head_goes_with_no_other_backbone_and_no_meta_training(checkpoints: Path, tmp_path: Path, support) -> None:
    head = str(tmp_path / "head.safetensors")
    import_checkpoint(checkpoints / "resnet18_fold2.pt", head)
    with pytest.raises(SettingsError, match=r"backbone is 'resnet50', but head head.safetensors brings its own"):
        unrefined_teacher(support, replace(FEW, head=head, backbone="resnet50"))
    with pytest.raises(SettingsError, match=r"head head.safetensors has the published form, which is not meta-trained"):
        PretrainRun(PretrainSettings(backbone="resnet18", init_from=head), tmp_path / "run")


def test_a_head_without_backbone_states_where_its_weights_are(
    checkpoints: Path, tmp_path: Path, support, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import constants

    card = import_checkpoint(checkpoints / "bare.pt", tmp_path / "head.safetensors")
    assert card["backbone"]["weights"] == "hub:timm/resnet18.tv_in1k"
    assert not card["backbone_inside"]
    assert card["imported"]["fold"] is None
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(WeightsUnavailableError, match=r"model.safetensors of timm/resnet18.tv_in1k .* give the path"):
        unrefined_teacher(support, replace(FEW, head=str(tmp_path / "head.safetensors")))

    torch.save(resnet(18).state_dict(), tmp_path / "resnet18.pth")
    card = import_checkpoint(checkpoints / "bare.pt", tmp_path / "head.safetensors", weights=tmp_path / "resnet18.pth")
    assert card["backbone"]["weights"] == "file:resnet18.pth"
    assert card["backbone_inside"]


def test_other_weights_take_the_place_of_those_in_a_checkpoint(checkpoints: Path, tmp_path: Path) -> None:
    net = resnet(18, seed=9)
    torch.save(net.state_dict(), tmp_path / "other.pth")
    odd = torch.load(checkpoints / "resnet18_fold2.pt") | {"module.feature_extractor.odd": torch.zeros(1)}
    torch.save(odd, tmp_path / "odd.pt")
    path = tmp_path / "head.safetensors"
    with pytest.raises(
        ModelFileError, match=r"module\.feature_extractor\.\*: tensor 'odd' has no place in this backbone"
    ):
        import_checkpoint(tmp_path / "odd.pt", path)
    card = import_checkpoint(tmp_path / "odd.pt", path, weights=tmp_path / "other.pth")
    assert card["backbone"]["weights"] == "file:other.pth"
    backbone = load_head(path).trained_backbone()
    assert backbone is not None
    assert torch.equal(backbone.state()["conv1.weight"], net.state_dict()["conv1.weight"])


# students


def test_an_imported_student_is_what_the_equations_say(checkpoints: Path, tmp_path: Path) -> None:
    path = tmp_path / "weeds.safetensors"
    card = import_checkpoint(checkpoints / "weeds.safetensors", path, classes=("crop", "weed"))
    assert card["classes"] == ["crop", "weed"]
    assert card["training"]["imported"]["layout"] == "DistillFSS"
    assert card["backbone_inside"]
    model = StudentModel.load(path, device="cpu", engine="torch")
    (image,) = _photographs(1)
    expected, is_clear = _student_probabilities(18, RESNET18, image)
    assert is_clear.mean() > 0.9
    np.testing.assert_allclose(model.predict(image).probabilities[:, is_clear], expected[:, is_clear], atol=1e-4)
    gray = image[..., 0]
    repeated = np.repeat(gray[..., None], 3, axis=-1)
    np.testing.assert_array_equal(model.predict(gray).labels, model.predict(repeated).labels)


def test_names_of_classes_must_be_as_many(checkpoints: Path, tmp_path: Path) -> None:
    path = tmp_path / "out.safetensors"
    assert import_checkpoint(checkpoints / "weeds.safetensors", path)["classes"] == ["class 1", "class 2"]
    with pytest.raises(SettingsError, match=r"3 classes are named, but .*weeds.safetensors has 2"):
        import_checkpoint(checkpoints / "weeds.safetensors", path, classes=("a", "b", "c"))
    with pytest.raises(SettingsError, match=r"1 classes are named, but .* is a head of DCAMA, which has none"):
        import_checkpoint(checkpoints / "bare.pt", path, classes=("a",))


@pytest.mark.slow
def test_training_goes_on_from_an_imported_student(checkpoints: Path, tmp_path: Path) -> None:
    path = tmp_path / "weeds.safetensors"
    import_checkpoint(checkpoints / "weeds.safetensors", path, classes=("crop", "weed"))
    images = _photographs(2)
    labels = [np.repeat(np.repeat(np.arange(9, dtype=np.uint8).reshape(3, 3) % 3, 32, 0), 32, 1) for _ in images]
    support = SupportSet(tuple(map(AnnotatedSlice, images, labels)), ("crop", "weed"))
    start = StudentModel.load(path, device="cpu")
    student = distill(support, replace(FEW, learning_rate=1e-7), init_from=start)
    assert student.preprocess == start.preprocess
    for name, value in start.head.state_dict().items():
        assert torch.allclose(student.head.state_dict()[name], value, atol=1e-4)


# true shapes


@pytest.mark.slow
def test_a_student_of_the_published_size_is_what_the_equations_say(tmp_path: Path) -> None:
    source, path = tmp_path / "model.safetensors", tmp_path / "weeds.safetensors"
    safetensors.torch.save_file({k: v.contiguous() for k, v in distilled(50, RESNET50, 2).items()}, source)
    import_checkpoint(source, path)
    source.unlink()
    (image,) = _photographs(1, 64)
    model = StudentModel.load(path, device="cpu")
    expected, is_clear = _student_probabilities(50, RESNET50, image)
    assert is_clear.mean() > 0.9
    np.testing.assert_allclose(model.predict(image).probabilities[:, is_clear], expected[:, is_clear], atol=1e-4)


@pytest.mark.slow
def test_heads_of_the_published_sizes_are_imported(tmp_path: Path) -> None:
    source, path = tmp_path / "swin_fold0_pascal_modcross_soft.pt", tmp_path / "head.safetensors"
    tensors = prefixed("feature_extractor.", swin_tensors()) | prefixed("model.", head_tensors(SWIN, positions=10_000))
    torch.save(tensors, source)
    card = import_checkpoint(source, path)
    assert (card["backbone"]["name"], card["imported"]["fold"], card["backbone_inside"]) == ("swin_base_384", 0, True)
    backbone = load_head(path).trained_backbone()
    assert backbone is not None
    for theirs, ours in (
        ("layers.0.downsample.reduction.weight", "layers.1.downsample.reduction.weight"),
        ("layers.2.blocks.17.attn.qkv.bias", "layers.2.blocks.17.attn.qkv.bias"),
    ):
        assert torch.equal(backbone.state()[ours], tensors[f"feature_extractor.{theirs}"])
    torch.save(prefixed("module.model.", head_tensors(DINOV3)), tmp_path / "dinov3_fold0_pascal.pt")
    card = import_checkpoint(tmp_path / "dinov3_fold0_pascal.pt", path)
    assert card["backbone"]["weights"] == "hub:timm/vit_large_patch16_dinov3.lvd1689m"


# the command


def test_the_command_writes_a_head_that_info_describes(
    checkpoints: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "head.safetensors"
    assert main(["import", str(checkpoints / "resnet18_fold2.pt"), "-o", str(path)]) == FINE
    assert f"resnet18, head; use it with distill --head {path}" in capsys.readouterr().out
    assert main(["info", str(path)]) == FINE
    said = capsys.readouterr().out
    digest = hashlib.sha256((checkpoints / "resnet18_fold2.pt").read_bytes()).hexdigest()
    assert f"DCAMA, fold 2, from resnet18_fold2.pt, SHA-256 {digest}" in said
    assert "weights trained:imported:resnet18_fold2.pt (in the file), license that of the checkpoint" in said


def test_the_command_writes_a_student_that_segments(
    checkpoints: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, image = tmp_path / "weeds.safetensors", tmp_path / "image.tif"
    arguments = ["import", str(checkpoints / "weeds.safetensors"), "-o", str(path), "--classes=crop,weed"]
    assert main([*arguments, "--json"]) == FINE
    assert json.loads(capsys.readouterr().out)["classes"] == ["crop", "weed"]
    assert main(["info", str(path)]) == FINE
    said = capsys.readouterr().out
    assert "DistillFSS, from weeds.safetensors, SHA-256 " in said
    assert "1 crop, 2 weed" in said
    (pixels,) = _photographs(1)
    tifffile.imwrite(image, pixels, photometric="rgb")
    out = tmp_path / "labels.tif"
    assert main(["segment", str(image), "-m", str(path), "-o", str(out), "--device=cpu"]) == FINE
    expected, is_clear = _student_probabilities(18, RESNET18, pixels)
    assert (tifffile.imread(out) == expected.argmax(0))[is_clear].mean() > 0.999
    capsys.readouterr()
    assert main(["export", str(path), "-o", str(tmp_path / "weeds.onnx")]) == ERROR
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_the_command_refuses_in_one_line(
    checkpoints: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], saved_model: Path
) -> None:
    path, source = tmp_path / "head.safetensors", checkpoints / "bare.pt"
    cut = tmp_path / "cut.pt"
    cut.write_bytes(source.read_bytes()[:-1000])
    for arguments, message in (
        ([cut, "-o", path], "cut.pt: no checkpoint of torch or safetensors, or damaged"),
        ([saved_model, "-o", path], "a file of this package already (distillfss-student); it needs no import"),
        ([source, "-o", source], "is no suffix of a model"),
        ([source, "-o", saved_model], "is already there; give --overwrite"),
        ([source, "-o", path, "--classes=a,b"], "2 classes are named"),
    ):
        assert main(["import", *map(str, arguments)]) == ERROR
        said = capsys.readouterr()
        assert said.out == ""
        (line,) = said.err.splitlines()
        assert line.startswith("distillfss: error: ")
        assert message in line
        assert not path.exists()


def test_what_was_there_stays_if_a_checkpoint_does_not_fit(checkpoints: Path, tmp_path: Path) -> None:
    path = tmp_path / "head.safetensors"
    path.write_bytes(b"before")
    torch.save({"model.DCAMA_blocks.0.linears.0.weight": torch.zeros(3, 3)}, tmp_path / "odd.pt")
    with pytest.raises(ModelFileError, match=r"'model\.pe\.0\.pe' of shape"):
        import_checkpoint(tmp_path / "odd.pt", path)
    assert path.read_bytes() == b"before"
    with pytest.raises(OutputError, match="there is no folder"):
        import_checkpoint(checkpoints / "bare.pt", tmp_path / "nowhere" / "head.safetensors")
