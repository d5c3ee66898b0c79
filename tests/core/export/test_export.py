"""A student in other programs' formats says what it says here."""

from __future__ import annotations

import copy
import io
import json
import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from distillfss_core.cli.main import main
from distillfss_core.errors import OutputError, SettingsError
from distillfss_core.export import onnx as onnx_export
from distillfss_core.export.bioimageio import export_bioimageio
from distillfss_core.export.onnx import TOLERANCE, export_onnx
from distillfss_core.nn.device import Device
from pictures import blobs

onnx = pytest.importorskip("onnx", reason="onnx is not installed")
onnxruntime = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")


def run(path: Path, image: np.ndarray) -> np.ndarray:
    return onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"]).run(None, {"image": image})[0]


def with_zoom(student, zoom: str):
    other = copy.copy(student)
    other.preprocess = replace(student.preprocess, zoom=zoom)
    return other


@pytest.mark.parametrize("zoom", ["1", "2/3", "2", "3"])
def test_an_onnx_file_gives_the_probabilities_of_the_student(plain_student, zoom, tmp_path):
    student = with_zoom(plain_student, zoom)
    export_onnx(student, tmp_path / "student.onnx")
    about = json.loads({p.key: p.value for p in onnx.load(tmp_path / "student.onnx").metadata_props}["distillfss"])
    assert about["multiple"] == student.step
    assert about["card"] == json.loads(json.dumps(student.card))
    planes = [blobs(seed, 2 * student.step).image[:, : student.step] for seed in (1, 2)]
    scaled = []
    for plane in planes:
        limits = student.preprocess.limits(student.preprocess.as_channels(plane))
        given = about["intensity"]
        low, high = (given["low"], given["high"]) if "low" in given else np.percentile(plane, given["percentiles"])
        assert np.allclose((low, high), (limits.low[0], limits.high[0]))
        scaled.append(((plane - np.float32(low)) / (np.float32(high) - np.float32(low))).astype(np.float32)[None])
    found = run(tmp_path / "student.onnx", np.stack(scaled))  # two at once, higher than wide
    for plane, probabilities in zip(planes, found, strict=True):
        expected = student.with_engine("torch").predict(plane).probabilities
        assert np.abs(probabilities - expected).max() <= TOLERANCE


def test_channels_are_mixed_as_here(plain_student, tmp_path):
    student = copy.copy(plain_student)
    mix = ((0.5, -0.5, 0.0, 0.0), (0.25, 0.25, 0.25, 0.25), (0.0, 0.0, 0.0, 1.0))
    fitted = replace(student.preprocess.fitted, low=(0.0,) * 4, high=(255.0,) * 4)
    student.preprocess = replace(student.preprocess, channels=4, mix=mix, scope="volume", fitted=fitted)
    export_onnx(student, tmp_path / "student.onnx")
    plane = np.stack([blobs(seed, 64).image for seed in range(4)], -1).astype(np.uint8)
    found = run(tmp_path / "student.onnx", np.moveaxis(plane, -1, 0)[None].astype(np.float32) / 255)
    assert np.abs(found[0] - student.with_engine("torch").predict(plane).probabilities).max() <= TOLERANCE


def test_a_graph_that_differs_is_not_written(plain_student, tmp_path, monkeypatch):
    monkeypatch.setattr(onnx_export, "TOLERANCE", -1.0)
    with pytest.raises(OutputError, match=r"differs from torch by .* nothing was written"):
        export_onnx(plain_student, tmp_path / "student.onnx")
    assert not list(tmp_path.iterdir())


def test_a_package_passes_the_test_of_bioimageio(plain_student, tmp_path):
    core = pytest.importorskip("bioimageio.core", reason="bioimageio.core is not installed")
    path = tmp_path / "student.zip"
    student = copy.copy(plain_student)
    student.pixel_size = (0.5, 0.25)
    export_bioimageio(student, path, authors=["Ada"], license="MIT", name="Blob finder")
    described = core.load_description(path)
    assert described.name == "Blob finder"
    assert str(described.license) == "MIT"
    assert [author.name for author in described.authors] == ["Ada"]
    assert [axis.scale for axis in described.inputs[0].axes[2:]] == [0.5, 0.25]
    assert list(described.outputs[0].axes[1].channel_names) == ["background", "blob"]
    with zipfile.ZipFile(path) as package:
        image, answer = (np.load(io.BytesIO(package.read(f"test_{what}.npy"))) for what in ("input", "output"))
    assert image.std() > 1
    expected = student.with_engine("torch").predict(image[0, 0]).probabilities
    assert np.abs(answer[0] - expected).max() < 0.02  # percentiles of its preprocessing lie a hair beside ours


def test_a_student_on_another_device_is_exported_from_a_copy_on_the_cpu(plain_student, tmp_path):
    pytest.importorskip("bioimageio.core", reason="bioimageio.core is not installed")
    student = copy.deepcopy(plain_student)
    student.device = Device("meta")  # whose tensors nobody can read
    student.network.double()
    export_onnx(student, tmp_path / "student.onnx")
    export_bioimageio(student, tmp_path / "student.zip", authors=["Ada"])
    assert {(p.device.type, p.dtype) for p in student.network.parameters()} == {("cpu", torch.float64)}
    plane = blobs(1, 64).image
    limits = plain_student.preprocess.limits(plain_student.preprocess.as_channels(plane))
    scaled = ((plane - limits.low[0]) / (limits.high[0] - limits.low[0])).astype(np.float32)
    found = run(tmp_path / "student.onnx", scaled[None, None])[0]
    assert np.abs(found - plain_student.with_engine("torch").predict(plane).probabilities).max() <= TOLERANCE


def test_what_the_format_does_not_take_is_said(plain_student, tmp_path):
    pytest.importorskip("bioimageio.core", reason="bioimageio.core is not installed")
    with pytest.raises(SettingsError, match="names its authors; give at least one with --author"):
        export_bioimageio(plain_student, tmp_path / "s.zip", authors=[])
    with pytest.raises(SettingsError, match="does not take license 'mine'; give an SPDX identifier"):
        export_bioimageio(plain_student, tmp_path / "s.zip", authors=["Ada"], license="mine")
    assert not list(tmp_path.iterdir())


def test_the_command_writes_what_the_name_says(plain_student, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    plain_student.save("m.safetensors")
    assert main(["export", "m.safetensors", "-o", "s.onnx", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) | {"bytes": 0} == {
        "written": "s.onnx",
        "format": "onnx",
        "bytes": 0,
        "multiple": 32,
    }
    for arguments, message in (
        (["-o", "s.pt"], r"end its name in .onnx or .zip"),
        (["-o", "s.onnx", "--format", "bioimageio"], "end its name in .zip"),
        (["-o", "t.onnx", "--author", "Ada"], "--author is for BioImage.IO packages"),
        (["-o", "no/s.onnx"], "there is no folder"),
    ):
        assert main(["export", "m.safetensors", *arguments]) == 1
        assert message in capsys.readouterr().err
