"""A command without options does what the Python function without arguments does."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile

from distillfss_core.cli.main import build_parser, main
from distillfss_core.cli.options import option_flag
from distillfss_core.demo import DEMO_STEPS
from distillfss_core.settings import (
    AdapterSettings,
    BackboneSettings,
    DistillSettings,
    PretrainSettings,
    format_setting,
)
from pictures import blobs

STACK = np.stack([blobs(seed, 64).image for seed in range(3)])

SEGMENT = ["segment", "stack.tif", "-m", "m.safetensors", "-o", "out.ome.zarr"]
BATCH = ["batch", "volumes", "-m", "m.safetensors", "-o", "out"]
INSTANCES = ["instances", "labels.tif", "-o", "objects.ome.zarr"]
DISTILL = ["distill", "stack.tif", "labels.tif", "-o", "new.safetensors"]
BACKBONE = ["distill-backbone", "stack.tif", "-o", "small.safetensors"]
ADAPTER = ["distill-adapter", "stack.tif", "--sam", "sam.pth", "-o", "adapter.safetensors"]
EXPORT = ["export", "m.safetensors", "-o"]
CORE = "distillfss_core"

CASES = [
    (SEGMENT, f"{CORE}.segmentation.to_zarr", "iter_segment", {}),
    (SEGMENT, f"{CORE}.volumes.volume", "open_volume", {}),
    (SEGMENT, f"{CORE}.models.student", "StudentModel.load", {}),
    ([*SEGMENT[:-1], "out.tif"], f"{CORE}.models.student", "StudentModel.load", {}),
    ([*SEGMENT, "--cluster", "local"], f"{CORE}.segmentation.cluster", "connect", {}),
    (BATCH, f"{CORE}.segmentation.batch", "iter_batch", {}),
    (BATCH, f"{CORE}.models.student", "StudentModel.load", {}),
    (INSTANCES, f"{CORE}.objects.instances", "iter_instances", {}),
    (DISTILL, f"{CORE}.support.support_set", "load_support", {}),
    (DISTILL, f"{CORE}.training", "iter_distill", {"settings": DistillSettings()}),
    (["demo"], f"{CORE}.demo", "generated_data", {}),
    (["demo", "--data", "stack.tif", "labels.tif"], f"{CORE}.demo", "own_data", {"labels": "given"}),
    (["demo"], f"{CORE}.demo", "iter_demo", {"settings": DistillSettings(steps=DEMO_STEPS)}),
    ([*EXPORT, "m.onnx"], f"{CORE}.export.onnx", "export_onnx", {}),
    ([*EXPORT, "m.zip", "--author", "A"], f"{CORE}.export.bioimageio", "export_bioimageio", {}),
    (["pretrain", "-o", "run"], f"{CORE}.metatraining.run", "PretrainRun", {}),
    (
        BACKBONE,
        f"{CORE}.training.backbone",
        "iter_distill_backbone",
        {"settings": BackboneSettings(), "checkpoint": "given"},
    ),
    (
        ADAPTER,
        f"{CORE}.training.adapter",
        "iter_distill_adapter",
        {"settings": AdapterSettings(), "cache": "given", "checkpoint": "given"},
    ),
]


class _Called(Exception):
    """Ends a command once the function is called; the arguments that differ from its defaults."""


def recorded(original: Callable[..., Any]) -> Callable[..., Any]:
    signature = inspect.signature(original)

    def call(*values: Any, **named: Any) -> None:
        bound = signature.bind(*values, **named)
        differing = {
            name: value
            for name, value in bound.arguments.items()
            if signature.parameters[name].default is not inspect.Parameter.empty
            and signature.parameters[name].kind is not inspect.Parameter.VAR_KEYWORD
            and (str(value) if isinstance(value, Path) else value) != signature.parameters[name].default
        }
        raise _Called(differing)

    return call


@pytest.fixture
def here(tmp_path, monkeypatch, saved_model):
    """A stack, its labels, a folder of volumes and a model."""
    (tmp_path / "volumes").mkdir()
    for name in ("stack.tif", "volumes/a.tif"):
        tifffile.imwrite(tmp_path / name, STACK, photometric="minisblack", metadata={"axes": "ZYX"})
    labels = (STACK.mean() < STACK).astype(np.uint8)
    tifffile.imwrite(tmp_path / "labels.tif", labels, photometric="minisblack", metadata={"axes": "ZYX"})
    (tmp_path / "m.safetensors").symlink_to(saved_model)
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize(("command", "module", "function", "chosen"), CASES)
def test_a_command_without_options_takes_the_defaults_of_the_function(
    here, monkeypatch, command, module, function, chosen
):
    if module.startswith(f"{CORE}.objects"):
        pytest.importorskip("scipy")
    owner: Any = importlib.import_module(module)
    *classes, name = function.split(".")
    for part in classes:
        owner = getattr(owner, part)
    monkeypatch.setattr(owner, name, recorded(getattr(owner, name)))
    with pytest.raises(_Called) as call:
        main(command)
    differing = call.value.args[0]
    assert differing.keys() == chosen.keys()
    assert all(chosen[name] in (value, "given") for name, value in differing.items())


@pytest.mark.parametrize(
    ("command", "settings"),
    [
        (DISTILL, DistillSettings),
        (["demo"], DistillSettings),
        (["pretrain", "-o", "run"], PretrainSettings),
        (BACKBONE, BackboneSettings),
        (ADAPTER, AdapterSettings),
    ],
)
def test_a_setting_that_is_not_given_has_its_declared_default(command, settings):
    plain = vars(build_parser().parse_args(command))
    assert not [setting.name for setting in fields(settings) if setting.name in plain]
    for setting in fields(settings):
        typed = [option_flag(setting.name), format_setting(setting.default)]
        assert vars(build_parser().parse_args([*command, *typed]))[setting.name] == setting.default


def test_planning_the_speed_benchmark_has_the_defaults_of_its_options():
    from distillfss_core.bench.speed import Plan

    given = build_parser().parse_args(["bench", "speed"])
    assert Plan(**{setting.name: getattr(given, setting.name) for setting in fields(Plan)}) == Plan()
