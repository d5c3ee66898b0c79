"""Every command of the command line: what it writes, what it says, and how it ends."""

import json
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import fields
from fractions import Fraction
from importlib.resources import files
from pathlib import Path

import numpy as np
import pytest
import tifffile
import zarr
from PIL import Image

from distillfss_core import DistillSettings, SettingsError, generate_sample, load_support
from distillfss_core.cli.console import ERROR, FINE, INTERRUPTED, USAGE
from distillfss_core.cli.distill import _unlabeled_images
from distillfss_core.cli.main import build_parser, main
from distillfss_core.errors import WeightsUnavailableError
from distillfss_core.io.images import read_image, read_stack
from distillfss_core.io.labels import read_labels
from distillfss_core.io.writing import write_labels
from distillfss_core.models.segmenter import Segmenter
from distillfss_core.models.student import StudentModel
from distillfss_core.nn.backbones import load_backbone
from distillfss_core.support.unlabeled import load_unlabeled
from distillfss_core.training import DistillRun
from volumes import write_ome_zarr

GUIDED = ["--foundation=lcnet_050"]
FEW = ["--steps=3", "--crops=4", "--queries=1", "--shots=1", "--crop-size=64", "--zoom=1", "--device=cpu"]


@pytest.fixture(scope="module", autouse=True)
def halos_are_not_measured():
    """To measure a halo takes longer than such a small training; the tests of models and trainings do it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Segmenter, "fit_halo", lambda self, image: None)
        yield


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """images/ of 4 planes, labels/ of two of them, stack.tif and stack_labels.tif, and a model made from them."""
    folder = tmp_path_factory.mktemp("data")
    sample = generate_sample(planes=4, size=96)
    for name in ("images", "labels"):
        (folder / name).mkdir()
    for z, plane in enumerate(sample.image):
        write_labels(folder / "images" / f"plane_{z}.tif", plane)
    for z in (0, 2):
        write_labels(folder / "labels" / f"plane_{z}_mask.tif", sample.labels[z])
    write_labels(folder / "stack.tif", sample.image)
    write_labels(folder / "stack_labels.tif", sample.labels)
    arguments = ["distill", folder / "images", folder / "labels", "-o", folder / "model.safetensors"]
    assert main([*map(str, arguments), *FEW, "--steps=12"]) == FINE
    return folder


@pytest.fixture
def here(data, tmp_path, monkeypatch):
    """The current folder: a copy of the data that a test may change."""
    shutil.copytree(data, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(*arguments: str) -> int:
    return main(list(arguments))


def json_of(capsys, *arguments: str):
    assert run(*arguments, "--json") == FINE
    return json.loads(capsys.readouterr().out)


def error_of(capsys, *arguments: str, code: int = ERROR) -> str:
    """The one line on stderr with which a command fails."""
    capsys.readouterr()
    assert run(*arguments) == code
    said = capsys.readouterr()
    assert said.out == ""
    lines = said.err.splitlines()
    assert len(lines) == 1, said.err
    assert lines[0].startswith("distillfss: error: ")
    return lines[0]


def python(*arguments: str, root, **options) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(root / "src")}
    return subprocess.run(
        [sys.executable, *arguments], env=environment, capture_output=True, text=True, check=False, **options
    )


# the parser


def test_help_and_a_wrong_option_need_no_torch(root):
    code = (
        "import sys; from distillfss_core.cli.main import main; "
        "print(main(['distill', '--help']), main(['distill', '--nonsense']), 'torch' in sys.modules)"
    )
    done = python("-c", code, root=root)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "0 2 False"


def test_the_version_is_printed(capsys):
    import distillfss_core

    assert run("--version") == FINE
    assert capsys.readouterr().out == f"distillfss {distillfss_core.__version__}\n"


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["paint"],
        ["distill", "a", "b"],
        ["distill", "a", "b", "-o", "m", "--steps", "many"],
        ["distill", "a", "b", "-o", "m", "--method", "magic"],
        ["distill", "a", "b", "-o", "m", "--planes", "1,x"],
        ["distill", "a", "b", "-o", "m", "--classes", "a,a"],
        ["distill", "a", "b", "-o", "m", "--pixel-size", "0,1"],
        ["distill", "a", "b", "-o", "m", "--threads", "0"],
        ["distill", "a", "b", "-o", "m", "--step", "3"],
        ["segment", "a", "-o", "b"],
    ],
)
def test_wrong_usage_is_one_line_and_code_2(capsys, arguments):
    assert "--help" in error_of(capsys, *arguments, code=USAGE)


@pytest.mark.parametrize("setting", fields(DistillSettings), ids=lambda s: s.name)
@pytest.mark.parametrize("command", [["distill", "a", "b", "-o", "m"], ["demo"]], ids=lambda c: c[0])
def test_every_setting_has_an_option_of_its_kind(command, setting):
    value = setting.metadata["choices"][-1] if "choices" in setting.metadata else setting.default
    args = build_parser().parse_args([*command, f"--{setting.name.replace('_', '-')}={value}"])
    assert getattr(args, setting.name) == value
    assert type(getattr(args, setting.name)) is type(setting.default)
    assert setting.name not in build_parser().parse_args(command)


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("--zoom=1/2", Fraction(1, 2)),
        ("--zoom=2", Fraction(2)),
        ("--invert-prob=0.25", 0.25),
        ("--validation-slice=none", None),
        ("--validation-slice=3", 3),
    ],
)
def test_settings_are_values_and_not_text(option, value):
    args = build_parser().parse_args(["distill", "a", "b", "-o", "m", option])
    parsed = vars(args)[option[2:].partition("=")[0].replace("-", "_")]
    assert parsed == value
    assert type(parsed) is type(value)


def test_a_preset_sets_the_four_forms_and_is_refused_beside_a_start(here, capsys):
    assert run("distill", "stack.tif", "stack_labels.tif", "-o", "new.safetensors", *FEW, "--preset=published") == FINE
    settings = StudentModel.load("new.safetensors").training["settings"]
    assert {settings[name] for name in ("student", "decoder", "teacher", "loss")} == {"published"}
    again = ["distill", "stack.tif", "stack_labels.tif", "-o", "again.safetensors", *FEW]
    assert "--init-from" in error_of(capsys, *again, "--preset=published", "--init-from=new.safetensors")
    assert not (here / "again.safetensors").exists()


def test_a_size_stands_for_a_backbone_and_is_refused_beside_another_one(here, capsys):
    command = ["distill", "stack.tif", "stack_labels.tif", "-o", "fast.safetensors", *FEW, "--size=fast"]
    assert "--size fast does not go with --backbone resnet18" in error_of(capsys, *command, "--backbone=resnet18")
    assert run(*command) == FINE
    fast = StudentModel.load("fast.safetensors")
    assert fast.backbone.spec.name == "lite0_compact"
    assert fast.training["head"].startswith("lite0-compact")
    again = ["distill", "stack.tif", "stack_labels.tif", "-o", "again.safetensors", *FEW]
    assert "--init-from" in error_of(capsys, *again, "--size=balanced", "--init-from=fast.safetensors")
    head = str(files("distillfss_core") / "weights" / "lite0_compact.safetensors")
    error = error_of(capsys, *again, "--size=balanced", f"--head={head}")
    assert "--size balanced does not go with --head" in error
    assert "lite0_compact" in error


@pytest.mark.parametrize(
    ("option", "code"),
    [
        ("--steps=-1", ERROR),
        ("--crop-size=33", ERROR),
        ("--learning-rate=nan", ERROR),
        ("--validation-slice=all", USAGE),
        ("--zoom=7", USAGE),
        ("--invert-prob=2", USAGE),
    ],
)
def test_a_setting_outside_its_limits_is_an_error(here, capsys, option, code):
    name = option[2:].partition("=")[0].replace("-", "_")
    arguments = ["distill", "stack.tif", "stack_labels.tif", "-o", "new.safetensors", *FEW, option]
    assert name in error_of(capsys, *arguments, code=code)
    assert not (here / "new.safetensors").exists()


# distill


def test_distill_says_what_it_made(here, capsys):
    assert run("distill", "images", "labels", "-o", "new.safetensors", *FEW) == FINE
    said = capsys.readouterr()
    assert "new.safetensors" in said.out
    assert "3 steps" in said.out
    assert said.out.endswith("; no IoU to expect, as its zoom was given\n")
    assert said.err == "distillfss: warning: 2 of 4 images in images have no label file; left out\n"
    assert StudentModel.load("new.safetensors").training["support"] == ["plane_0.tif", "plane_2.tif"]


def test_the_options_of_distill_reach_the_model(here, capsys):
    card = json_of(
        capsys,
        *("distill", "stack.tif", "stack_labels.tif", "-o", "new.safetensors", *FEW),
        *("--planes=0,3", "--pixel-size=0.5,0.25", "--seed=7", "--width=16", "--method=direct", "--threads=1"),
    )
    assert card["training"]["support"] == ["stack.tif plane 0", "stack.tif plane 3"]
    assert card["pixel_size_um"] == [0.5, 0.25]
    assert card["head"]["width"] == 16
    assert card["training"]["settings"]["seed"] == 7
    assert card["training"]["method"] == "direct"
    assert card["bytes"] == (here / "new.safetensors").stat().st_size


def test_distill_learns_from_images_without_labels(here, capsys, monkeypatch):
    read = []

    def note(*args, **options):
        read.append(load_unlabeled(*args, **options))
        return read[-1]

    monkeypatch.setattr("distillfss_core.support.unlabeled.load_unlabeled", note)
    monkeypatch.setattr(
        "distillfss_core.training.distillation.load_backbone", lambda name: load_backbone(name, "random")
    )
    planes = read_stack("stack.tif")
    for images, labels, options in (("images", "labels", []), ("stack.tif", "stack_labels.tif", ["--planes=0,2"])):
        card = json_of(
            capsys, "distill", images, labels, "-o", "new.safetensors", "--overwrite", *FEW, *GUIDED, *options
        )
        assert (card["training"]["unlabeled"], card["training"]["foundation"]) == (2, "lcnet_050")
        assert all(np.array_equal(image.pixels, planes[z]) for image, z in zip(read[-1], (1, 3), strict=True))
        assert card["training"]["steps"] == 4  # and half of the three again

    made = ("distill", "images", "labels", "-o", "new.safetensors", "--overwrite", *FEW)
    read.clear()
    for options in (["--unlabeled=none", *GUIDED], ["--method=probe", *GUIDED], []):
        assert "unlabeled" not in json_of(capsys, *made, *options)["training"]
    assert not read
    assert run(*made, "--method=probe", *GUIDED) == FINE
    assert "foundation lcnet_050 is not used: method probe learns from the slices alone" in capsys.readouterr().err
    assert run(*made, "--method=probe", "--unlabeled=stack.tif") == ERROR
    assert "--unlabeled stack.tif does not go with method probe" in capsys.readouterr().err
    assert not read
    card = json_of(capsys, *made, "--unlabeled=stack.tif")["training"]
    assert card["unlabeled"] == 2  # the others are annotated
    assert "foundation" not in card
    assert run(*made, "--unlabeled=nowhere") == ERROR
    assert "nowhere: no such file or folder" in capsys.readouterr().err


def test_images_without_labels_are_opened_as_the_annotated_ones_are(here):
    planes = read_stack("stack.tif")
    two = np.stack([planes * 0, planes], 1)
    tifffile.imwrite("two.ome.tif", two, photometric="minisblack", metadata={"axes": "ZCYX"})
    options = ["--unlabeled=two.ome.tif", "--channel=1"]
    args = build_parser().parse_args(["distill", "stack.tif", "stack_labels.tif", "-o", "m", *options])
    images = _unlabeled_images(args, DistillSettings(), load_support("stack.tif", "stack_labels.tif", planes=[0, 2]))
    assert [image.pixels.tolist() for image in images] == [planes[1].tolist(), planes[3].tolist()]


def test_single_files_and_named_classes(here, capsys):
    labels = np.zeros((96, 96), np.uint8)
    labels[20:50, 20:50], labels[60:80, 60:90] = 1, 2
    write_labels("two.png", labels)
    arguments = ("distill", "images/plane_0.tif", "two.png", "-o", "new.safetensors", *FEW)
    assert json_of(capsys, *arguments, "--classes=nucleus, debris")["classes"] == ["nucleus", "debris"]
    assert json_of(capsys, *arguments, "--overwrite")["classes"] == ["object"]


def test_scribbles_leave_pixels_out(here, capsys):
    labels = np.zeros((96, 96), np.uint8)
    labels[10:20, 10:90], labels[60:62, 60:80] = 1, 2
    write_labels("scribbles.tif", labels)
    card = json_of(
        capsys, "distill", "images/plane_0.tif", "scribbles.tif", "-o", "new.safetensors", *FEW, "--scribbles"
    )
    assert card["training"]["support_shares"] == pytest.approx([800 / 840, 40 / 840], abs=1e-5)


def test_files_of_one_volume_are_learned_from_as_a_stack_is(here, capsys):
    separate, together = (
        json_of(capsys, "distill", "images", "labels", "-o", "new.safetensors", *FEW, *more)
        for more in ([], ["--same-volume", "--overwrite"])
    )
    assert [card["preprocess"]["scope"] for card in (separate, together)] == ["image", "volume"]


def test_without_backbone_is_smaller_and_segments_the_same(here, capsys):
    as_before = ("distill", "images", "labels", *FEW, "--steps=12")
    assert run(*as_before, "-o", "without.safetensors", "--without-backbone") == FINE
    assert (here / "without.safetensors").stat().st_size < 0.5 * (here / "model.safetensors").stat().st_size
    for name in ("model", "without"):
        assert run("segment", "stack.tif", "-m", f"{name}.safetensors", "-o", f"{name}.tif") == FINE
    np.testing.assert_array_equal(read_stack("model.tif"), read_stack("without.tif"))
    capsys.readouterr()
    assert run("info", "without.safetensors", "--engine=torch") == FINE
    printed = capsys.readouterr().out
    assert "not in the file" in printed
    assert "torch float32 on cpu: the engine was given" in printed
    assert "random" in error_of(
        capsys, "distill", "images", "labels", "-o", "new.safetensors", "--without-backbone", "--weights=random"
    )


def test_info_explains_the_engine_and_times_nothing(here, capsys, monkeypatch):
    def timed(*_: object) -> None:
        raise AssertionError("an engine was timed")

    monkeypatch.setattr("distillfss_core.models.calibration._iter_times", timed)
    (line,) = json_of(capsys, "info", "model.safetensors", "--device=cpu", "--precision=float32")["engine"]
    assert " float32 on cpu: the " in line
    refused = error_of(capsys, "info", "model.safetensors", "--device=cpu", "--precision=int8", "--engine=torch")
    assert "engine torch does not compute in int8" in refused

    def gone(*_: object) -> None:
        raise WeightsUnavailableError("no package")

    monkeypatch.setattr("distillfss_core.models.student.backbone_from_state", gone)
    (line,) = json_of(capsys, "info", "model.safetensors")["engine"]
    assert line == "not known without the weights of the backbone (no package)"


def test_a_model_to_start_from_keeps_its_form(here, capsys):
    arguments = ("distill", "images", "labels", "-o", "new.safetensors", "--init-from=model.safetensors")
    few = [option for option in FEW if not option.startswith("--zoom")]
    before = StudentModel.load("model.safetensors")
    card = json_of(capsys, *arguments, *few)
    after = StudentModel.load("new.safetensors")
    assert card["head"] == before.card["head"]
    assert card["training"]["settings"]["zoom"] == before.preprocess.zoom
    changed = [n for n, v in after.head.state_dict().items() if not v.equal(before.head.state_dict()[n])]
    assert any(name.startswith("student.") for name in changed)
    assert "--width 16 does not go with --init-from" in error_of(capsys, *arguments, *few, "--width=16", "--overwrite")


def test_an_output_that_cannot_be_written_is_found_before_the_training(here, capsys, monkeypatch):
    def no_training(*_, **__):
        raise AssertionError("the training began")

    monkeypatch.setattr("distillfss_core.training.iter_distill", no_training)
    arguments = ("distill", "images", "labels", "-o")
    assert "there is no folder" in error_of(capsys, *arguments, "missing/model.safetensors")
    assert "it is a folder" in error_of(capsys, *arguments, "labels")
    assert "is no image" in error_of(capsys, *arguments, "stack.tif")
    assert "write elsewhere" in error_of(capsys, *arguments, "/proc/model.safetensors")
    with pytest.raises(AssertionError, match="began"):
        run(*arguments, "model.safetensors", "--overwrite")


def interrupt_at(step: int, monkeypatch) -> None:
    """Ctrl-C within the training step after this one."""
    original = DistillRun.__next__

    def one_step(self):
        if self.taken == step:
            signal.raise_signal(signal.SIGINT)
        current = original(self)
        self.taken += not current.is_preparation
        return current

    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs start with it ignored
    monkeypatch.setattr(DistillRun, "taken", 0, raising=False)
    monkeypatch.setattr(DistillRun, "__next__", one_step)


def test_an_interrupted_training_saves_the_best_so_far(here, capsys, monkeypatch):
    interrupt_at(2, monkeypatch)
    assert run("distill", "stack.tif", "stack_labels.tif", "-o", "new.safetensors", *FEW) == INTERRUPTED
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert "interrupted at step 2 of 3" in err
    assert "new.safetensors" in err
    model = StudentModel.load("new.safetensors")
    assert model.training["steps"] == 2
    assert model.predict_labels(read_image("images/plane_1.tif")).shape == (96, 96)


def test_an_interrupt_before_the_first_step_saves_nothing(here, capsys, monkeypatch):
    old = (here / "model.safetensors").read_bytes()
    interrupt_at(0, monkeypatch)
    arguments = ("distill", "stack.tif", "stack_labels.tif", "-o", "model.safetensors", "--overwrite", *FEW)
    assert run(*arguments) == INTERRUPTED
    assert capsys.readouterr().err == "distillfss: interrupted before the first step; nothing was saved\n"
    assert (here / "model.safetensors").read_bytes() == old


def test_an_interrupted_demo_ends_without_a_traceback(here, capsys, monkeypatch):
    interrupt_at(1, monkeypatch)
    assert run("demo", "--data", "stack.tif", "stack_labels.tif", *FEW) == INTERRUPTED
    assert capsys.readouterr().err == "distillfss: interrupted\n"


# segment


def test_a_folder_gives_a_folder_of_the_same_stems(here, capsys):
    assert run("segment", "images", "-m", "model.safetensors", "-o", "out") == FINE
    assert capsys.readouterr().err == ""
    assert sorted(p.name for p in (here / "out").iterdir()) == [f"plane_{z}.tif" for z in range(4)]
    model = StudentModel.load("model.safetensors")
    for z in range(4):
        labels = read_labels(f"out/plane_{z}.tif")
        assert labels.dtype == np.uint8
        np.testing.assert_array_equal(labels, model.predict_labels(read_image(f"images/plane_{z}.tif")))


def test_a_stack_gives_a_stack_with_probabilities_and_uncertainty(here, capsys):
    assert (
        run("segment", "stack.tif", "-m", "model.safetensors", "-o", "out.tif", "--probabilities", "--uncertainty") == 0
    )
    model = StudentModel.load("model.safetensors")
    labels = read_stack("out.tif")
    probabilities = tifffile.imread("out_probabilities.tif")
    uncertainty = read_stack("out_uncertainty.tif")
    for z, plane in enumerate(read_stack("stack.tif")):
        expected = model.predict(plane)
        np.testing.assert_array_equal(labels[z], expected.labels)
        np.testing.assert_allclose(probabilities[z], expected.probabilities, atol=1e-6)
        np.testing.assert_allclose(uncertainty[z], expected.uncertainty, atol=1e-6)
    with tifffile.TiffFile("out_probabilities.tif") as file:
        assert [(s.axes, s.shape, s.dtype) for s in file.series] == [("ZCYX", (4, 2, 96, 96), np.float32)]
    with tifffile.TiffFile("out.tif") as file:
        assert [(s.axes, s.shape, s.dtype) for s in file.series] == [("ZYX", (4, 96, 96), np.uint8)]
        assert file.pages[0].compression == tifffile.COMPRESSION.ADOBE_DEFLATE


def test_extras_of_a_folder_lie_in_folders_of_their_own_so_that_evaluate_works(here, capsys):
    assert run("segment", "images", "-m", "model.safetensors", "-o", "out", "--probabilities", "--uncertainty") == FINE
    model = StudentModel.load("model.safetensors")
    expected = model.predict(read_image("images/plane_1.tif"))
    np.testing.assert_allclose(tifffile.imread("out/probabilities/plane_1.tif"), expected.probabilities, atol=1e-6)
    np.testing.assert_allclose(tifffile.imread("out/uncertainty/plane_1.tif"), expected.uncertainty, atol=1e-6)
    assert run("evaluate", "out", "labels") == FINE


def test_an_image_gives_an_image_of_the_kind_asked_for(here, capsys):
    plane = read_image("images/plane_0.tif")
    Image.fromarray((plane // 16).astype(np.uint8)).save("plane.png")
    assert run("segment", "plane.png", "-m", "model.safetensors", "-o", "out.png") == FINE
    assert read_labels("out.png").shape == (96, 96)
    assert "a PNG holds one plane" in error_of(capsys, "segment", "stack.tif", "-m", "model.safetensors", "-o", "s.png")
    assert not (here / "s.png").exists()


def test_a_pixel_size_zooms_as_the_model_needs(here, capsys):
    model = StudentModel.load("model.safetensors")
    segment = ("segment", "images/plane_0.tif", "-m", "sized.safetensors", "--pixel-size=0.25,0.25", "-o")
    model.save("sized.safetensors")
    assert "pixel size" in error_of(capsys, *segment, "out.tif")
    model.pixel_size = (0.5, 0.5)
    model.save("sized.safetensors")
    assert run(*segment, "out.tif") == FINE
    expected = model.at_pixel_size((0.25, 0.25)).predict_labels(read_image("images/plane_0.tif"))
    np.testing.assert_array_equal(read_labels("out.tif"), expected)
    assert (expected != model.predict_labels(read_image("images/plane_0.tif"))).any()


def test_test_time_augmentation_is_an_option(here):
    assert (
        run("segment", "images/plane_0.tif", "-m", "model.safetensors", "-o", "out.tif", "--tta", "--probabilities")
        == FINE
    )
    model = StudentModel.load("model.safetensors")
    plain, augmented = (m.predict(read_image("images/plane_0.tif")).probabilities for m in (model, model.with_tta()))
    written = tifffile.imread("out_probabilities.tif")
    np.testing.assert_allclose(written, augmented, atol=1e-6)
    assert np.abs(written - plain).max() > 1e-3


def test_an_array_file_may_be_an_image_or_a_stack(here):
    stack = read_stack("stack.tif")
    np.save("stack.npy", stack)
    np.save("rgb.npy", np.repeat(stack[0][..., None], 3, axis=2))
    assert run("segment", "stack.npy", "-m", "model.safetensors", "-o", "stack_out.tif") == FINE
    assert run("segment", "rgb.npy", "-m", "model.safetensors", "-o", "rgb_out.tif") == FINE
    assert read_stack("stack_out.tif").shape == (4, 96, 96)
    np.testing.assert_array_equal(read_labels("rgb_out.tif"), read_stack("stack_out.tif")[0])


def test_results_are_not_overwritten_unless_asked(here, capsys):
    (here / "out").mkdir()
    (here / "out" / "plane_1.tif").write_bytes(b"mine")
    arguments = ("segment", "images", "-m", "model.safetensors", "-o", "out")
    assert "--overwrite" in error_of(capsys, *arguments)
    assert (here / "out" / "plane_1.tif").read_bytes() == b"mine"
    assert not (here / "out" / "plane_0.tif").exists()
    assert run(*arguments, "--overwrite") == FINE
    assert read_labels("out/plane_1.tif").shape == (96, 96)


@pytest.mark.parametrize(
    ("source", "out"),
    [
        ("images", "images"),
        ("images", "images/../images"),
        ("stack.tif", "stack.tif"),
        ("images", "stack.tif"),
        ("images", "new.tif"),
        ("stack.tif", "images"),
        ("stack.tif", "out"),
        ("stack.tif", "out.safetensors"),
        ("stack.tif", "missing/out.tif"),
        ("images", "missing/out"),
        ("missing.tif", "out.tif"),
        ("labels/none", "out"),
    ],
)
def test_outputs_that_make_no_sense_are_refused_and_nothing_is_touched(here, capsys, source, out):
    before = {p: p.read_bytes() for p in here.rglob("*") if p.is_file()}
    error_of(capsys, "segment", source, "-m", "model.safetensors", "-o", out, "--overwrite")
    assert {p: p.read_bytes() for p in here.rglob("*") if p.is_file()} == before


@pytest.mark.parametrize("out", ["labels.tif", "labels"])
def test_a_volume_is_no_folder_of_images(here, capsys, out):
    write_ome_zarr(Path("x.ome.zarr"), np.zeros((2, 8, 8), np.uint8))
    Path("labels").mkdir(exist_ok=True)
    said = error_of(capsys, "segment", "x.ome.zarr", "-m", "model.safetensors", "-o", out)
    assert f"{out} is no name for its labels: x.ome.zarr is a volume; end OUT in .ome.zarr" in said


def test_what_is_left_out_of_a_folder_is_said(here, capsys):
    (here / "images" / "notes.txt").write_text("x")
    (here / "images" / ".hidden").write_text("x")
    assert run("segment", "images", "-m", "model.safetensors", "-o", "out") == FINE
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert "1 file(s) of other kinds" in err
    assert "notes.txt" in err


def test_one_damaged_file_does_not_stop_the_others(here, capsys):
    (here / "images" / "plane_1.tif").write_bytes(b"II*\0nonsense")
    assert run("segment", "images", "-m", "model.safetensors", "-o", "out", "--json") == ERROR
    said = capsys.readouterr()
    assert json.loads(said.out)["failed"] == 1
    assert said.err.count("\n") == 1
    assert "plane_1.tif" in said.err
    assert sorted(p.name for p in (here / "out").iterdir()) == ["plane_0.tif", "plane_2.tif", "plane_3.tif"]


def test_two_images_of_one_stem_are_refused(here, capsys):
    shutil.copy("images/plane_0.tif", "images/plane_0.ome.tif")
    assert "same stem" in error_of(capsys, "segment", "images", "-m", "model.safetensors", "-o", "out")


@pytest.mark.parametrize("damage", ["missing", "truncated", "flipped", "empty", "other", "folder"])
def test_a_model_file_that_is_none_is_an_error(here, capsys, damage):
    path = here / "broken.safetensors"
    whole = (here / "model.safetensors").read_bytes()
    if damage == "folder":
        path.mkdir()
    elif damage != "missing":
        middle = len(whole) // 2
        flipped = whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1 :]
        path.write_bytes({"truncated": whole[:-100], "flipped": flipped, "empty": b"", "other": b"II*\0" * 9}[damage])
    assert "broken.safetensors" in error_of(capsys, "segment", "stack.tif", "-m", str(path), "-o", "out.tif")
    assert not (here / "out.tif").exists()


def test_a_device_that_is_not_there_is_an_error(here, capsys):
    assert "cuda:99" in error_of(
        capsys, "segment", "stack.tif", "-m", "model.safetensors", "-o", "out.tif", "--device=cuda:99"
    )


# evaluate


def test_evaluate_counts_as_one_would_by_hand(here, capsys):
    (here / "found").mkdir()
    (here / "true").mkdir()
    a, b = np.zeros((2, 10, 10), np.uint8)
    a[:4], b[2:4] = 1, 1  # 40 found, 20 true, 20 both
    write_labels("found/a.tif", a)
    write_labels("true/a_mask.png", b * 255)
    write_labels("found/b.tif", b)
    write_labels("true/b_mask.png", b * 7)
    result = json_of(capsys, "evaluate", "found", "true")
    assert result["images"]["a.tif"]["object"] == {"iou": 0.5, "dice": 2 * 20 / 60, "precision": 0.5, "recall": 1.0}
    assert result["images"]["b.tif"]["object"]["iou"] == 1.0
    assert result["pooled"]["object"]["iou"] == result["iou"] == pytest.approx(40 / 60)
    assert result["mean"]["object"]["iou"] == 0.75
    assert run("evaluate", "found", "true") == FINE
    table = capsys.readouterr().out
    assert "a.tif" in table
    assert "0.667" in table


def test_evaluate_knows_classes_scribbles_and_planes(here, capsys):
    found = np.zeros((2, 10, 10), np.uint8)
    truth = found.copy()
    found[0, :5], found[0, 5:8] = 1, 2
    truth[0, :5], truth[0, 5:] = 1, 2
    write_labels("found.tif", found)
    write_labels("true.tif", truth)
    result = json_of(capsys, "evaluate", "found.tif", "true.tif", "--classes=a,b", "--planes=0")
    assert list(result["images"]) == ["found.tif plane 0"]
    assert result["pooled"]["a"]["iou"] == 1.0
    assert result["pooled"]["b"]["recall"] == pytest.approx(3 / 5)
    both = json_of(capsys, "evaluate", "found.tif", "true.tif", "--classes=a,b")
    assert both["images"]["found.tif plane 1"]["a"]["iou"] is None
    scribbled = np.zeros((2, 10, 10), np.uint8)
    scribbled[0, 0], scribbled[0, 5] = 2, 3  # two rows annotated, both right
    write_labels("scribbles.tif", scribbled)
    seen = json_of(capsys, "evaluate", "found.tif", "scribbles.tif", "--classes=a,b", "--scribbles")
    assert seen["iou"] == 1.0
    assert "plane 5" in error_of(capsys, "evaluate", "found.tif", "true.tif", "--planes=5")


def test_evaluate_names_what_does_not_fit(here, capsys):
    write_labels("small.tif", np.zeros((5, 5), np.uint8))
    write_labels("large.tif", np.zeros((6, 5), np.uint8))
    assert "small.tif: the prediction has shape" in error_of(capsys, "evaluate", "small.tif", "large.tif")
    assert "small.tif has 1 plane(s)" in error_of(capsys, "evaluate", "small.tif", "stack_labels.tif")
    assert "no such file" in error_of(capsys, "evaluate", "small.tif", "missing.tif")
    write_labels("three.tif", np.full((5, 5), 3, np.uint8))
    assert "three.tif" in error_of(capsys, "evaluate", "small.tif", "three.tif", "--classes=a,b")


# info, backbones, demo


def test_info_prints_the_card(here, capsys):
    card = json_of(capsys, "info", "model.safetensors")
    del card["bytes"], card["backbone_inside"], card["engine"]
    assert card == json.loads(json.dumps(StudentModel.load("model.safetensors").card))
    assert run("info", "model.safetensors") == FINE
    text = capsys.readouterr().out
    for part in ("efficientnet_lite0", "1 object", "12 steps", "plane_0.tif, plane_2.tif", "in the file", "not given"):
        assert part in text
    assert "stack.tif" in error_of(capsys, "info", "stack.tif")


@pytest.mark.parametrize(
    ("training", "text"),
    [
        ({"expected_iou": 0.714, "no_expectation": None}, "IoU 0.71 ± 0.15 expected on new slices of these kinds"),
        ({"expected_iou": None, "no_expectation": "it learned from one slice"}, "no IoU to expect, as it learned from"),
        ({}, None),
    ],
)
def test_info_states_the_iou_to_expect_or_why_there_is_none(here, capsys, training, text):
    model = StudentModel.load("model.safetensors")
    for name in ("expected_iou", "no_expectation"):
        model.training.pop(name, None)
    model.training.update(training)
    model.save("other.safetensors")
    assert run("info", "other.safetensors") == FINE
    said = [line for line in capsys.readouterr().out.splitlines() if line.startswith("quality")]
    assert [text in line for line in said] == ([True] if text else [])


def test_backbones_lists_all_and_says_which_is_here(capsys):
    from distillfss_core import SPECS

    listed = json_of(capsys, "backbones")
    assert [b["name"] for b in listed] == list(SPECS)
    assert run("backbones") == FINE
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(SPECS) + 1
    assert "(default)" in lines[1]
    assert "installed" in lines[1]


def test_the_demo_learns_and_writes_what_it_says(here, capsys):
    demo = ("demo", "-o", "out", "--planes=4", "--size=96", "--supports=2", *FEW, "--crop-size=96", "--steps=25")
    report = json_of(capsys, *demo)
    assert report["supports"] == ["plane 00", "plane 03"]
    assert report["queries"] == ["plane 01", "plane 02"]
    assert [s["name"] for s in report["scores"]] == ["prototype teacher", "teacher", "student"]
    assert report["steps"] == 25
    assert len(report["files"]) == 6
    assert all((here / file).stat().st_size > 0 for file in report["files"])
    # The figure reported is that of the files written, counted anew.
    truth = read_stack("out/stack_truth.tif")[1:3] > 0
    found = np.stack([read_labels(f"out/segmented/plane_0{z}.tif") for z in (1, 2)]) > 0
    iou = (truth & found).sum() / (truth | found).sum()
    assert report["scores"][-1]["iou"] == pytest.approx(iou)
    assert iou > 0.4
    assert Image.open("out/demo.png").width > 1000


def test_the_demo_runs_on_own_data_and_prints_a_table(here, capsys):
    (here / "mine").mkdir()
    shutil.move("images", "mine/images")
    shutil.move("labels", "mine/labels")
    assert run("demo", "--data", "mine", *FEW, "--method=direct") == FINE
    said = capsys.readouterr()
    assert "learned from plane_0.tif" in said.out
    assert "judged on plane_2.tif" in said.out
    assert "student" in said.out
    assert read_labels("distillfss-demo/segmented/plane_2.tif").shape == (96, 96)
    assert "no folders images and labels" in error_of(capsys, "demo", "--data", "distillfss-demo")
    one = ("mine/images/plane_0.tif", "mine/labels/plane_0_mask.tif")
    assert "holds 1 labeled slice" in error_of(capsys, "demo", "--data", *one)


def test_own_data_of_the_demo_may_be_volumes(here):
    from distillfss_core.demo import own_data

    stacks = {name: read_stack(f"{name}.tif") for name in ("stack", "stack_labels")}
    for name, stack in stacks.items():
        zarr.save_array(f"{name}.zarr", stack)
    data = own_data("stack.zarr", "stack_labels.zarr", supports=2)
    assert [q.source for q in data.queries] == ["stack.zarr plane 3"]
    assert data.support.planes_of_one_volume
    np.testing.assert_array_equal(data.queries[0].image, stacks["stack"][3])


@pytest.mark.parametrize("option", ["--planes=4", "--size=96", "--sample=nuclei"])
def test_options_of_generated_data_are_refused_beside_own_data(here, capsys, option):
    said = error_of(capsys, "demo", "--data", "stack.tif", "stack_labels.tif", option)
    assert "--planes, --size and --sample are for generated data" in said


@pytest.mark.parametrize(
    "arguments", [["--supports=12"], ["--size=8"], ["--classes=a"], ["--data", "a", "b", "c"], ["-o", "/proc/x"]]
)
def test_a_demo_that_cannot_be_is_an_error(here, capsys, arguments):
    error_of(capsys, "demo", "--planes=2", "--size=64", "--supports=1", *FEW, *arguments)


def test_the_demo_may_be_called_from_python(here):
    from distillfss_core.demo import own_data, run_demo

    few = DistillSettings(steps=2, crops=4, queries=1, shots=1, crop_size=64, zoom=Fraction(1), device="cpu")
    report = run_demo(own_data("stack.tif", "stack_labels.tif", supports=2), "out", few)
    assert report.queries == ("stack.tif plane 3",)
    assert report.files[-1] == os.path.join("out", "segmented", "stack_plane_3.tif")
    with pytest.raises(SettingsError, match="supports is 0"):
        own_data("stack.tif", "stack_labels.tif", supports=0)


# the process


def test_a_process_ends_with_the_code_and_one_line(here, root):
    done = python("-m", "distillfss_core.cli.main", "info", "stack.tif", root=root)
    assert done.returncode == ERROR
    assert done.stdout == ""
    assert done.stderr.count("\n") == 1
    assert done.stderr.startswith("distillfss: error: stack.tif")


def test_a_damaged_tiff_is_one_line_in_a_process(here, root):
    """tifffile says things of its own about damaged files, which pytest would swallow."""
    whole = (here / "stack.tif").read_bytes()
    (here / "short.tif").write_bytes(whole[: len(whole) // 2])
    done = python("-m", "distillfss_core.cli.main", "evaluate", "short.tif", "stack_labels.tif", root=root)
    assert done.returncode == ERROR
    assert done.stderr.count("\n") == 1, done.stderr
    assert "short.tif" in done.stderr


def test_a_reader_that_stops_reading_is_no_error(here, root):
    command = f"{sys.executable} -m distillfss_core.cli.main evaluate stack_labels.tif stack_labels.tif"
    environment = {**os.environ, "PYTHONPATH": str(root / "src")}
    done = subprocess.run(
        ["bash", "-c", f"{command} | true"], env=environment, capture_output=True, text=True, check=False
    )
    assert done.stderr == ""
