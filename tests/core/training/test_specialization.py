"""Specialization: a backbone learns a teacher's features on the images at hand, and is kept only where that helps."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tifffile
import torch

from distillfss_core import BackboneSettings, StudentModel
from distillfss_core.cli.console import ERROR, FINE
from distillfss_core.cli.main import main
from distillfss_core.errors import NoStudentYetError, SettingsError
from distillfss_core.io.writing import write_labels
from distillfss_core.models.preprocess import Limits, fit_preprocess
from distillfss_core.nn.backbones import load_backbone
from distillfss_core.nn.pretrained import packaged_head
from distillfss_core.settings import SIZES
from distillfss_core.support.support_set import SupportSet
from distillfss_core.training import distill, iter_distill
from distillfss_core.training import specialization as module
from distillfss_core.training.backbone import distill_backbone
from distillfss_core.training.backbone_views import Views
from pictures import blobs

OTHERS = [blobs(seed).image for seed in range(20, 22)]
STAGES = ["load", "images", "specialize", "compare", "probe", "fit", "encode", "joint"]

pytestmark = pytest.mark.filterwarnings("ignore:.*has random weights.*:UserWarning")


@pytest.fixture(scope="module")
def teacher(tmp_path_factory) -> Path:
    """File of a backbone that was distilled for a step."""
    path = tmp_path_factory.mktemp("teacher") / "teacher.safetensors"
    form = BackboneSettings(
        teacher="lcnet_050", teacher_weights="random", student="lcnet_050", steps=1, batch=2, size=64, views=1
    )
    distill_backbone(OTHERS, form).save(path)
    return path


@pytest.fixture
def special(tiny, teacher, monkeypatch):
    """Settings of a specialization that takes seconds."""
    monkeypatch.setattr(module, "_SIZE", 64)
    monkeypatch.setattr(module, "_BATCH", 2)
    return replace(tiny, backbone="lcnet_050", weights="random", specialize=3, specialize_teacher=str(teacher))


def judged(monkeypatch, *scores: float) -> None:
    """Let the backbones be judged so: before, then after."""
    given = iter(scores)

    def score(*_: object):
        yield
        return next(given)

    monkeypatch.setattr(module, "iter_score", score)


def test_a_backbone_that_helps_is_kept_in_the_file_of_the_student(support, special, monkeypatch, tmp_path):
    judged(monkeypatch, 0.5, 0.6)
    run = iter_distill(support, special, unlabeled=OTHERS)
    steps = list(run)
    assert list(dict.fromkeys(step.stage for step in steps)) == STAGES  # no labels are made for the others
    assert [step.index for step in steps if step.stage == "specialize"][-3:] == [1, 2, 3]
    assert all(step.is_preparation for step in steps if step.stage in ("specialize", "compare"))
    model = run.result()
    made = model.training["specialization"]
    assert (made["kept"], made["iou_before"], made["iou_after"]) == (True, 0.5, 0.6)
    assert (made["teacher"], made["steps"], made["images"]) == ("lcnet_050", 3, 5)
    assert made["losses"].keys() == {"features"}
    assert "unlabeled" not in model.training
    assert model.backbone.weights == "trained:specialized:lcnet_050"
    start = load_backbone("lcnet_050", "random")
    assert model.backbone.digest() != start.digest()

    model.save(tmp_path / "m.safetensors")
    again = StudentModel.load(tmp_path / "m.safetensors", device="cpu")
    assert again.backbone.digest() == model.backbone.digest()
    np.testing.assert_array_equal(again.predict_labels(OTHERS[0]), model.predict_labels(OTHERS[0]))
    with pytest.raises(SettingsError, match="in no package"):
        model.save(tmp_path / "m.safetensors", with_backbone=False)
    refined = distill(support, special, init_from=again)
    assert refined.backbone.digest() == again.backbone.digest()


def test_a_backbone_that_does_not_help_is_dropped(support, special, monkeypatch):
    plain = distill(support, replace(special, specialize=0))
    judged(monkeypatch, 0.5, 0.505)
    model = distill(support, special, unlabeled=OTHERS)
    made = model.training["specialization"]
    assert (made["kept"], made["iou_before"], made["iou_after"]) == (False, 0.5, 0.505)
    assert model.backbone.digest() == plain.backbone.digest()
    for name, value in plain.head.state_dict().items():
        assert torch.equal(value, model.head.state_dict()[name]), name


@pytest.mark.parametrize("count", [1, 3])
def test_features_that_tell_the_classes_apart_score_higher(count, special, monkeypatch):
    # the learned backbone has lost everything, so it must be dropped: of one slice, crops are held out
    support = SupportSet(tuple(blobs(i) for i in range(count)), ("blob",))
    real = module.backbone_from_state

    def emptied(name, state, weights):
        return real(name, {key: torch.zeros_like(value) for key, value in state.items()}, weights)

    monkeypatch.setattr(module, "backbone_from_state", emptied)
    settings = replace(special, backbone="efficientnet_lite0", weights="auto")
    made = distill(support, settings).training["specialization"]
    assert not made["kept"]
    assert made["iou_before"] > made["iou_after"] + 0.2


def test_the_meta_trained_teacher_judges_as_well_but_not_for_a_probe(support, special, monkeypatch):
    asked = []

    def score(support, preprocess, cache, seed, judges):
        asked.append((cache.backbone.weights, len(judges) > 0))
        yield
        return 0.5

    monkeypatch.setattr(module, "iter_score", score)
    settings = replace(special, backbone="efficientnet_lite0", weights="auto")
    made = distill(support, settings).training["specialization"]
    assert [is_teacher for _, is_teacher in asked] == [True, False, True, False]
    assert {weights for weights, _ in asked[2:]} == {"trained:specialized:lcnet_050"}
    assert made["images"] == 3
    asked.clear()
    model = distill(support, replace(settings, method="probe"))
    assert [is_teacher for _, is_teacher in asked] == [False, False]
    assert model.training["specialization"]["iou_after"] == 0.5


def test_the_same_seed_specializes_the_same(support, special, monkeypatch):
    digests = []
    for seed in (0, 0, 1):
        judged(monkeypatch, 0.5, 0.6)
        digests.append(distill(support, replace(special, seed=seed, weights="random")).backbone.digest())
    assert digests[0] == digests[1] != digests[2]


def test_a_run_that_is_stopped_meanwhile_has_no_student(support, special):
    run = iter_distill(support, special)
    next(step for step in run if step.stage == "specialize")
    run.close()
    with pytest.raises(NoStudentYetError):
        run.result()


def test_what_cannot_teach_or_learn_is_refused(support, special, monkeypatch):
    def refused(match: str, **given: object) -> None:
        with pytest.raises(SettingsError, match=match):
            distill(support, replace(special, **given))

    monkeypatch.setattr(module, "is_packaged", lambda spec: False)
    refused(r"pip install 'napari-distillfss\[dinov2\]'", specialize_teacher="auto")
    refused("no backbone and no file is called 'nobody'", specialize_teacher="nobody")
    refused("backbone swin_base_384 is too large to learn", backbone="swin_base_384")
    monkeypatch.setattr(module, "load_teacher", lambda name: load_backbone("lcnet_050", "random"))
    refused("is the backbone that learns")


def test_a_pruned_backbone_learns_the_maps_of_the_larger_one(support, special, monkeypatch):
    forms = []

    def learn(views, teacher, start, form, device):
        forms.append((teacher.digest(), form.loss, form.strides))
        return (yield from iter_features(views, teacher, start, form, device))

    iter_features = module.iter_features
    monkeypatch.setattr(module, "iter_features", learn)
    monkeypatch.setattr(module, "is_packaged", lambda spec: spec.name != "dinov2_small")  # which is not needed
    judged(monkeypatch, *[0.5] * 2, *[0.6] * 2)
    auto = replace(special, backbone=SIZES["fast"], weights="auto", specialize=1, specialize_teacher="auto")
    made = distill(support, auto).training["specialization"]
    larger = packaged_head("efficientnet_lite0").trained_backbone()
    assert forms == [(larger.digest(), "direct", "2,4,8,16,32")]
    assert (made["teacher"], made["kept"]) == ("efficientnet_lite0", True)
    judged(monkeypatch, 0.5, 0.6)
    distill(support, special)
    assert forms[1][1:] == ("qsd", "8,16,32")


def test_views_have_the_zoom_and_the_limits_of_the_training(monkeypatch):
    monkeypatch.setattr("distillfss_core.training.backbone_views.recolor", lambda x, *_: x)
    plane = np.tile(np.arange(400, dtype=np.uint16), (400, 1))  # each column has its own value
    dark = replace(fit_preprocess([plane], scope="volume"), zoom="4", fitted=Limits((0.0,), (800.0,)))
    views = Views([plane], 64, 30, 0, [dark])
    list(views.scan())
    seen = [views.view(i).numpy()[0] for i in range(len(views))]
    bright = [image if image.max() < 128 else 255 - image for image in seen]  # some are inverted
    columns = np.array([np.ptp(image.astype(float)) * 800 / 255 for image in bright])
    assert 8 - 4 <= columns.min() < 14  # half of 64 / 4 pixels
    assert 26 < columns.max() <= 32 + 4  # twice as many
    assert max(image.max() for image in bright) <= 128


def test_the_command_specializes_on_files_without_labels(tmp_path, teacher, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(module, "_SIZE", 64)
    monkeypatch.setattr(module, "_BATCH", 2)
    judged(monkeypatch, 0.5, 0.75)
    for name in ("images", "labels"):
        (tmp_path / name).mkdir()
    for index in range(3):
        labeled = blobs(index)
        tifffile.imwrite(f"images/{index}.tif", labeled.image)
        if index < 2:
            write_labels(f"labels/{index}.tif", labeled.labels)
    command = ["distill", "images", "labels", "-o", "m.safetensors", "--steps=2", "--crop-size=64", "--zoom=1"]
    command += ["--crops=4", "--shots=2", "--queries=2", "--device=cpu", "--backbone=lcnet_050", "--weights=random"]
    teaching = ["--specialize", "2", f"--specialize-teacher={teacher}"]
    packaged = [word for word in command if not word.startswith(("--backbone", "--weights"))]
    assert main([*packaged, *teaching, "--without-backbone"]) == ERROR
    assert "a specialized backbone cannot be found again" in capsys.readouterr().err
    assert main([*command, *teaching]) == FINE
    assert "backbone specialized (IoU on held-out slices 0.500 before, 0.750 after)" in capsys.readouterr().out
    assert main(["info", "m.safetensors", "--json"]) == FINE
    training = json.loads(capsys.readouterr().out)["training"]
    assert training["specialization"]["images"] == 3  # the one without labels among them
    assert training["settings"]["specialize"] == 2
    assert main(["info", "m.safetensors"]) == FINE
    assert "0.750 after), lcnet_050 as teacher" in capsys.readouterr().out
    again = [*command, "--overwrite", "--init-from=m.safetensors", *teaching]
    again = [word for word in again if not word.startswith(("--zoom", "--backbone", "--weights"))] + [
        "-o",
        "n.safetensors",
    ]
    assert main(again) == ERROR
    assert "--specialize 2 does not go with --init-from" in capsys.readouterr().err


def test_the_option_alone_takes_the_usual_number_of_steps():
    from distillfss_core.cli.main import build_parser

    parsed = build_parser().parse_args(["distill", "images", "labels", "-o", "m.safetensors", "--specialize"])
    assert parsed.specialize == 150
