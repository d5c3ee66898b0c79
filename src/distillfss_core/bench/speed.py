"""Time and memory of backbone, student and teacher, as ratios to neighboring measurements of one run."""

from __future__ import annotations

import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from distillfss_core.bench.apart import call_apart
from distillfss_core.bench.rows import Machine, this_machine
from distillfss_core.bench.tables import markdown
from distillfss_core.errors import SettingsError
from distillfss_core.models.engines import StudentNetwork
from distillfss_core.models.preprocess import fit_preprocess
from distillfss_core.models.student import StudentModel
from distillfss_core.nn.backbones import SPECS, Backbone, load_backbone
from distillfss_core.nn.device import Device, choose_device
from distillfss_core.nn.features import CoarseMaps, EncodedSupport, FeaturePyramid, cat_pyramids
from distillfss_core.nn.head import FewShotHead, HeadForm
from distillfss_core.nn.teachers.dcama import CrossAttention, DcamaKeys, DcamaTeacher
from distillfss_core.process import give_back, peak_mb, reset_peak, resident_mb
from distillfss_core.samples import generate_sample
from distillfss_core.segmentation.lazy import segment_lazy
from distillfss_core.segmentation.to_zarr import segment_to_zarr
from distillfss_core.volumes.volume import open_volume

DEFAULT = HeadForm("default", "default", "default", 32)
PUBLISHED = HeadForm("published", "published", "published", 32)
HALO = 128  # of the student that goes through volumes; a distilled one has its own, measured
SLOW, FEW = 2.0, 3  # what takes longer than so many seconds is timed only so many times
VOLUME_ROUNDS = 3

WAYS = ("in memory", "lazily from zarr", "zarr to zarr")


@dataclass(frozen=True)
class Plan:
    """Cases to measure.

    Parameters
    ----------
    backbone : str
    side : int
        Of the plane on which forms, shots and classes are compared, pixels.
    sides : sequence of int
        Planes of which backbone and student are compared; volumes are of the largest.
    shots, classes, planes : sequence of int
        Of teachers, students and volumes.
    rounds : int
        Times that everything is timed, in turn.

    Raises
    ------
    SettingsError
        If a side is no multiple of 32 from 64 to 2048.
    """

    backbone: str = "efficientnet_lite0"
    side: int = 512
    sides: Sequence[int] = (256, 512, 1024)
    shots: Sequence[int] = (1, 5, 50)
    classes: Sequence[int] = (1, 2, 5)
    planes: Sequence[int] = (4, 16)
    rounds: int = 9

    def __post_init__(self) -> None:
        for side in (self.side, *self.sides):
            if side % 32 or not 64 <= side <= 2048:
                raise SettingsError(f"a plane of {side} pixels is wanted; give a multiple of 32 from 64 to 2048")


@dataclass(frozen=True)
class Case:
    """A network that segments one plane; ``what`` is "backbone", "student", "teacher" or "published"."""

    what: str
    side: int
    classes: int = 1
    shots: int = 0

    @property
    def title(self) -> str:
        """Name of the case in a table."""
        if self.what == "backbone":
            return "backbone alone"
        if self.what == "student":
            return f"student, {self.classes} class{'es' * (self.classes > 1)}"
        shots = f"{self.shots} shot{'s' * (self.shots > 1)}"
        return f"teacher, {shots}, encoded before" if self.what == "teacher" else f"published form, {shots}, naive"


@dataclass(frozen=True)
class Timing:
    """Milliseconds (median and least) and the median over the rounds of the ratio to the backbone alone."""

    case: Case
    ms: float
    least_ms: float
    ratio: float
    rounds: int


@dataclass(frozen=True)
class Memory:
    """Megabytes that the prediction of one plane takes, beyond torch and the loaded backbone."""

    case: Case
    mb: float


@dataclass(frozen=True)
class VolumeSpeed:
    """Speed of one way to segment a volume; ``ratio`` to the same planes in memory."""

    planes: int
    side: int
    way: str
    megavoxels_per_second: float
    ratio: float


@dataclass(frozen=True)
class SpeedReport:
    """Measurements of a plan on one machine; ``skipped`` names cases that exceed its memory."""

    machine: Machine
    plan: Plan
    timings: list[Timing]
    memories: list[Memory]
    volumes: list[VolumeSpeed]
    skipped: list[str] = field(default_factory=list)


def run_speed(plan: Plan, device: str = "auto", show: Callable[[str], object] = lambda _: None) -> SpeedReport:
    """Measure a plan on one device.

    Parameters
    ----------
    show : function of str
        Told of what comes next.

    Raises
    ------
    SettingsError
        If the device is not on this machine, or the backbone is unknown.
    """
    where = choose_device(device, "float32")
    backbone = _load(plan.backbone, where)
    machine = this_machine(where.name)
    cases, skipped = plan_cases(plan, _room(where))
    show("times")
    timings = time_cases(cases, backbone, where, plan.rounds)
    memories = []
    for case in cases:
        if case.side == plan.side:
            show(f"memory, {case.title}")
            order = {"case": asdict(case), "backbone": plan.backbone, "device": where.name}
            mb = call_apart(memory_of, order, machine.threads)["mb"]
            if mb is not None:
                memories.append(Memory(case, mb))
    volumes = []
    for planes in plan.planes:
        show(f"volume of {planes} planes")
        volumes += time_volume(planes, max(plan.sides), backbone, where)
    return SpeedReport(machine, plan, timings, memories, volumes, skipped)


def plan_cases(plan: Plan, room: float) -> tuple[list[Case], list[str]]:
    """The cases of a plan, and in words those that would not fit into ``room`` bytes."""
    cases = [Case("backbone", side) for side in sorted({plan.side, *plan.sides})]
    cases += [Case("student", side) for side in sorted({*plan.sides} - {plan.side})]
    cases += [Case("student", plan.side, classes=k) for k in plan.classes]
    cases += [Case("teacher", plan.side, shots=n) for n in plan.shots]
    skipped = []
    for shots in plan.shots:
        case = Case("published", plan.side, shots=shots)
        needed = naive_bytes(case)
        if needed <= room:
            cases.append(case)
        else:
            skipped.append(
                f"{case.title}: its attention alone needs {needed / 1e9:.0f} GB, {room / 1e9:.0f} GB are free"
            )
    return cases, skipped


def naive_bytes(case: Case) -> float:
    """Scores and weights of the naive form's largest attention: 8 heads, stride 8, float32, twice."""
    tokens = (case.side / 8) ** 2
    return 2 * 4 * 8 * tokens * tokens * case.shots


# -- one plane -------------------------------------------------------------------------------------------


@torch.no_grad()
def prepare(case: Case, backbone: Backbone, device: Device) -> Callable[[], object]:
    """A function that segments one plane of noise; weights of the head are untrained, which costs the same."""
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(1, 3, case.side, case.side, generator=generator).to(device.torch)
    if case.what == "backbone":
        return lambda: backbone(x)
    form = PUBLISHED if case.what == "published" else DEFAULT
    head = FewShotHead(backbone.spec, case.classes, form).eval().to(device.torch)
    if case.what == "student":
        network = StudentNetwork(backbone, head.to(memory_format=torch.channels_last))
        return lambda: network(x)
    images = torch.rand(case.shots, 3, case.side, case.side, generator=generator)
    cells = torch.rand(case.shots, case.side // 32, case.side // 32, generator=generator) < 0.2
    labels = cells.byte().repeat_interleave(32, 1).repeat_interleave(32, 2).to(device.torch)

    teacher = head.teacher
    assert isinstance(teacher, DcamaTeacher)

    def encode() -> DcamaKeys:
        features = cat_pyramids([backbone(image[None].to(device.torch)) for image in images])
        return teacher.encode(EncodedSupport.of(features, labels, case.classes))

    if case.what == "published":
        return lambda: naive_logits(teacher, backbone(x), encode())
    keys = encode()
    return lambda: teacher(backbone(x), keys)


def naive_logits(teacher: DcamaTeacher, query: FeaturePyramid, keys: DcamaKeys) -> Tensor:
    """A teacher's logits by the attention as it is published [1]_: softmax(q k^T) v with the whole matrix in memory.

    DistillFSS [2]_ uses this attention and encodes the support anew for each query.

    References
    ----------
    .. [1] Shi, Wei, Zhang, Lu, Ning, Chen, Ma, Zheng, "Dense Cross-Query-and-Support Attention Weighted Mask
       Aggregation for Few-Shot Segmentation", ECCV 2022.
    .. [2] De Marinis, Blok, Kaymak, Brussee, Vessio, Castellano, "DistillFSS: Synthesizing Few-Shot Knowledge into a
       Lightweight Segmentation Model", arXiv:2512.05613, 2025.
    """
    maps = []
    for attention, blocks, stage in zip(teacher.DCAMA_blocks, query.coarse, keys.stages, strict=True):
        assert isinstance(attention, CrossAttention)
        logits = []
        for block, k in zip(blocks, stage.keys, strict=True):
            q = attention.queries(attention.tokens(block))  # b heads l d
            scores = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5
            if stage.bias is not None:
                scores = scores + stage.bias
            m = (scores.softmax(-1) @ stage.values).mean(1)  # b l k
            logits.append(m.transpose(1, 2).unflatten(2, block.shape[-2:]))
        maps.append(torch.stack(logits, 2))
    result: Tensor = teacher.decoder(CoarseMaps(*maps), query, keys.features)
    return result


@torch.no_grad()
def time_cases(cases: Sequence[Case], backbone: Backbone, device: Device, rounds: int) -> list[Timing]:
    """All cases in turn, round after round, so that whatever else the machine does meets all alike."""
    works = {case: prepare(case, backbone, device) for case in cases}
    slow = {case for case, work in works.items() if _seconds(work, device) > SLOW}  # the first time is not counted
    times: dict[Case, list[float]] = {case: [] for case in cases}
    for number in range(rounds):
        for case, work in works.items():
            if number < FEW or case not in slow:
                times[case].append(_seconds(work, device))
    timings = []
    for case, taken in times.items():
        floor = times[Case("backbone", case.side)]
        ratio = statistics.median(a / b for a, b in zip(taken, floor, strict=False))
        ms = [1000 * t for t in taken]
        timings.append(Timing(case, round(statistics.median(ms), 2), round(min(ms), 2), round(ratio, 3), len(ms)))
    return timings


def _seconds(work: Callable[[], object], device: Device) -> float:
    _wait(device)
    began = time.perf_counter()
    work()
    _wait(device)
    return time.perf_counter() - began


def _wait(device: Device) -> None:
    if device.kind == "cuda":
        torch.cuda.synchronize(device.torch)
    elif device.kind == "mps":
        torch.mps.synchronize()


@torch.no_grad()
def memory_of(order: dict[str, Any]) -> dict[str, Any]:
    """Megabytes for one plane of a case, what it keeps of the support included; meant for a process of its own."""
    device, case = choose_device(order["device"], "float32"), Case(**order["case"])
    backbone = _load(order["backbone"], device)
    backbone(torch.rand(1, 3, 32, 32, device=device.torch))
    give_back()
    if device.kind == "cuda":
        before = torch.cuda.memory_allocated(device.torch)
        work = prepare(case, backbone, device)
        torch.cuda.reset_peak_memory_stats(device.torch)
        work()
        return {"mb": round((torch.cuda.max_memory_allocated(device.torch) - before) / 1e6, 1)}
    held = resident_mb()
    work = prepare(case, backbone, device)
    give_back()
    reset_peak()
    work()
    peak = peak_mb()
    return {"mb": None if held is None or peak is None else round(peak - held, 1)}


# -- volumes ---------------------------------------------------------------------------------------------


def time_volume(planes: int, side: int, backbone: Backbone, device: Device) -> list[VolumeSpeed]:
    """A generated volume through a student in memory, lazily and from zarr to zarr."""
    import zarr

    plane = generate_sample(planes=1, size=side).image[0]
    head = FewShotHead(backbone.spec, 1, DEFAULT).eval().to(device.torch)
    model = StudentModel(backbone, head, fit_preprocess([plane]), ("object",), device=device, halo=HALO)
    seconds: dict[str, list[float]] = {way: [] for way in WAYS}
    with tempfile.TemporaryDirectory() as folder:
        stored = zarr.create_array(
            Path(folder) / "volume.zarr",
            shape=(planes, side, side),
            chunks=(1, min(side, 512), min(side, 512)),
            dtype=plane.dtype,
            dimension_names=["z", "y", "x"],
        )
        for z in range(planes):
            stored[z] = np.roll(plane, 7 * z, 0)
        with open_volume(Path(folder) / "volume.zarr") as volume:

            def lazily() -> list[Any]:
                lazy = segment_lazy(volume, model)  # made anew: one that is there knows the limits of its planes
                return [np.asarray(lazy[z]) for z in range(planes)]

            works: dict[str, Callable[[int], object]] = {
                "in memory": lambda _: [model.predict_labels(np.roll(plane, 7 * z, 0)) for z in range(planes)],
                "lazily from zarr": lambda _: lazily(),
                "zarr to zarr": lambda n: segment_to_zarr(volume, model, Path(folder) / f"labels{n}.ome.zarr"),
            }
            model.predict_labels(plane)
            for number in range(VOLUME_ROUNDS):
                for way, work in works.items():
                    seconds[way].append(_seconds(lambda work=work, n=number: work(n), device))  # type: ignore[misc]
    millions = planes * side * side / 1e6
    return [
        VolumeSpeed(
            planes,
            side,
            way,
            round(millions / statistics.median(taken), 3),
            round(statistics.median(a / b for a, b in zip(seconds["in memory"], taken, strict=True)), 3),
        )
        for way, taken in seconds.items()
    ]


# -- the report --------------------------------------------------------------------------------------------


def speed_table(report: SpeedReport) -> str:
    """Tables in Markdown, and what they were measured on."""
    plan = report.plan
    memory = {m.case: m.mb for m in report.memories}
    planes = [
        [
            t.case.title,
            f"{t.case.side} x {t.case.side}",
            f"{t.ratio:.2f}",
            f"{t.ms:.1f}",
            f"{t.least_ms:.1f}",
            f"{memory[t.case]:.0f}" if t.case in memory else "",
        ]
        for t in sorted(report.timings, key=lambda t: t.case.side != plan.side)
    ]
    volumes = [
        [v.way, f"{v.planes} x {v.side} x {v.side}", f"{v.megavoxels_per_second:.2f}", f"{v.ratio:.2f}"]
        for v in report.volumes
    ]
    parts = [
        markdown(["", "plane", "x backbone", "ms, median", "ms, least", "MB"], planes),
        markdown(["volume, student of 1 class", "voxels", "megavoxels/s", "x in memory"], volumes),
        f"Measured on {report.machine}; backbone {plan.backbone}, float32. All were timed in turn, {plan.rounds} "
        f"rounds (what takes over {SLOW:g} s: {FEW}; volumes: {VOLUME_ROUNDS}); ratios are medians of those of each "
        "round, so where the machine had other work only they can be read. MB: for one plane, above torch and the "
        "backbone, in a process of its own.",
        *(f"Not measured: {text}." for text in report.skipped),
    ]
    return "\n\n".join(parts)


def _load(name: str, device: Device) -> Backbone:
    """A backbone with its packaged weights, or random ones where they would have to be downloaded."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        backbone = load_backbone(name, "packaged" if name not in SPECS or SPECS[name].package else "random")
    return backbone.to(device.torch)


def _room(device: Device) -> float:
    """Bytes that may be filled: nine tenths of what is free now."""
    if device.kind == "cuda":
        return 0.9 * torch.cuda.mem_get_info(device.torch)[0]
    with suppress(OSError, IndexError):
        text = Path("/proc/meminfo").read_text()
        return 0.9 * 1024 * int(text.split("MemAvailable:")[1].split()[0])
    return 4e9
