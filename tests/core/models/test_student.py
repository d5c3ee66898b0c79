"""The student as a file and as a segmenter."""

from __future__ import annotations

import copy
import hashlib
import json
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from distillfss_core.errors import ImageError, ModelFileError, OutputError, SettingsError
from distillfss_core.models.card import STUDENT_FILE, read_card, read_thumbnails
from distillfss_core.models.student import StudentModel
from distillfss_core.nn.backbones import backbone_spec
from distillfss_core.nn.checkpoint import read_card_file, write_card_file
from distillfss_core.support.support_set import SupportSet
from distillfss_core.training import distill, unrefined_teacher
from distillfss_core.types import Segmentation
from pictures import blobs

IMAGE = blobs(20, 120).image


@pytest.mark.parametrize("classes", [1, 2, 4])
def test_a_label_is_the_likeliest_class_and_of_equal_ones_the_first(classes: int) -> None:
    probabilities = np.random.default_rng(0).integers(0, 3, (classes + 1, 40, 30)).astype(np.float32) / 3
    labels = Segmentation.of(probabilities).labels
    assert labels.dtype == np.uint8
    assert np.array_equal(labels, probabilities.argmax(0))


@pytest.fixture
def saved(student: StudentModel, tmp_path: Path) -> Path:
    path = tmp_path / "model.safetensors"
    student.save(path)
    return path


def test_a_loaded_student_predicts_exactly_as_the_saved_one(student, saved: Path) -> None:
    again = StudentModel.load(saved, device="cpu")
    assert np.array_equal(again.predict(IMAGE).probabilities, student.predict(IMAGE).probabilities)
    assert again.card == student.card


def test_a_file_without_backbone_is_small_and_finds_its_weights(student, tmp_path: Path, saved: Path) -> None:
    slim = tmp_path / "slim.safetensors"
    student.save(slim, with_backbone=False)
    assert slim.stat().st_size < saved.stat().st_size / 3
    again = StudentModel.load(slim, device="cpu")
    assert np.array_equal(again.predict_labels(IMAGE), student.predict_labels(IMAGE))
    with pytest.raises(ModelFileError, match="other weights"):
        StudentModel.load(slim, device="cpu", weights="random")


def test_the_card_is_read_without_loading_the_model(student, saved: Path) -> None:
    card = read_card(saved)
    assert card["classes"] == ["blob"]
    assert card["training"]["support"] == ["blobs 0", "blobs 1", "blobs 2"]
    assert card["backbone_inside"]
    assert card["bytes"] == saved.stat().st_size
    json.dumps(card)


def test_thumbnails_of_the_support_travel_along(support, saved: Path) -> None:
    thumbs = read_thumbnails(saved)
    assert thumbs is not None
    assert thumbs.images.shape == thumbs.labels.shape == (3, 96, 96)
    assert np.array_equal(thumbs.labels[1], support.slices[1].labels)


def _damage(path: Path, position: int) -> None:
    data = bytearray(path.read_bytes())
    data[position] ^= 0xFF
    path.write_bytes(bytes(data))


def _rewrite(path: Path, **changes: str) -> None:
    with safe_open(path, "pt") as file:
        metadata = file.metadata() | changes
    if "card_digest" not in changes:
        metadata["card_digest"] = hashlib.sha256(metadata["card"].encode()).hexdigest()
    save_file(load_file(path), path, metadata=metadata)


def _newer(path: Path) -> None:
    card = read_card(path)
    card["format_version"] = 99
    _rewrite(path, card=json.dumps(card))


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (lambda p: _damage(p, -100), "checksum"),
        (lambda p: _damage(p, 3), "safetensors"),
        (lambda p: p.write_bytes(p.read_bytes()[:-1000]), "truncated"),
        (lambda p: p.write_bytes(b""), "truncated"),
        (lambda p: p.write_bytes(b"PK\x03\x04 not a model at all"), "safetensors"),
        (_newer, "newer than this program"),
        (lambda p: _rewrite(p, format="something-else"), "no DistillFSS student"),
        (lambda p: _rewrite(p, card="{"), "card is damaged"),
        (lambda p: _rewrite(p, card_digest="0"), "card does not match its checksum"),
        (lambda p: _rewrite(p, card=json.dumps(read_card(p) | {"classes": ["a", "b"]})), "do not fit"),
        (lambda p: p.unlink(), "no such file"),
    ],
)
def test_a_bad_file_is_refused_in_one_clear_line(saved: Path, harm, message: str) -> None:
    harm(saved)
    with pytest.raises(ModelFileError, match=message) as caught:
        StudentModel.load(saved)
    assert "\n" not in str(caught.value)
    assert str(saved) in str(caught.value)


def _with_probe(path: Path, **values: object) -> None:
    card = read_card(path)
    card["probe"] = {"inputs": 1, "alone": False, "bound": 2.0, **values}
    _rewrite(path, card=json.dumps(card))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("bound", value) for value in (0, 0.0, -2.0, float("nan"), float("inf"), "2", True, [2.0])),
        ("inputs", 2),
        ("inputs", [1]),
        ("alone", "no"),
    ],
)
def test_values_of_a_probe_that_are_not_possible_are_refused(saved: Path, name: str, value: object) -> None:
    _with_probe(saved, **{name: value})
    for read in (StudentModel.load, read_card):
        with pytest.raises(ModelFileError, match=f"damaged: {name} .* not possible; take another copy") as caught:
            read(saved)
        assert str(saved) in str(caught.value)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("bound", [None, 1, 2.0])
def test_bounds_of_a_probe_that_are_possible_are_read(saved: Path, bound: float | None) -> None:
    _with_probe(saved, bound=bound)
    assert read_card(saved)["probe"] == {"inputs": 1, "alone": False, "bound": bound}


@pytest.mark.parametrize(
    ("part", "value"), [("training", None), ("training", 3), ("head", None), ("head", 3), ("head", {"student": 3})]
)
def test_a_card_without_its_parts_is_refused_where_it_is_only_read(saved: Path, part: str, value: object) -> None:
    _rewrite(saved, card=json.dumps(read_card(saved) | {part: value}))
    with pytest.raises(ModelFileError, match="card is damaged"):
        read_card(saved)


def test_a_pickle_is_never_opened(tmp_path: Path) -> None:
    path = tmp_path / "evil.safetensors"
    torch.save({"a": torch.zeros(1)}, path)
    with pytest.raises(ModelFileError):
        StudentModel.load(path)


def test_a_file_of_before_with_other_words_is_read_as_it_was_meant(student, saved: Path, tmp_path: Path) -> None:
    card, tensors, header = read_card_file(saved, STUDENT_FILE)
    card["head"] |= {"student": "light", "decoder": "slim", "teacher": "ours"}
    card["training"]["left_out_iou"] = card["training"].pop("validation_iou")
    card["training"]["left_out_slice"] = card["training"].pop("validation_slice")
    older = tmp_path / "older.safetensors"
    write_card_file(older, STUDENT_FILE, card, tensors, backbone=header["backbone"])
    model = StudentModel.load(older, device="cpu")
    assert model.card == StudentModel.load(saved, device="cpu").card
    assert read_card(older)["head"] == read_card(saved)["head"]
    assert read_card(older)["training"] == read_card(saved)["training"]
    image = blobs(10).image
    assert np.array_equal(model.predict_labels(image), StudentModel.load(saved, device="cpu").predict_labels(image))


def test_saving_into_a_folder_that_is_not_there_says_so(student, tmp_path: Path) -> None:
    with pytest.raises(OutputError):
        student.save(tmp_path / "missing" / "model.safetensors")


@pytest.mark.parametrize("shape", [(1, 1), (1, 300), (31, 33), (97, 64), (64, 64, 3)])
def test_any_size_is_segmented_at_its_own_size(student, shape) -> None:
    image = np.random.default_rng(0).integers(0, 255, shape[:2], dtype=np.uint8)
    image = np.repeat(image[..., None], 3, -1) if len(shape) == 3 else image
    found = student.predict(image)
    assert found.labels.shape == found.uncertainty.shape == found.margin.shape == shape[:2]
    np.testing.assert_allclose(found.probabilities.sum(0), 1, atol=1e-5)
    assert np.array_equal(student.predict_labels(image), found.labels)
    assert found.uncertainty.min() >= 0
    assert found.uncertainty.max() <= 1 + 1e-6


def test_an_image_with_other_channels_is_refused(student) -> None:
    with pytest.raises(ImageError, match="5 channel"):
        student.predict(np.zeros((8, 8, 5), np.uint8))


@pytest.fixture(scope="module", params=[Fraction(1), Fraction(2), Fraction(1, 2)], ids=str)
def practiced(request, nuclei, tiny) -> StudentModel:
    """A student with sharp answers, at several zooms."""
    support = SupportSet(
        tuple(replace(blobs(0), image=nuclei.image[z], labels=(nuclei.labels[z] > 0).astype(np.uint8)) for z in (1, 4))
    )
    return distill(support, replace(tiny, steps=30, zoom=request.param, crops=12))


def test_a_tile_border_never_shows(practiced: StudentModel, nuclei) -> None:
    image = nuclei.image[2]
    whole = practiced.predict(image, tile=4096)
    borders = sorted({t.y.inner[0] for t, _ in practiced.iter_tiles(image, tile=160)} - {0})
    tiled = practiced.predict(image, tile=160)
    assert borders
    assert (whole.labels == tiled.labels).mean() >= 0.999
    rows = [b - 1 for b in borders]
    across, elsewhere = (np.abs(np.diff(p.probabilities[1], axis=0))[rows].mean() for p in (tiled, whole))
    assert across <= 1.05 * elsewhere


def test_the_answer_does_not_depend_on_how_the_plane_was_cut(practiced: StudentModel, nuclei) -> None:
    image = nuclei.image[2]
    a, b = (practiced.predict(image, tile=t).labels for t in (128, 192))
    assert (a == b).mean() >= 0.999


def test_with_augmentation_a_turned_image_has_the_turned_answer(practiced: StudentModel, nuclei) -> None:
    image = nuclei.image[2][:384, :384]
    turned = np.ascontiguousarray(np.rot90(image[:, ::-1]))
    for model, equal in ((practiced.with_tta(), True), (practiced, False)):
        answer, of_turned = (model.predict(each).probabilities for each in (image, turned))
        difference = np.abs(np.rot90(answer[:, :, ::-1], axes=(1, 2)) - of_turned).max()
        assert (difference < 1e-3) == equal, difference
    assert not practiced.tta


def test_with_augmentation_the_answer_does_not_depend_on_how_the_plane_was_cut(practiced: StudentModel, nuclei) -> None:
    model = practiced.with_tta()
    a, b = (model.predict(nuclei.image[2], tile=t).labels for t in (128, 448))
    assert (a == b).mean() >= 0.999
    assert (a != practiced.predict_labels(nuclei.image[2])).any()


def test_a_student_that_distinguishes_directions_is_not_turned(student: StudentModel) -> None:
    directed = copy.copy(student)
    directed.training = student.training | {"orientation": "fixed"}
    with pytest.raises(SettingsError, match="orientation fixed"):
        directed.with_tta()
    assert not directed.with_tta(False).tta


def test_augmentation_is_another_computation_for_dask(student: StudentModel) -> None:
    assert student.with_tta().__dask_tokenize__() != student.__dask_tokenize__()
    assert student.with_tta().digest() == student.digest()


def test_images_of_another_pixel_size_are_brought_to_the_size_of_training(tiny) -> None:
    model = distill(SupportSet((blobs(0), blobs(1)), pixel_size=(0.5, 0.5)), replace(tiny, steps=40, crops=16))
    coarse = blobs(10)
    fine = np.repeat(np.repeat(coarse.image, 2, 0), 2, 1)  # the same picture at half the pixel size
    scaled = model.at_pixel_size((0.25, 0.25))
    assert scaled.preprocess.zoom == "1/2"
    expected = np.repeat(np.repeat(model.predict_labels(coarse.image), 2, 0), 2, 1)
    assert (scaled.predict_labels(fine) == expected).mean() > 0.95
    assert model.preprocess.zoom == "1"
    assert scaled.at_pixel_size((0.25, 0.25)).preprocess.zoom == "1/2"
    assert scaled.at_pixel_size((0.5, 0.5)).preprocess.zoom == "1"
    with pytest.raises(SettingsError, match="positive"):
        model.at_pixel_size((0.0, 1.0))


def test_a_student_without_pixel_size_says_so(student) -> None:
    with pytest.raises(SettingsError, match="without a pixel size"):
        student.at_pixel_size((1.0, 1.0))


def test_the_published_form_is_blended_across_tiles(support, tiny) -> None:
    forms = {"student": "published", "decoder": "published", "teacher": "published", "probe": "none"}
    model = distill(support, replace(tiny, steps=20, **forms))
    assert not model.local
    model.halo = 64
    image = blobs(10, 256).image
    cut = {t.y.inner[0] - 1 for t, _ in model.iter_tiles(image, tile=128)} - {-1}
    tiles = np.concatenate([p for t, p in model.iter_tiles(image, tile=128) if t.x.inner[0] == 0], 1)[1]
    blended = model.predict(image, tile=128).probabilities[1, :, : tiles.shape[1]]
    hard, soft = (np.abs(np.diff(p, axis=0))[sorted(cut)].mean() for p in (tiles, blended))
    assert cut
    assert soft < hard
    assert np.array_equal(model.predict_labels(image, tile=128), model.predict(image, tile=128).labels)


def test_a_class_without_example_stays_finite_when_the_plane_is_enlarged_again(tiny, monkeypatch) -> None:
    support = SupportSet((blobs(0, classes=2), blobs(1, classes=2)), ("bright", "dark"))
    teacher = unrefined_teacher(support, replace(tiny, zoom=Fraction(1, 2)))
    teacher.keys.present[1] = False
    found = teacher.predict(blobs(10).image)
    assert np.isfinite(found.probabilities).all()
    assert (found.labels != 2).all()


def test_attention_over_the_whole_input_is_not_taken_for_local() -> None:
    assert not backbone_spec("dinov3_small").local
    assert not backbone_spec("swin_base_384").local
    assert backbone_spec("efficientnet_lite0").local
