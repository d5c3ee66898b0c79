"""The fastest engine is found by a clock, and found again in the cache."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch

from distillfss_core.errors import SettingsError
from distillfss_core.models import calibration
from distillfss_core.models.calibration import Form, iter_fastest_form, timed_forms
from distillfss_core.models.engines import auto_forms
from distillfss_core.models.student import StudentModel
from distillfss_core.nn.device import Device
from distillfss_core.segmentation import to_zarr
from distillfss_core.segmentation.to_zarr import iter_segment, segment_to_zarr
from distillfss_core.types import GeneratorRun, finish
from distillfss_core.volumes.volume import open_volume
from pictures import blobs

ORT, VINO, ROUNDED = ("onnxruntime", "float32"), ("openvino", "float32"), ("openvino", "bfloat16")
FORMS = [ORT, VINO, ROUNDED]
WINDOW = (64, 96)


class Machine:
    """Engines that take a fixed time by a clock of their own."""

    def __init__(self, seconds: dict[Form, float | Exception]) -> None:
        self.seconds, self.now, self.made = seconds, 0.0, list[Form]()

    def make(self, engine: str, precision: str):
        self.made.append((engine, precision))
        seconds = self.seconds[engine, precision]
        if isinstance(seconds, Exception):
            raise seconds

        def run(image: torch.Tensor) -> torch.Tensor:
            assert image.shape == (1, 3, *WINDOW)
            self.now += seconds
            return image

        return run

    def fastest(self, network, *, measure: bool = True, forms=FORMS) -> Form | None:
        return finish(GeneratorRun(self.iter_fastest(network, measure=measure, forms=forms)))

    def iter_fastest(self, network, *, measure: bool = True, forms=FORMS):
        return iter_fastest_form(forms, network, self.make, WINDOW, measure=measure, clock=lambda: self.now)


@pytest.fixture
def network(plain_student):
    pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
    pytest.importorskip("openvino", reason="openvino is not installed")
    return plain_student.network


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    """A cache of its own, empty."""
    file = tmp_path / "home" / "cache" / "engines.json"
    monkeypatch.setattr(calibration, "cache_file", lambda: file)
    return file


@pytest.mark.parametrize(
    ("times", "expected"),
    [((0.3, 0.2, 0.1), ROUNDED), ((0.3, 0.2, 0.5), VINO), ((0.2, 0.3, 0.5), ORT), ((0.2, 0.195, 0.191), ORT)],
    ids=["a processor with bfloat16", "one without", "ONNX Runtime", "nearly the same"],
)
def test_the_fastest_is_taken_and_of_equals_the_exacter(network, times, expected):
    assert Machine(dict(zip(FORMS, times, strict=True))).fastest(network) == expected


def test_times_are_found_again_in_the_cache(network, cache, monkeypatch):
    assert Machine({ORT: 0.3, VINO: 0.2, ROUNDED: 0.5}).fastest(network) == VINO
    other = Machine({ORT: 0.1, VINO: 0.2, ROUNDED: 0.5})
    assert other.fastest(network) == VINO
    assert not other.made
    for patch in (
        lambda: monkeypatch.setattr(torch, "get_num_threads", lambda: 77),
        lambda: monkeypatch.setattr(calibration, "describe_engine", lambda name: f"{name} 99"),
        lambda: monkeypatch.setattr(calibration, "_processor", lambda: "another"),
    ):
        patch()
        other.made.clear()
        assert other.fastest(network) == ORT
        assert other.made == FORMS
    assert len(json.loads(cache.read_text())["times"]) == 4


def test_timing_pauses_after_each_window_and_keeps_nothing_that_is_not_whole(network, cache):
    machine = Machine({ORT: 0.3, VINO: 0.2, ROUNDED: 0.5})
    run = machine.iter_fastest(network)
    for windows in range(1, 5):
        next(run)
        assert machine.now == pytest.approx({1: 0.3, 2: 0.6, 3: 0.9, 4: 1.1}[windows])
    run.close()
    assert machine.made == [ORT, VINO]
    assert not cache.exists()
    assert machine.fastest(network) == VINO


def _with_times(content: dict, times: object) -> bytes:
    return json.dumps(content | {"times": dict.fromkeys(content["times"], times)}).encode()


@pytest.mark.parametrize(
    "spoil",
    [
        lambda content: b"\x00\xff",
        lambda content: json.dumps([content]).encode(),
        lambda content: json.dumps(content | {"version": 99}).encode(),
        lambda content: json.dumps(content | {"times": "none"}).encode(),
        lambda content: _with_times(content, {"torch float32": 0.125}),
        lambda content: _with_times(content, {"openvino float32": "a"}),
        lambda content: _with_times(content, {"openvino float32": -1.0}),
    ],
)
def test_a_damaged_or_foreign_cache_is_ignored_and_replaced(network, cache, spoil):
    machine = Machine({ORT: 0.125, VINO: 0.25, ROUNDED: 0.5})  # no clock rounds these
    assert machine.fastest(network) == ORT
    good = json.loads(cache.read_text())
    cache.write_bytes(spoil(good))
    machine.made.clear()
    assert machine.fastest(network) == ORT
    assert machine.made == FORMS
    assert json.loads(cache.read_text())["times"] == good["times"]


def test_without_a_cache_times_are_measured_each_time(network, cache):
    cache.parent.parent.write_text("a file, where a folder is needed")
    machine = Machine({ORT: 0.1, VINO: 0.2, ROUNDED: 0.5})
    for _ in range(2):
        machine.made.clear()
        assert machine.fastest(network) == ORT
        assert machine.made == FORMS
    assert machine.fastest(network, measure=False) is None


def test_an_engine_that_fails_is_not_taken(network, cache):
    machine = Machine({ORT: 0.3, VINO: RuntimeError("no such instruction"), ROUNDED: SettingsError("not here")})
    assert machine.fastest(network) == ORT
    machine.made.clear()
    assert machine.fastest(network) == ORT
    assert not machine.made
    broken = Machine(dict.fromkeys(FORMS, RuntimeError("nothing works")))
    assert broken.fastest(network, forms=FORMS[:2]) is None


def test_what_was_timed_is_listed_by_window(network, cache):
    assert timed_forms(FORMS, network) == []
    Machine({ORT: 0.3, VINO: 0.2, ROUNDED: 0.5}).fastest(network)
    larger = (128, 96)
    keys = json.loads(cache.read_text())
    (windows,) = keys["times"].values()
    windows["128 x 96"] = {"onnxruntime float32": 0.4, "openvino float32": 0.5}
    windows |= {"wide": windows["64 x 96"], "9 x 9": {"openvino float32": -1.0}}  # of nothing, and damaged
    cache.write_text(json.dumps(keys))
    assert [(one.window, one.best) for one in timed_forms(FORMS, network)] == [(WINDOW, VINO), (larger, ORT)]
    assert timed_forms(FORMS[:1], network) == []


def test_a_student_says_why_an_engine_would_run_it(network, plain_student, cache, monkeypatch):
    def explain(precision: str, engine: str) -> list[str]:
        return copy.copy(plain_student).to("cpu", precision, engine).explain_engine()

    assert explain("auto", "torch") == ["torch float32 on cpu: the engine was given"]
    (line,) = explain("float32", "auto")
    assert line.startswith("onnxruntime float32 on cpu: the usual choice, as engines were not timed here yet")
    Machine({ORT: 0.3, VINO: 0.2, ROUNDED: 0.5}).fastest(network, forms=FORMS[:2])
    assert explain("float32", "auto") == [
        "openvino float32 on cpu: the fastest, as a window of 64 x 96 takes: onnxruntime float32 300 ms, "
        "openvino float32 200 ms"
    ]
    monkeypatch.setattr("distillfss_core.models.student.auto_forms", lambda *_: FORMS[:1])
    (line,) = explain("float32", "auto")
    assert line == "onnxruntime float32 on cpu: the only engine that is installed and runs this model here"


def test_int8_is_never_chosen_by_itself(network):
    assert auto_forms("auto", Device("cpu"), network) == FORMS
    assert auto_forms("float32", Device("cpu"), network) == [ORT, VINO]
    assert auto_forms("int8", Device("cpu", "int8"), network) == [("onnxruntime", "int8"), ("openvino", "int8")]
    assert auto_forms("auto", Device("cuda", "bfloat16"), network) == []


def _choosing(monkeypatch, form: Form) -> list[list[Form]]:
    """Have this form chosen; gives what it was chosen from."""
    asked: list[list[Form]] = []

    def choose(forms, *args: object, **options: object):
        yield
        asked.append(list(forms))
        return form

    monkeypatch.setattr("distillfss_core.models.student.iter_fastest_form", choose)
    return asked


def test_a_student_takes_the_fastest_where_it_may_choose(network, plain_student, monkeypatch):
    asked = _choosing(monkeypatch, ROUNDED)
    free = copy.copy(plain_student).to("cpu", "auto", "auto")
    rounded = free.calibrated(WINDOW)
    assert (rounded.engine, rounded.device.precision) == ROUNDED
    assert free.device.precision == "float32"
    assert copy.copy(plain_student).to("cpu", "auto", "onnxruntime").calibrated(WINDOW).engine == "onnxruntime"
    assert asked == [FORMS]


def test_a_run_goes_on_in_the_precision_it_was_begun_with(network, plain_student, tmp_path, monkeypatch):
    monkeypatch.setattr("distillfss_core.labelstore.layout._SIDE", 96)
    monkeypatch.setattr("distillfss_core.labelstore.layout._SHARD", 96 * 96)
    volume = open_volume(blobs(3, 200).image[None])

    def free() -> StudentModel:
        return copy.copy(plain_student).to("cpu", "auto", "auto")

    _choosing(monkeypatch, ROUNDED)
    report = segment_to_zarr(volume, free(), tmp_path / "once.zarr", tile=96)
    assert report.engine.startswith("openvino ")
    assert report.engine.endswith(" bfloat16")
    run = iter_segment(volume, free(), tmp_path / "parts.zarr", tile=96)
    next(run)
    run.close()
    asked = _choosing(monkeypatch, ORT)
    rest = segment_to_zarr(volume, free(), tmp_path / "parts.zarr", resume=True, tile=96)
    assert (rest.engine, asked) == (report.engine, [])
    assert rest.finished >= 1
    shards = [sorted((tmp_path / name / "0" / "c").rglob("*")) for name in ("once.zarr", "parts.zarr")]
    assert [f.read_bytes() for f in shards[0] if f.is_file()] == [f.read_bytes() for f in shards[1] if f.is_file()]


def test_a_short_run_is_not_delayed_by_timing(network, plain_student, tmp_path, monkeypatch):
    measured = []

    def noting(self, window, *, measure):
        yield
        measured.append((window, measure))
        return self

    monkeypatch.setattr(StudentModel, "iter_calibrated", noting)
    volume, free = open_volume(blobs(3, 200).image[None]), copy.copy(plain_student).to("cpu", "auto", "auto")
    segment_to_zarr(volume, free, tmp_path / "short.zarr")
    monkeypatch.setattr(to_zarr, "WORTH", 200 * 200)
    segment_to_zarr(volume, free, tmp_path / "long.zarr")
    assert measured == [((224, 224), False), ((224, 224), True)]
