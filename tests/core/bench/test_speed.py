"""Speed: what is measured, that the naive form says the same, and the report; nothing is timed here."""

import math
from collections import Counter
from dataclasses import asdict

import numpy as np
import pytest
import torch

from distillfss_core.bench import speed
from distillfss_core.bench.plots import draw_speed
from distillfss_core.bench.speed import (
    Case,
    Plan,
    memory_of,
    naive_bytes,
    naive_logits,
    plan_cases,
    prepare,
    run_speed,
    speed_table,
    time_cases,
    time_volume,
)
from distillfss_core.errors import SettingsError
from distillfss_core.models.preprocess import Preprocess
from distillfss_core.nn.backbones import load_backbone
from distillfss_core.nn.device import choose_device
from distillfss_core.nn.features import EncodedSupport
from distillfss_core.nn.head import FewShotHead, HeadForm
from distillfss_core.process import give_back, peak_mb, reset_peak, resident_mb
from distillfss_core.segmentation.lazy import segment_lazy
from distillfss_core.segmentation.to_zarr import segment_to_zarr

SMALL = Plan(side=64, sides=(64, 96), shots=(1, 2), classes=(1, 2), planes=(1,), rounds=1)


@pytest.fixture(scope="module")
def backbone():
    return load_backbone()


@pytest.fixture(scope="module")
def device():
    return choose_device("cpu", "float32")


@pytest.mark.parametrize("form", ["default", "published"])
@torch.no_grad()
def test_the_naive_form_has_the_logits_of_the_teacher(backbone, form):
    decoder = form
    teacher = FewShotHead(backbone.spec, 1, HeadForm("default", decoder, form, 32)).eval().teacher
    torch.manual_seed(0)
    labels = (torch.rand(2, 64, 64) < 0.3).byte()
    keys = teacher.encode(EncodedSupport.of(backbone(torch.rand(2, 3, 64, 64)), labels, 1))
    query = backbone(torch.rand(1, 3, 64, 64))
    torch.testing.assert_close(naive_logits(teacher, query, keys), teacher(query, keys).logits, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("case", [Case("student", 64, 2), Case("teacher", 64, shots=2), Case("published", 64, shots=1)])
def test_a_case_answers_for_its_plane(backbone, device, case):
    with torch.no_grad():
        found = prepare(case, backbone, device)()
    if case.what == "student":  # what runs it gives margins, on the grid of the finest features
        assert found.shape == (1, case.classes, 32, 32)
    else:
        assert getattr(found, "logits", found).shape == (1, case.classes, 2, 64, 64)


def test_a_plan_leaves_out_what_does_not_fit():
    room = naive_bytes(Case("published", 512, shots=5))
    cases, skipped = plan_cases(Plan(), room)
    assert {c.shots for c in cases if c.what == "published"} == {1, 5}
    assert len(skipped) == 1
    assert "50 shots" in skipped[0]
    assert {c.side for c in cases if c.what == "backbone"} == {256, 512, 1024}
    assert len(set(cases)) == len(cases)


@pytest.mark.parametrize("side", [32, 100, 4096])
def test_a_side_outside_its_limits_is_told(side):
    with pytest.raises(SettingsError, match=str(side)):
        Plan(sides=(64, side))


def test_the_backbone_alone_is_one(backbone, device):
    cases, _ = plan_cases(SMALL, math.inf)
    timings = time_cases(cases, backbone, device, 1)
    assert [t.case for t in timings] == cases
    assert all(t.ratio == 1 for t in timings if t.case.what == "backbone")
    assert all(t.rounds == 1 and t.least_ms <= t.ms for t in timings)


def test_memory_is_measured_where_the_system_says(device):
    if resident_mb() is None:
        pytest.skip("the system does not say")
    give_back()  # nothing of earlier tests is freed in between
    reset_peak()
    before = peak_mb()
    held = np.ones(200_000_000, np.uint8)
    assert peak_mb() - before > 100
    del held
    order = {"case": asdict(Case("student", 64)), "backbone": "efficientnet_lite0", "device": "cpu"}
    assert memory_of(order)["mb"] is not None


def test_a_volume_goes_through_in_three_ways(backbone, device):
    found = time_volume(2, 64, backbone, device)
    assert [v.way for v in found] == list(speed.WAYS)
    assert all(v.megavoxels_per_second > 0 for v in found)
    assert found[0].ratio == 1


def test_limits_are_sampled_in_every_round_of_every_way(backbone, device, monkeypatch):
    sampled, ways = Counter(), {segment_lazy: "lazy", segment_to_zarr: "zarr"}
    now = ["memory"]
    original = Preprocess.sample_limits

    def spy(self, sample):
        sampled[now[0]] += 1
        return original(self, sample)

    def told(work):
        def run(*args, **options):
            now[0] = ways[work]
            return work(*args, **options)

        return run

    monkeypatch.setattr(Preprocess, "sample_limits", spy)
    monkeypatch.setattr(speed, "segment_lazy", told(segment_lazy))
    monkeypatch.setattr(speed, "segment_to_zarr", told(segment_to_zarr))
    time_volume(2, 64, backbone, device)
    assert sampled == {"lazy": 2 * speed.VOLUME_ROUNDS, "zarr": 2 * speed.VOLUME_ROUNDS}


def test_the_report_is_a_table_and_a_picture(tmp_path, monkeypatch):
    monkeypatch.setattr(speed, "call_apart", lambda function, order, threads: {"mb": 3.0})
    monkeypatch.setattr(speed, "time_volume", lambda n, side, *_: [speed.VolumeSpeed(n, side, speed.WAYS[0], 1.0, 1.0)])
    report = run_speed(SMALL, "cpu")
    table = speed_table(report)
    assert "| backbone alone | 64 x 64 | 1.00 |" in table
    assert str(report.machine) in table
    assert table.count("\n| teacher, ") == 2
    draw_speed([report], [tmp_path / "a.png", tmp_path / "a.svg"])
    assert (tmp_path / "a.png").read_bytes()[:4] == b"\x89PNG"
    assert (tmp_path / "a.svg").read_text().startswith("<?xml")
