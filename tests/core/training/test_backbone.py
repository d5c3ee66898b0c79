"""Distillation of a backbone: same result after a stop, a frozen teacher, and a file that students are trained on."""

from __future__ import annotations

import shutil
import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tifffile
import torch

from distillfss_core import (
    BackboneSettings,
    DistilledBackbone,
    ImageError,
    InputFileError,
    ModelFileError,
    SettingsError,
    StudentModel,
    WeightsUnavailableError,
    distill,
    distill_backbone,
    export_onnx,
    iter_distill_backbone,
    load_backbone,
    open_volume,
)
from distillfss_core.cli.console import ERROR, FINE, INTERRUPTED
from distillfss_core.cli.main import main
from distillfss_core.nn.backbones import SPECS
from distillfss_core.nn.checkpoint import read_card_file
from distillfss_core.nn.device import Device
from distillfss_core.nn.pretrained import packaged_head
from distillfss_core.training import backbone as module
from distillfss_core.training import resumable
from distillfss_core.training.backbone import CHECKPOINT_FILE
from distillfss_core.training.backbone_teacher import TeacherTokens, load_teacher
from distillfss_core.training.backbone_views import Views
from pictures import blobs

CPU = Device("cpu")
IMAGES = [blobs(seed, 96).image for seed in range(4)]
TINY = BackboneSettings(
    teacher="lcnet_050",
    teacher_weights="random",
    student="mobilenetv4_conv_small_050",
    steps=6,
    batch=4,
    size=64,
    views=2,
    device="cpu",
    precision="float32",
)

pytestmark = pytest.mark.filterwarnings("ignore:.*has random weights.*:UserWarning")


def same(one: DistilledBackbone, other: DistilledBackbone) -> bool:
    a, b = one.backbone.state(), other.backbone.state()
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def scanned(images, size: int = 64, count: int = 2, seed: int = 0) -> Views:
    views = Views(images, size, count, seed)
    for _ in views.scan():
        pass
    return views


def random_backbone(name: str, seed: int = 0):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return load_backbone(name, "random", seed=seed)


@pytest.fixture(scope="module")
def whole() -> DistilledBackbone:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return distill_backbone(IMAGES, TINY)


@pytest.fixture(scope="module")
def file(whole, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("backbone") / "small.safetensors"
    whole.save(path)
    return path


# the training


def test_steps_have_losses_of_both_passes_after_the_preparation():
    steps = list(iter_distill_backbone(IMAGES, TINY))
    assert [step.stage for step in steps] == ["images"] * 4 + ["teacher"] * 8 + ["distill"] * 6
    assert all(step.is_preparation for step in steps[:12])
    assert [step.index for step in steps[12:]] == [1, 2, 3, 4, 5, 6]
    assert all(step.losses.keys() == {"features", "mask"} for step in steps[12:])


def test_the_same_seed_gives_the_same_weights_and_another_one_others(whole):
    assert same(distill_backbone(IMAGES, TINY), whole)
    assert not same(distill_backbone(IMAGES, replace(TINY, seed=1)), whole)


@pytest.mark.parametrize("stop", [1, 3])
def test_a_training_that_was_stopped_goes_on_to_the_same_weights(tmp_path, whole, stop):
    checkpoint = tmp_path / "state.safetensors"
    run = iter_distill_backbone(IMAGES, TINY, checkpoint=checkpoint)
    for step in run:
        if step.stage == "distill" and step.index == stop:
            break
    run.close()
    rest = iter_distill_backbone(IMAGES, TINY, checkpoint=checkpoint)
    assert [step.index for step in rest if step.stage != "images"] == list(range(stop + 1, 7))
    assert same(rest.result(), whole)
    assert rest.result().card["losses"] == whole.card["losses"]


@pytest.mark.slow
def test_a_training_that_was_killed_goes_on_from_its_last_state_to_the_same_weights(tmp_path, monkeypatch, whole):
    monkeypatch.setattr(resumable, "KEEP_EVERY", -1.0)
    checkpoint, copy = tmp_path / "state.safetensors", tmp_path / "copy.safetensors"
    for step in iter_distill_backbone(IMAGES, TINY, checkpoint=checkpoint):
        if step.stage == "distill" and step.index == 2:
            shutil.copy(checkpoint, copy)
    assert read_card_file(copy, CHECKPOINT_FILE)[0]["step"] == 2
    assert same(distill_backbone(IMAGES, replace(TINY, cache_mb=0), checkpoint=copy), whole)


def test_an_error_within_a_step_leaves_the_last_whole_state(tmp_path, monkeypatch):
    checkpoint = tmp_path / "state.safetensors"
    run = iter_distill_backbone(IMAGES, TINY, checkpoint=checkpoint)
    for step in run:
        if step.stage == "distill" and step.index == 2:
            break
    run.close()
    before = checkpoint.read_bytes()
    monkeypatch.setattr(module, "mask_images", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        distill_backbone(IMAGES, TINY, checkpoint=checkpoint)
    assert checkpoint.read_bytes() == before


@pytest.mark.parametrize(
    ("images", "changes", "message"),
    [
        (IMAGES, {"learning_rate": 0.5}, r"was made with learning_rate 0.001, now it is 0.5"),
        (IMAGES[:3], {}, "was made with other images"),
        (IMAGES, {"teacher": "efficientnet_lite0"}, "was made with teacher 'lcnet_050'"),
    ],
)
def test_a_checkpoint_of_another_training_is_refused(tmp_path, images, changes, message):
    checkpoint = tmp_path / "state.safetensors"
    run = iter_distill_backbone(IMAGES, TINY, checkpoint=checkpoint)
    while next(run).stage != "distill":
        pass
    run.close()
    with pytest.raises(SettingsError, match=message):
        distill_backbone(images, replace(TINY, **changes), checkpoint=checkpoint)


def test_a_checkpoint_of_other_teacher_weights_is_refused(tmp_path):
    settings = replace(TINY, teacher_weights=str(tmp_path / "teacher.pth"))
    checkpoint = tmp_path / "state.safetensors"
    for seed, expected in ((0, None), (1, "was made with another teacher")):
        torch.save(random_backbone("lcnet_050", seed).state(), settings.teacher_weights)
        run = iter_distill_backbone(IMAGES, settings, checkpoint=checkpoint)
        if expected is None:
            while next(run).stage != "distill":
                pass
            run.close()
        else:
            with pytest.raises(SettingsError, match=expected):
                list(run)


def test_a_masked_pass_that_weighs_nothing_is_left_out(monkeypatch):
    monkeypatch.setattr(module, "mask_images", lambda *_: pytest.fail("a masked pass was run"))
    settings = replace(TINY, mask_weight=0.0, steps=2)
    losses = [step.losses for step in iter_distill_backbone(IMAGES, settings) if step.stage == "distill"]
    assert all(step.keys() == {"features"} for step in losses)


def test_half_of_the_blocks_of_half_of_the_batch_are_masked_and_statistics_stay(monkeypatch):
    seen, original = [], module.mask_images

    def record(images, masked, fill):
        seen.append(masked.clone())
        return original(images, masked, fill)

    monkeypatch.setattr(module, "mask_images", record)
    distill_backbone(IMAGES, replace(TINY, size=128, steps=2))
    first, second = seen
    assert first.shape == (4, 4, 4)  # blocks of 32 pixels
    assert first.flatten(1).sum(1).tolist() == [8, 8, 0, 0]
    assert not torch.equal(first, second)
    distill_backbone(IMAGES, replace(TINY, size=128, steps=2))
    assert torch.equal(seen[2], first)
    student = module.DistillingBackbone(random_backbone("lcnet_050")).train()
    norms = {name: value.clone() for name, value in student.state().items() if "running" in name}
    with student.statistics_kept():
        student(torch.rand(2, 3, 64, 64))
    assert all(torch.equal(student.state()[name], value) for name, value in norms.items())
    student(torch.rand(2, 3, 64, 64))
    assert not any(torch.equal(student.state()[name], value) for name, value in norms.items())


@pytest.mark.parametrize("loss", ["qsd", "mse", "cwd"])
def test_the_student_learns_everywhere_and_the_teacher_nowhere(monkeypatch, loss):
    teachers, trainings = [], []
    original, init = module.load_teacher, module._Training.__init__

    def keep(*args):
        teachers.append(original(*args))
        return teachers[-1]

    def watch(self, *args):
        init(self, *args)
        trainings.append(self)

    monkeypatch.setattr(module, "load_teacher", keep)
    monkeypatch.setattr(module._Training, "__init__", watch)
    run = iter_distill_backbone(IMAGES, replace(TINY, loss=loss))
    while next(run).stage != "distill":
        before = {n: v.clone() for n, v in teachers[0].trunk.state_dict().items()} if teachers else {}
    student = trainings[0].student
    assert [n for n, p in student.named_parameters() if p.grad is None or not p.grad.abs().max() > 0] == []
    list(run)
    after = teachers[0].trunk.state_dict()
    assert before
    assert all(torch.equal(after[name], value) for name, value in before.items())
    assert not any(p.requires_grad or p.grad is not None for p in teachers[0].parameters())
    start = random_backbone(TINY.student).state()
    assert not any(torch.equal(start[name], value) for name, value in run.result().backbone.state().items())


def test_without_a_loss_at_stride_32_the_deepest_stage_learns_nothing():
    learned = distill_backbone(IMAGES, replace(TINY, strides="16", steps=2)).backbone.state()
    start = random_backbone(TINY.student).state()
    unchanged = {name.split(".")[1] for name in start if "weight" in name and torch.equal(start[name], learned[name])}
    assert unchanged == {"3"}


def cka(a: torch.Tensor, b: torch.Tensor) -> float:
    """Linear CKA of two maps "b c h w"."""
    x, y = (m.movedim(1, -1).flatten(0, 2).numpy().astype(float) for m in (a, b))
    x, y = x - x.mean(0), y - y.mean(0)
    return np.sum((x.T @ y) ** 2) / np.sqrt(np.sum((x.T @ x) ** 2) * np.sum((y.T @ y) ** 2))


@pytest.mark.slow
def test_a_student_of_the_teachers_form_comes_to_its_features_on_eight_images():
    alone = {"loss": "mse", "mask_weight": 0.0, "strides": "16"}
    settings = replace(TINY, student="lcnet_050", views=1, batch=8, steps=70, learning_rate=5e-3, seed=5, **alone)
    images = [blobs(seed, 96).image for seed in range(8)]
    run = iter_distill_backbone(images, settings)
    losses = [step.losses["features"] for step in run if step.stage == "distill"]
    assert np.mean(losses[-3:]) < 0.1 * losses[0]
    views = scanned(images, count=1, seed=5)
    x = torch.stack([views.view(i) for i in range(8)]) / 255
    target = random_backbone("lcnet_050")(x).stages[3][-1]
    started, learned = (b(x).stages[3][-1] for b in (random_backbone("lcnet_050", 5), run.result().backbone))
    assert cka(learned, target) > cka(started, target) + 0.05


def test_the_direct_loss_is_the_distance_of_the_features_themselves():
    settings = replace(TINY, student=TINY.teacher, loss="direct", mask_weight=0.0, strides="2,4,8,16,32")
    teacher, other = random_backbone(TINY.teacher), random_backbone(TINY.teacher, seed=1)
    tokens = TeacherTokens(teacher, scanned(IMAGES), (2, 4, 8, 16, 32), CPU, 0)
    list(tokens.fit())
    images, maps = tokens.batch([0, 3])
    for start, low, high in ((teacher, 0, 1e-5), (other, 0.5, 1e3)):
        training = module._Training(settings, tokens, start, CPU, None)
        assert list(training.projections) == []
        training.student.eval()
        assert low <= training._loss("features", images, maps) <= high


def test_the_direct_loss_needs_equal_channels():
    with pytest.raises(SettingsError, match="at stride 8 student lcnet_050 has 64 channels and teacher resnet18 128"):
        distill_backbone(IMAGES, replace(TINY, teacher="resnet18", student="lcnet_050", loss="direct"))


def test_a_pruned_student_starts_from_its_teacher():
    settings = replace(TINY, teacher="efficientnet_lite0", teacher_weights="auto", student="lite0_compact", steps=1)
    card = distill_backbone(IMAGES, settings).card
    assert card["start"] == f"pruned:{load_teacher('efficientnet_lite0').weights}"


# teachers, tokens and views


@pytest.mark.parametrize("teacher", ["efficientnet_lite0", "resnet18", "dinov2_small"])
@pytest.mark.parametrize("student", ["lcnet_050", "efficientnet_lite0"])
def test_teacher_and_student_have_the_same_grids(teacher, student):
    tokens = TeacherTokens(random_backbone(teacher), scanned(IMAGES), (8, 16, 32), CPU, 0)
    images, maps = tokens.batch([0, 3])
    pyramid = random_backbone(student)(images)
    for stride, index in ((8, 2), (16, 3), (32, 4)):
        assert maps[stride].shape[2:] == pyramid.stages[index][-1].shape[2:]
        assert maps[stride].shape[:2] == (2, tokens.channels(stride))


def test_tokens_of_a_dino_are_its_own_at_stride_16_and_pooled_at_32():
    teacher = random_backbone("dinov2_small")
    tokens = TeacherTokens(teacher, scanned(IMAGES), (16, 32), CPU, 0)
    assert not tokens.is_standardized
    assert list(tokens.fit()) == []
    images, maps = tokens.batch([1])
    small = torch.nn.functional.interpolate(images, (56, 56), mode="bicubic", antialias=True).clamp(0, 1)
    expected = teacher(small).stages[-1][-1]
    torch.testing.assert_close(maps[16], expected, atol=2e-3, rtol=1e-3)
    torch.testing.assert_close(maps[32][..., 0, 0], maps[16][..., :2, :2].mean((2, 3)), atol=1e-5, rtol=1e-5)


def test_channels_of_a_convolutional_teacher_are_standardized():
    tokens = TeacherTokens(random_backbone("lcnet_050"), scanned(IMAGES), (16,), CPU, 1 << 24)
    assert [done for done, _ in tokens.fit()] == list(range(1, 9))
    maps = tokens.batch(range(8))[1][16]
    assert maps.mean((0, 2, 3)).abs().max() < 1e-2
    varied = maps.std((0, 2, 3), correction=0)[maps.std((0, 2, 3)) > 0.5]  # other channels are flat
    assert len(varied) > 32
    torch.testing.assert_close(varied, torch.ones_like(varied), atol=1e-2, rtol=0)


def test_cached_and_fresh_tokens_are_equal_and_the_cache_keeps_its_budget():
    teacher, views = random_backbone("lcnet_050"), scanned(IMAGES)
    fresh = TeacherTokens(teacher, views, (8, 16, 32), CPU, 0)
    entry = 3 * 64 * 64 + 2 * (64 * 64 + 128 * 16 + 256 * 4)
    cached = TeacherTokens(teacher, views, (8, 16, 32), CPU, 3 * entry)
    images, maps = fresh.batch([5, 1, 7, 1])
    first = cached.batch([0, 1, 2, 3])
    assert (fresh.cached, cached.cached, cached.left) == (0, 3, 0)
    again, others = cached.batch([5, 1, 7, 1])
    assert torch.equal(again, images)
    assert all(torch.equal(others[stride], maps[stride]) for stride in (8, 16, 32))
    assert torch.equal(first[1][16][1], maps[16][1])


def test_teachers_by_name_of_timm_and_by_file(file, tmp_path, whole):
    assert load_teacher("efficientnet_lite0").digest() == packaged_head("efficientnet_lite0").backbone_digest
    assert load_teacher("efficientnet_lite0", "packaged").weights.startswith("packaged:")
    assert load_teacher("tf_efficientnet_lite0", "packaged").spec.name == "efficientnet_lite0"
    assert load_teacher(str(file)).digest() == whole.backbone.digest()
    head = Path(module.__file__).parents[1] / "weights" / "efficientnet_lite0.safetensors"
    assert load_teacher(str(head)).trained
    with pytest.raises(SettingsError, match="no backbone and no file is called 'resnet51'"):
        load_teacher("resnet51")
    with pytest.raises(SettingsError, match="is a file; give auto"):
        load_teacher(str(file), "hub")
    torch.save(whole.backbone.state(), tmp_path / "plain.pth")
    with pytest.raises(ModelFileError, match="give the teacher's name"):
        load_teacher(str(tmp_path / "plain.pth"))


def test_offline_a_teacher_of_the_hub_is_named_with_its_file(tmp_path, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(WeightsUnavailableError, match=r"model\.safetensors of timm/resnet18\.tv_in1k"):
        distill_backbone(IMAGES, replace(TINY, teacher="resnet18", teacher_weights="auto"))


def test_a_student_without_a_stride_is_refused():
    with pytest.raises(SettingsError, match="student dinov2_small has no map of stride 8; give strides 16"):
        distill_backbone(IMAGES, replace(TINY, student="dinov2_small"))


def test_a_view_is_its_number_and_shows_its_image():
    views, others = (scanned([*IMAGES, IMAGES[0][..., None].repeat(3, -1)], seed=seed) for seed in (0, 1))
    assert (len(views), views.images) == (10, 5)
    assert torch.equal(views.view(3), scanned(IMAGES).view(3))
    assert not torch.equal(views.view(3), views.view(2))
    assert not torch.equal(views.view(3), others.view(3))
    flat = scanned([np.full((50, 70), 9, np.uint16)]).view(0).float()
    assert flat.shape == (3, 64, 64)
    assert flat.std() < 40


def test_folders_sets_stacks_and_volumes_are_taken(tmp_path):
    for name in ("one", "two"):
        (tmp_path / "sets" / name / "images").mkdir(parents=True)
        (tmp_path / "sets" / name / "labels").mkdir()
        for folder in ("images", "labels"):
            tifffile.imwrite(tmp_path / "sets" / name / folder / "a.tif", IMAGES[0])
    tifffile.imwrite(tmp_path / "stack.tif", np.stack(IMAGES[:3]), metadata={"axes": "ZYX"})
    views = scanned(
        [tmp_path / "sets", tmp_path / "sets" / "one", tmp_path / "stack.tif", open_volume(np.stack(IMAGES)), IMAGES[0]]
    )
    assert [(row["name"], row["images"]) for row in views.sources()] == [
        ("one", 2),
        ("two", 1),
        (tmp_path.name, 3),
        ("array", 4),
        ("arrays", 1),
    ]
    assert all(views.view(i).shape == (3, 64, 64) for i in range(len(views)))


@pytest.mark.parametrize(
    ("images", "error", "message"),
    [
        ([], InputFileError, "there are no images"),
        ([np.zeros((2, 3, 4, 5))], ImageError, r"image 0 has shape \(2, 3, 4, 5\)"),
        ([Path("missing.tif")], InputFileError, "missing.tif"),
    ],
)
def test_images_that_are_none_are_refused(images, error, message):
    with pytest.raises(error, match=message):
        scanned(images)


def test_a_folder_without_images_is_refused(tmp_path):
    with pytest.raises(InputFileError, match="holds no images"):
        scanned([tmp_path])


# the file


def test_a_file_gives_the_same_features_and_holds_the_backbone_alone(file, whole):
    loaded = load_backbone(TINY.student, file)
    assert loaded.state().keys() == random_backbone(TINY.student).state().keys()
    assert loaded.digest() == whole.backbone.digest() == whole.card["backbone"]["digest"]
    x = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    for one, other in zip(loaded(x).stages, whole.backbone(x).stages, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def test_the_card_states_teacher_start_images_and_losses(whole):
    card = whole.card
    assert (card["teacher"]["name"], card["teacher"]["weights"], card["start"]) == ("lcnet_050", "random:0", "random:0")
    assert (card["steps"], card["images"], card["sources"][0]["images"]) == (6, 4, 4)
    assert card["losses"].keys() == {"features", "mask"}
    assert card["backbone"]["license"] == "teacher apache-2.0, start random"
    assert card["seconds"] > 0


def test_a_file_of_another_backbone_is_refused_by_name(file):
    with pytest.raises(WeightsUnavailableError, match=f"is a backbone of {TINY.student}, not of lcnet_050"):
        load_backbone("lcnet_050", file)


@pytest.mark.slow
def test_a_student_is_trained_on_the_file_which_stays_as_it_is(file, whole, support, tiny, tmp_path):
    settings = replace(tiny, backbone=TINY.student, weights=str(file), head="auto", steps=3)
    model = distill(support, settings)
    assert model.backbone.digest() == whole.backbone.digest()
    model.save(tmp_path / "student.safetensors")
    loaded = StudentModel.load(tmp_path / "student.safetensors", device="cpu")
    np.testing.assert_array_equal(loaded.predict(IMAGES[0]).labels, model.predict(IMAGES[0]).labels)
    pytest.importorskip("onnxruntime")
    export_onnx(loaded, tmp_path / "student.onnx")
    assert (tmp_path / "student.onnx").stat().st_size > 10_000


# the command

OPTIONS = ["--student", TINY.student, "--teacher", "lcnet_050", "--teacher-weights", "random", "--steps", "3"]
OPTIONS += ["--batch", "2", "--size", "64", "--views", "1", "--device", "cpu", "--precision", "float32"]


@pytest.fixture
def folder(tmp_path) -> Path:
    (tmp_path / "pictures").mkdir()
    for number, image in enumerate(IMAGES):
        tifffile.imwrite(tmp_path / "pictures" / f"{number}.tif", image)
    return tmp_path / "pictures"


def test_the_command_writes_a_backbone_that_info_describes(folder, tmp_path, capsys):
    out = tmp_path / "small.safetensors"
    command = ["distill-backbone", str(folder), "-o", str(out), *OPTIONS]
    assert main(command) == FINE
    assert "3 steps on 4 images" in capsys.readouterr().out
    assert sorted(tmp_path.glob("*.safetensors")) == [out]
    assert main(["info", str(out)]) == FINE
    described = capsys.readouterr().out
    assert "teacher     lcnet_050, weights random:0" in described
    assert "pictures (4)" in described
    assert main(command) == ERROR
    assert "--overwrite" in capsys.readouterr().err
    assert main([*command, "--overwrite", "--json"]) == FINE
    assert '"steps": 3' in capsys.readouterr().out


@pytest.mark.slow
def test_a_command_that_is_interrupted_goes_on_to_the_same_weights(folder, tmp_path, capsys, monkeypatch):
    whole, stopped = tmp_path / "whole.safetensors", tmp_path / "stopped.safetensors"
    assert main(["distill-backbone", str(folder), "-o", str(whole), *OPTIONS]) == FINE
    command = ["distill-backbone", str(folder), "-o", str(stopped), *OPTIONS]

    def interrupt(bar, step):
        if step.stage == "distill" and step.index == 2:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("distillfss_core.cli.resumable.show_step", interrupt)
        assert main(command) == INTERRUPTED
    assert "interrupted at step 2 of 3; the same command goes on" in capsys.readouterr().err
    assert not stopped.exists()
    assert main(command) == FINE
    one, other = (load_backbone(TINY.student, path) for path in (whole, stopped))
    assert one.digest() == other.digest()


def test_an_output_that_is_no_safetensors_file_is_refused(folder, tmp_path, capsys):
    assert main(["distill-backbone", str(folder), "-o", str(tmp_path / "small.tif"), *OPTIONS]) == ERROR
    assert "end its name in .safetensors" in capsys.readouterr().err


def test_every_light_backbone_can_be_a_student():
    for spec in SPECS.values():
        if spec.light:
            module._check_strides(spec, [8, 16, 32])
