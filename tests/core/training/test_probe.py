"""The probe: a student in seconds, which reads gray values that the features do not carry."""

from __future__ import annotations

import json
from dataclasses import replace
from fractions import Fraction

import numpy as np
import pytest
import torch
from safetensors import safe_open

from distillfss_core.cli.main import main
from distillfss_core.errors import ModelFileError, NoStudentYetError, SettingsError
from distillfss_core.export.onnx import export_onnx
from distillfss_core.io.writing import write_labels
from distillfss_core.metrics import evaluate
from distillfss_core.models import card
from distillfss_core.models.card import describe_expectation
from distillfss_core.models.preprocess import fit_preprocess
from distillfss_core.models.student import StudentModel
from distillfss_core.nn.backbones import backbone_spec, load_backbone
from distillfss_core.nn.device import choose_device
from distillfss_core.nn.probe import BOUND, Probe
from distillfss_core.settings import DistillSettings
from distillfss_core.support.support_set import SupportSet
from distillfss_core.training import distill, iter_distill
from distillfss_core.training import probe as fitting
from distillfss_core.training.crops import PLAIN, CropSampler
from distillfss_core.training.preparation import iter_prepare
from distillfss_core.training.probe import CrossFit, ProbePoints, _regress, count_fits, iter_cross_fit, iter_points
from distillfss_core.types import IGNORE, AnnotatedSlice, GeneratorRun, finish
from pictures import blobs


@pytest.fixture(scope="session")
def settings(tiny) -> DistillSettings:
    return replace(tiny, method="probe", crop_size=96)


@pytest.fixture(scope="session")
def probe(support, settings) -> StudentModel:
    return distill(support, settings)


def phases(seed: int, size: int = 192, *, color: bool = False, step: int = 40) -> AnnotatedSlice:
    """Three flat phases of about 100 pixels that differ by their gray value, or their hue, alone."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:size, :size]
    centers = rng.uniform(0, size, (9, 2))
    nearest = ((y[..., None] - centers[:, 0]) ** 2 + (x[..., None] - centers[:, 1]) ** 2).argmin(-1)
    labels = (nearest % 3).astype(np.uint8)
    values = np.array([[60, 160, 90], [160, 60, 90], [60, 90, 160]]) if color else 80 + step * np.arange(3)
    image = values[labels] + rng.normal(0, 4, (*labels.shape, 3)[: 2 + color])
    return AnnotatedSlice(image.clip(0, 255).astype(np.uint8), labels, f"phases {seed}")


def iou(model: StudentModel, slices: list[AnnotatedSlice]) -> float:
    pairs = [(model.predict_labels(s.image), s.labels) for s in slices]
    return float(np.mean(evaluate(pairs, len(model.class_names)).pooled.iou))


@pytest.mark.parametrize("classes", [1, 2])
def test_a_probe_segments_what_it_never_saw(settings, classes):
    support = SupportSet(tuple(blobs(i, classes=classes) for i in range(3)), ("bright", "dark")[:classes])
    model = distill(support, settings)
    assert iou(model, [blobs(seed, classes=classes) for seed in (10, 11)]) > 0.75


@pytest.mark.parametrize("color", [False, True])
def test_a_probe_tells_flat_phases_apart_that_differ_by_value_alone(settings, color):
    support = SupportSet(
        tuple(phases(i, color=color) for i in range(3)), ("middle", "bright"), planes_of_one_volume=True
    )
    model = distill(support, settings)
    assert model.card["probe"] == {"inputs": 3 if color else 1, "alone": True, "bound": None}
    assert iou(model, [phases(seed, color=color) for seed in (10, 11)]) > 0.93


def test_a_probe_learns_from_scribbles(settings):
    def scribbled(seed: int) -> AnnotatedSlice:
        whole = blobs(seed)
        labels = np.full_like(whole.labels, IGNORE)
        labels[::7] = whole.labels[::7]
        return replace(whole, labels=labels)

    model = distill(SupportSet(tuple(scribbled(i) for i in range(3)), ("blob",)), settings)
    assert iou(model, [blobs(10), blobs(11)]) > 0.7


def test_the_columns_of_a_probe_are_what_its_layers_multiply():
    probe = Probe(backbone_spec("efficientnet_lite0"), 2, 3)
    weights, bias = probe.weights()
    probe.set_weights(torch.randn_like(weights), torch.randn_like(bias))
    for layer in (probe.intensities, probe.surroundings):
        layer.knots.copy_(torch.rand_like(layer.knots))
        x = torch.rand(5, layer.read)
        expected = layer(x[:, :, None, None])[:, :, 0, 0]
        columns = layer.columns(x) @ layer.weight[:, :, 0, 0].T
        torch.testing.assert_close(columns, expected if layer.bias is None else expected - layer.bias)


def test_its_regression_is_that_of_scikit_learn():
    linear_model = pytest.importorskip("sklearn.linear_model", reason="needs scikit-learn")
    rng = np.random.default_rng(0)
    x = rng.normal(size=(400, 6))
    y = (x @ rng.normal(size=6) + rng.normal(size=400) > 0.8).astype(int)
    shares, penalty = np.array([0.9, 0.1]), 0.02
    weights, bias = _regress(
        torch.from_numpy(x).float(),
        torch.from_numpy(y),
        torch.from_numpy((shares / np.bincount(y))[y]).float(),
        torch.full((6,), penalty),
        1,
    )
    theirs = linear_model.LogisticRegression(C=1 / (2 * penalty), tol=1e-8, max_iter=1000)
    theirs.fit(x, y, sample_weight=(shares / np.bincount(y))[y])
    np.testing.assert_allclose(weights.numpy(), theirs.coef_, atol=2e-3)
    np.testing.assert_allclose(bias.numpy(), theirs.intercept_, atol=2e-3)


def test_a_probe_comes_back_from_its_file(probe, tmp_path):
    path = tmp_path / "probe.safetensors"
    probe.save(path)
    again = StudentModel.load(path, device="cpu")
    assert again.card == probe.card
    image = blobs(10).image
    assert np.array_equal(again.predict(image).probabilities, probe.predict(image).probabilities)
    assert again.digest() == probe.digest()
    again.probe.intensities.bias += 1
    assert again.digest() != probe.digest()


@pytest.mark.parametrize("version", [1, 2])
def test_a_program_that_knows_no_probes_or_no_bound_refuses_its_file(probe, tmp_path, monkeypatch, version):
    """It would take the head, which has learned nothing, for the student, or evidence as it is."""
    path = tmp_path / "probe.safetensors"
    probe.save(path)
    older = replace(card.STUDENT_FILE, version=version)
    monkeypatch.setattr("distillfss_core.models.student.STUDENT_FILE", older)
    with pytest.raises(ModelFileError, match="version 3 is newer than this program reads"):
        StudentModel.load(path)


@pytest.mark.parametrize(("one_volume", "bound"), [(False, 2.0), (True, None)])
def test_evidence_is_bounded_where_images_may_be_unlike_the_slices(support, tiny, one_volume, bound):
    model = distill(replace(support, planes_of_one_volume=one_volume), replace(tiny, steps=2))
    assert (model.probe.alone, model.probe.bound) == (False, bound)


def test_evidence_of_before_the_bound_is_read_without_one(support, tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(fitting, "BOUND", None)
    model = distill(support, replace(tiny, steps=2))
    path = tmp_path / "student.safetensors"
    with monkeypatch.context() as patched:
        patched.setattr("distillfss_core.models.student._OF_PROBE", ("inputs", "alone"))
        model.save(path)
    again = StudentModel.load(path, device="cpu")
    assert (again.probe.alone, again.probe.bound) == (False, None)
    image = blobs(10).image
    assert np.array_equal(again.predict(image).probabilities, model.predict(image).probabilities)


def test_a_student_of_before_the_probe_is_read(support, tiny, tmp_path, monkeypatch):
    student = distill(support, replace(tiny, steps=2, probe="none"))
    older = replace(card.STUDENT_FILE, version=1)
    with monkeypatch.context() as patch:
        patch.setattr("distillfss_core.models.student.STUDENT_FILE", older)
        without = {name: value for name, value in student.card.items() if name != "probe"}
        patch.setattr(StudentModel, "card", without)
        student.save(tmp_path / "old.safetensors")
    with safe_open(tmp_path / "old.safetensors", "pt") as file:
        assert "probe" not in json.loads(file.metadata()["card"])
    again = StudentModel.load(tmp_path / "old.safetensors", device="cpu")
    assert again.probe is None
    image = blobs(10).image
    assert np.array_equal(again.predict_labels(image), student.predict_labels(image))


def test_a_probe_is_exported(probe, tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime", reason="needs onnxruntime")
    pytest.importorskip("onnx", reason="needs onnx")
    path = tmp_path / "probe.onnx"
    export_onnx(probe, path)  # which compares the file with the student
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    (probabilities,) = session.run(None, {"image": np.zeros((1, 1, 96, 64), np.float32)})
    assert probabilities.shape == (1, 2, 96, 64)


def test_tiles_of_a_probe_agree(probe):
    plane = blobs(5, 320).image
    whole, tiled = (probe.predict(plane, tile=side) for side in (512, 128))
    assert (whole.labels == tiled.labels).mean() > 0.999
    assert np.abs(whole.probabilities - tiled.probabilities).mean() < 1e-3


@pytest.mark.parametrize("evidence", ["auto", "none"])
def test_training_goes_on_from_a_probe_with_a_head(probe, support, tiny, evidence):
    model = distill(support, replace(tiny, steps=30, probe=evidence), init_from=probe)
    assert (model.probe is None) == (evidence == "none")
    assert model.probe is None or not model.probe.alone
    assert iou(model, [blobs(10)]) > 0.3


def test_a_probe_has_no_steps_to_choose_from(support, settings):
    with pytest.raises(SettingsError, match="validation_slice is 1, but it chooses the best step, and method probe"):
        iter_distill(support, replace(settings, validation_slice=1))
    run = iter_distill(SupportSet(tuple(blobs(i) for i in range(9)), ("blob",)), settings)
    stages = [(step.stage, step.index) for step in run]
    assert stages == [("load", 1), *[("probe", i) for i in range(1, 10)], ("fit", 1)]
    assert run.result().training["validation_slice"] is None


def test_a_probe_that_is_stopped_is_no_student(support, settings):
    run = iter_distill(support, settings)
    while next(run).stage != "probe":
        pass
    run.close()
    with pytest.raises(NoStudentYetError, match="the probe is not fitted yet"):
        run.result()


def draw_points(support: SupportSet, settings: DistillSettings) -> ProbePoints:
    device = choose_device("cpu", "float32")
    ready = finish(GeneratorRun(iter_prepare(support, replace(settings, zoom=Fraction(1)), device)))
    return finish(GeneratorRun(iter_points(support, range(len(support)), ready.preprocess, ready.cache, 96, 0)))


def cross_fit(support: SupportSet, settings: DistillSettings) -> CrossFit:
    points = draw_points(support, settings)
    return finish(GeneratorRun(iter_cross_fit(points, choose_device("cpu", "float32"))))


@pytest.mark.parametrize("case", ["each slice", "folds", "one slice", "a class alone"])
def test_each_fit_is_a_step_and_their_number_is_known_before(settings, monkeypatch, case):
    monkeypatch.setattr(fitting, "FOLDS", 2 if case == "folds" else 8)
    slices = [blobs(i, classes=2) for i in range(1 if case == "one slice" else 3)]
    if case == "a class alone":
        slices[1:] = [replace(s, labels=np.where(s.labels == 2, 0, s.labels).astype(np.uint8)) for s in slices[1:]]
    points = draw_points(SupportSet(tuple(slices), ("bright", "dark")), settings)
    total = {"each slice": 4, "folds": 3, "one slice": 1, "a class alone": 3}[case]
    assert count_fits(points) == total
    steps = list(iter_cross_fit(points, choose_device("cpu", "float32")))
    assert [(step.stage, step.index, step.total) for step in steps] == [("fit", n + 1, total) for n in range(total)]


def test_a_run_that_is_closed_between_two_fits_fits_no_further_probe(support, tiny, monkeypatch):
    fits: list[ProbePoints] = []
    fit_probe = fitting.fit_probe
    monkeypatch.setattr(fitting, "fit_probe", lambda points: fits.append(points) or fit_probe(points))
    run = iter_distill(support, replace(tiny, steps=4))
    while (step := next(run)).stage != "fit" or step.index < 2:
        pass
    assert step.total == 4
    run.close()
    assert list(run) == []
    assert len(fits) == 2
    assert run.result().probe is None


def test_gray_values_reach_a_student_through_its_probe(tiny):
    slices = tuple(phases(i, step=10) for i in range(3))
    support = SupportSet(slices, ("middle", "bright"), planes_of_one_volume=True)
    scores = {}
    for evidence in ("auto", "none"):
        model = distill(support, replace(tiny, steps=4, probe=evidence))
        scores[evidence] = iou(model, [phases(seed, step=10) for seed in (10, 11)])
    assert scores["auto"] > max(0.9, scores["none"] + 0.05)


def test_the_margins_of_a_student_are_those_of_head_and_probe(student):
    assert student.probe is not None
    network = student.network
    image = torch.rand(1, 3, 96, 64)
    features = network.backbone(image)
    expected = network.head.student_margins(features) + network.probe(features, image)
    torch.testing.assert_close(network(image), expected)


def test_evidence_of_a_slice_comes_from_the_others(support, settings, monkeypatch):
    monkeypatch.setattr("distillfss_core.training.probe._calibrate", lambda margins, _: (1.0, margins.new_zeros(1)))
    first = support.slices[0]
    turned = replace(first, labels=np.ascontiguousarray(first.labels[::-1]))
    other = SupportSet((turned, *support.slices[1:]), support.class_names)
    one, two = (cross_fit(s, settings) for s in (support, other))
    assert sorted(one.without) == list(range(len(support)))
    image = torch.rand(1, 3, 96, 96)
    features = load_backbone()(image)
    for index in one.without:
        a, b = (fit.without[index](features, image) for fit in (one, two))
        assert torch.allclose(a, b, atol=0.05) == (index == 0)  # only the probe of slice 0 has not seen the change


def test_a_probe_that_fails_on_held_out_slices_is_no_evidence(tiny):
    rng = np.random.default_rng(0)

    def noise(seed: int) -> AnnotatedSlice:
        labels = np.kron(rng.integers(0, 2, (8, 8)), np.ones((16, 16))).astype(np.uint8)
        return replace(blobs(seed, 128), labels=labels)

    model = distill(SupportSet(tuple(noise(i) for i in range(4)), ("noise",)), replace(tiny, steps=2))
    assert model.training["probe_gain"] < 0.05
    assert model.probe is None


def test_how_well_a_probe_does_is_known_from_held_out_slices(support, settings):
    fit = cross_fit(support, settings)
    assert 0.5 < fit.gain < 2
    tested = iou(distill(support, settings), [blobs(seed) for seed in range(10, 14)])
    assert fit.iou == pytest.approx(tested, abs=0.1)


def test_a_single_slice_leaves_nothing_to_hold_out(support, tiny):
    model = distill(SupportSet(support.slices[:1], support.class_names), replace(tiny, steps=2))
    assert model.probe is None
    assert (model.training["probe_gain"], model.training["probe_iou"]) == (0.0, None)


def test_a_training_that_was_stopped_states_no_iou_to_expect(support, tiny):
    run = iter_distill(support, replace(tiny, steps=3, zoom="auto"))
    while next(run).is_preparation:
        pass
    for _ in range(2):
        assert run.result(measure_halo=False).training["expected_iou"] is None
        next(run)
    run.close()
    assert run.result().training["expected_iou"] is None
    assert describe_expectation(run.result().training) == "no IoU to expect, as the training was stopped"
    whole = iter_distill(support, replace(tiny, steps=1, zoom="auto"))
    assert [step.index for step in whole][-1] == 1
    assert whole.result().training["expected_iou"] is not None


@pytest.mark.parametrize("case", ["whole", "strokes", "one slice", "given zoom"])
def test_the_iou_to_expect_comes_from_held_out_slices(support, tiny, case):
    slices = support.slices[: 1 if case == "one slice" else None]
    if case == "strokes":
        slices = tuple(replace(s, labels=np.where(np.arange(s.labels.shape[1]) % 3, IGNORE, s.labels)) for s in slices)
    zoom = Fraction(1) if case == "given zoom" else "auto"
    model = distill(SupportSet(slices, support.class_names), replace(tiny, steps=2, zoom=zoom))
    expected = model.training["expected_iou"]
    if case != "whole":
        assert expected is None
        reason = {"strokes": "strokes are too easy", "one slice": "one slice", "given zoom": "its zoom was given"}[case]
        assert reason in describe_expectation(model.training)
        return
    scores = model.training["zoom_scores"][model.preprocess.zoom], model.training["probe_iou"]
    assert expected == max(scores)
    assert describe_expectation(model.training) == f"IoU {expected:.2f} ± 0.15 expected on new slices of these kinds"
    assert expected == pytest.approx(iou(model, [blobs(seed) for seed in range(10, 14)]), abs=0.15)


def test_a_slice_that_alone_shows_a_class_has_no_evidence(settings):
    slices = [blobs(i, classes=2) for i in range(3)]
    slices[1:] = [replace(s, labels=np.where(s.labels == 2, 0, s.labels).astype(np.uint8)) for s in slices[1:]]
    fit = cross_fit(SupportSet(tuple(slices), ("bright", "dark")), settings)
    assert sorted(fit.without) == [1, 2]


def test_evidence_of_inverted_crops_is_that_of_inverted_intensities(support, settings):
    fit = cross_fit(support, settings)
    sampler = CropSampler(support, fit_preprocess([support.slices[0].image]), 96, replace(PLAIN, polarity=0.5))
    rng = np.random.default_rng(0)
    backbone = load_backbone()
    for _ in range(8):
        crop = sampler.cut(0, rng)
        torch.testing.assert_close(crop.image, 1 - crop.plain if crop.inverted else crop.plain)
        features = backbone(crop.image[None])
        torch.testing.assert_close(fit.evidence(crop, features), fit.without[0](features, crop.image[None]))


def test_evidence_is_bounded_on_images_unlike_all_supports(support, settings):
    whole = cross_fit(support, settings).whole
    image = torch.full((1, 3, 96, 96), 30.0)  # far above all intensities that were learned
    features = load_backbone()(image)
    margins = whole.margins(whole.inputs_of(features, image))
    evidence = whole(features, image)
    assert float(margins.abs().max()) > 10
    assert float(evidence.abs().max()) <= BOUND
    assert bool((evidence.sign() == margins.sign()).all())


def test_a_validation_slice_is_held_out_from_the_probe(support, tiny):
    run = iter_distill(support, replace(tiny, steps=4, validation_slice=1))
    assert [step.total for step in run if step.stage == "probe"] == [len(support) - 1] * (len(support) - 1)


def test_published_students_have_no_probe():
    assert DistillSettings.preset("published").probe == "none"
    assert DistillSettings.preset("default").probe == "auto"


@pytest.mark.slow
def test_the_command_line_makes_a_probe(support, tmp_path, capsys):
    for number, labeled in enumerate(support.slices):
        for kind, array in (("images", labeled.image), ("labels", labeled.labels)):
            (tmp_path / kind).mkdir(exist_ok=True)
            write_labels(tmp_path / kind / f"{number}.tif", array)
    out = tmp_path / "m.safetensors"
    assert (
        main(["distill", *map(str, (tmp_path / "images", tmp_path / "labels")), "-o", str(out), "--method=probe"]) == 0
    )
    assert "probe in " in capsys.readouterr().out
    assert main(["info", str(out)]) == 0
    assert "probe, " in capsys.readouterr().out
