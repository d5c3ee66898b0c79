"""What a GPU computes, beside the CPU: `pytest -m cuda`; with ``--device cpu`` the same runs without a GPU."""

from __future__ import annotations

import copy
import gc
import warnings
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
import zarr

from distillfss_core import distill, open_volume, segment_lazy, segment_to_zarr
from distillfss_core.models.student import StudentModel
from distillfss_core.nn.backbones import load_backbone
from distillfss_core.nn.device import Device, choose_device
from distillfss_core.nn.teachers.dcama import attend
from distillfss_core.segmentation.to_zarr import iter_segment
from distillfss_core.settings import DistillSettings
from distillfss_core.support.support_set import SupportSet
from distillfss_core.training import iter_distill, refine
from pictures import blobs

pytestmark = pytest.mark.cuda

SETTINGS = DistillSettings(steps=40, zoom=Fraction(1), crop_size=64, queries=2, shots=2, crops=16)
TILE = 128
SMALL = ("efficientnet_lite0", "resnet18")
LARGE = ("mobilenetv4_conv_small", "convnext_atto", "swin_base_384", "dinov2_small")  # slow on a CPU


@pytest.fixture(scope="module")
def device(request) -> str:
    """The device under test."""
    name: str = request.config.getoption("--device")
    if name.startswith("cuda") and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device; --device cpu runs these tests without one")
    return name


@pytest.fixture(scope="module")
def halves(device) -> list[str]:
    """Half precisions that the device is fast in."""
    return ["bfloat16", "float16"] if device.startswith("cuda") else []


@pytest.fixture(scope="module")
def side(device) -> int:
    """Of the planes that are segmented."""
    return 320 if device.startswith("cuda") else 192


@pytest.fixture(scope="module")
def slices() -> SupportSet:
    return SupportSet(tuple(blobs(i) for i in range(3)), ("blob",))


@pytest.fixture(scope="module")
def settings(device) -> DistillSettings:
    return replace(SETTINGS, device=device, precision="float32")


@pytest.fixture(scope="module")
def trained(slices, settings) -> StudentModel:
    """A student, distilled on the device."""
    return distill(slices, settings)


@pytest.fixture(scope="module")
def file(trained, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("student") / "student.safetensors"
    trained.save(path)
    return path


@pytest.fixture(scope="module")
def stack(side) -> np.ndarray:
    return np.stack([blobs(seed, side).image for seed in range(5)])


@pytest.fixture(scope="module")
def truth(side) -> np.ndarray:
    return np.stack([blobs(seed, side).labels for seed in range(5)])


@pytest.fixture(scope="module")
def expected(file, stack) -> np.ndarray:
    """Labels by the CPU in float32."""
    model = StudentModel.load(file, device="cpu", precision="float32", engine="torch")
    return np.stack([model.predict_labels(plane, tile=TILE) for plane in stack])


def iou(labels: np.ndarray, truth: np.ndarray) -> float:
    return float(((labels == 1) & (truth == 1)).sum() / ((labels == 1) | (truth == 1)).sum())


def weights(model: StudentModel) -> dict[str, torch.Tensor]:
    return {name: value.cpu() for name, value in model.head.state_dict().items()}


@pytest.mark.parametrize("family", [*SMALL, *(pytest.param(name, marks=pytest.mark.slow) for name in LARGE)])
def test_a_backbone_has_the_features_of_the_cpu(device, halves, family):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # that random weights mean nothing
        backbone = load_backbone(family, "random")
    image = torch.from_numpy(blobs(0, 224).image / np.float32(255)).expand(2, 3, -1, -1)
    with torch.inference_mode():
        cpu = backbone(image)
        backbone.to(device)
        for precision, tolerance in (("float32", 0.01), *((half, 0.06) for half in halves)):
            with Device(device, precision).autocast():
                found = backbone(image.to(device))
            for ours, theirs in zip(cpu.stages, found.stages, strict=True):
                for a, b in zip(ours, theirs, strict=True):
                    assert (a - b.float().cpu()).norm() <= tolerance * a.norm(), precision


@pytest.mark.parametrize("biased", [False, True])
def test_attention_is_that_of_its_formula(device, halves, biased):
    draw = torch.Generator().manual_seed(0)
    q, k = (torch.randn(*shape, generator=draw) for shape in ((2, 2, 900, 40), (2, 700, 40)))
    values = torch.rand(700, 3, generator=draw)
    bias = torch.randn(700, generator=draw) if biased else None
    scores = q.double() @ k.double().transpose(1, 2) / 40**0.5 + (0 if bias is None else bias.double())
    formula = (scores.softmax(-1) @ values.double()).mean(1)
    for dtype, tolerance in ((torch.float32, 2e-3), *((getattr(torch, half), 0.02) for half in halves)):
        on = [x if x is None else x.to(device) for x in (q.to(dtype), k.to(dtype), values.to(dtype), bias)]
        assert (attend(*on).double().cpu() - formula).abs().max() <= tolerance


def test_gradients_of_attention_are_reproducible(device):
    draw = torch.Generator().manual_seed(0)
    q = torch.randn(2, 2, 900, 40, generator=draw).to(device).requires_grad_()
    k, values = torch.randn(2, 700, 40, generator=draw).to(device), torch.rand(700, 3, generator=draw).to(device)
    found = []
    for _ in range(2):
        with choose_device(device, "float32").reproducible():
            found.append(torch.autograd.grad(attend(q, k, values).square().sum(), q)[0].cpu())
    assert torch.equal(*found)


def test_refining_gives_the_same_teacher_for_the_same_seed(slices, settings):
    first, second = (refine(slices, replace(settings, steps=6)) for _ in range(2))
    for (name, a), (_, b) in zip(first.teacher.state_dict().items(), second.teacher.state_dict().items(), strict=True):
        assert torch.equal(a.cpu(), b.cpu()), name
    labeled = blobs(9)
    assert iou(first.predict_labels(labeled.image), labeled.labels) > 0.5


@pytest.mark.parametrize(
    "method", ["joint", *(pytest.param(m, marks=pytest.mark.slow) for m in ("two-stage", "direct"))]
)
def test_distilling_gives_the_same_student_for_the_same_seed(slices, settings, method):
    few = replace(settings, steps=6, method=method)
    first, second = (weights(distill(slices, few)) for _ in range(2))
    for name, value in first.items():
        assert torch.equal(value, second[name]), name


@pytest.mark.slow
def test_distilling_in_half_precision_learns_as_well(slices, settings, trained):
    half = distill(slices, replace(settings, precision="bfloat16"))
    labeled = [blobs(seed) for seed in range(10, 14)]
    scores = [np.mean([iou(m.predict_labels(s.image), s.labels) for s in labeled]) for m in (trained, half)]
    assert min(scores) > 0.6
    assert abs(scores[0] - scores[1]) < 0.1


def test_a_warm_start_goes_on_from_the_student(slices, settings, trained):
    again = distill(slices, replace(settings, steps=4), init_from=trained)
    labeled = blobs(12)
    assert iou(again.predict_labels(labeled.image), labeled.labels) > 0.6
    assert not torch.equal(next(again.head.student.parameters()), next(trained.head.student.parameters()))


def test_labels_and_iou_are_those_of_the_cpu(device, halves, file, stack, truth, expected):
    for precision in ("float32", *halves):
        model = StudentModel.load(file, device=device, precision=precision, engine="torch")
        found = np.stack([model.predict_labels(plane, tile=TILE) for plane in stack])
        assert (found == expected).mean() >= 0.999, precision
        assert abs(iou(found, truth) - iou(expected, truth)) <= 0.002, precision


def test_the_same_input_has_the_same_labels(device, file, stack):
    model = StudentModel.load(file, device=device, engine="torch")
    first, second = (model.predict(stack[0], tile=TILE).probabilities for _ in range(2))
    assert np.array_equal(first, second)


def test_a_lazy_volume_has_the_labels_of_its_planes(device, file, stack, expected):
    model = StudentModel.load(file, device=device, engine="torch")
    lazy = segment_lazy(open_volume(stack), model, tile=TILE)
    assert (lazy.compute() == expected).mean() >= 0.999
    part = lazy[2, 100:180, 7:190].compute()
    assert np.array_equal(part, model.predict_labels(stack[2], tile=TILE)[100:180, 7:190])


def test_a_volume_written_in_parts_has_the_bytes_of_one_run(device, file, stack, expected, tmp_path, monkeypatch):
    monkeypatch.setattr("distillfss_core.labelstore.layout._SIDE", TILE)
    monkeypatch.setattr("distillfss_core.labelstore.layout._SHARD", 2 * TILE * TILE)
    model = StudentModel.load(file, device=device, engine="torch")
    volume = open_volume(stack)
    segment_to_zarr(volume, model, tmp_path / "once.ome.zarr", tile=TILE)
    labels = zarr.open_array(tmp_path / "once.ome.zarr" / "0", mode="r")[...]
    assert (labels == expected).mean() >= 0.999
    for steps in (1, 3):  # cancelled twice
        run = iter_segment(volume, model, tmp_path / "parts.ome.zarr", resume=True, tile=TILE)
        for _ in range(steps):
            next(run)
        run.close()
    segment_to_zarr(volume, model, tmp_path / "parts.ome.zarr", resume=True, tile=TILE)
    assert np.array_equal(zarr.open_array(tmp_path / "parts.ome.zarr" / "0", mode="r")[...], labels)


@pytest.mark.slow
def test_a_worker_of_a_cluster_computes_on_its_device(device, file, stack, expected, tmp_path):
    pytest.importorskip("distributed", reason="distributed is not installed")
    from distillfss_core.segmentation.cluster import connect

    path = tmp_path / "image.zarr"
    zarr.create_array(path, data=stack, chunks=(1, 160, 160))
    model = StudentModel.load(file, device=device, engine="torch")
    with connect("local:1", device=device, precision=model.device.precision) as workers:
        assert workers.worker_device() == f"{model.device.kind} {model.device.precision}"
        segment_to_zarr(open_volume(path), model, tmp_path / "labels.ome.zarr", tile=TILE, cluster=workers)
    found = zarr.open_array(tmp_path / "labels.ome.zarr" / "0", mode="r")[...]
    assert (found == expected).mean() >= 0.999


def test_out_of_memory_goes_on_with_less_at_a_time(device, file, stack, expected, tmp_path, caplog):
    """A real one, by a share of the memory that the whole batch does not fit into."""
    if not device.startswith("cuda"):
        pytest.skip("needs a CUDA device, whose memory can be limited")
    model = StudentModel.load(file, device=device, precision="float32", engine="torch")
    wide = np.tile(stack, (8, 2, 2))
    gc.collect()
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(device).total_memory
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved(device) + 400e6) / total, device)
    try:
        segment_to_zarr(open_volume(wide), model, tmp_path / "labels.ome.zarr")
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, device)
    assert "is out of memory; going on with" in caplog.text
    again = StudentModel.load(file, device="cpu", precision="float32", engine="torch").predict_labels(wide[0])
    assert (zarr.open_array(tmp_path / "labels.ome.zarr" / "0", mode="r")[0] == again).mean() >= 0.999


def test_a_cancelled_training_returns_its_student_and_its_memory(device, slices, settings):
    run = iter_distill(slices, settings)
    training = (step for step in run if not step.is_preparation)
    for _ in range(3):
        next(training)
    run.close()
    student = run.result()
    assert student.training["steps"] == 3
    assert student.predict_labels(blobs(3).image).shape == (96, 96)
    if device.startswith("cuda"):
        del student, run
        gc.collect()
        before = torch.cuda.memory_allocated(device)
        again = iter_distill(slices, settings)
        next(step for step in again if not step.is_preparation)
        again.close()
        del again
        gc.collect()
        assert torch.cuda.memory_allocated(device) - before < 1 << 22


@pytest.mark.slow
def test_a_compiled_network_has_the_labels_of_the_plain_one(device, file, stack, expected):
    model = StudentModel.load(file, device=device, precision="float32", engine="torch-compiled")
    found = np.stack([copy.copy(model).predict_labels(plane, tile=TILE) for plane in stack[:2]])
    assert (found == expected[:2]).mean() >= 0.999
