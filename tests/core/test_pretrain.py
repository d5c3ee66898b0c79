"""Meta-training: episodes, resuming, and the head file it ends with."""

from __future__ import annotations

import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch

from distillfss_core import ModelFileError, PretrainSettings, SettingsError, load_backbone
from distillfss_core.cli import FAULT, FINE, INTERRUPTED, main
from distillfss_core.config import DistillSettings
from distillfss_core.head import FewShotHead, HeadForm
from distillfss_core.headfile import load_head, packaged_head, save_head
from distillfss_core.pretrain.episodes import EpisodeMix, sparsely, with_foreign_masks
from distillfss_core.pretrain.run import CHECKPOINT, CURVES, HEAD, PretrainRun, sources
from distillfss_core.pretrain.synthetic import synthetic_task
from distillfss_core.training import distill, unrefined_teacher
from distillfss_core.types import IGNORE

TINY = PretrainSettings(
    steps=4, size=64, tasks=2, shots=2, judged=2, judge_every=3, width=8, workers=0, device="cpu", precision="float32"
)


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
    tasks = [synthetic_task(i, views=2, size=64) for i in range(3)]
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


def test_a_damaged_checkpoint_is_refused(tmp_path, whole):
    data = (whole.folder / CHECKPOINT).read_bytes()
    (tmp_path / CHECKPOINT).write_bytes(data[: len(data) // 2])
    with pytest.raises(ModelFileError, match="damaged"):
        PretrainRun(TINY, tmp_path)


def test_real_pictures_are_learnt_from_and_kept_out_sets_judged_on(tmp_path, shared):
    real, held_out = sources([shared / "train"], ["wbc_krd"])
    assert real is not None
    assert held_out is not None
    assert held_out.sets == ("wbc_krd",)
    assert "wbc_krd" not in real.sets
    settings = replace(TINY, steps=1, synthetic=0.0)
    run = PretrainRun(settings, tmp_path, real=real, held_out=held_out)
    metrics = list(run)[-1].metrics
    assert {"real_1_shot", "real_5_shot", "real_foreign_masks", "made_5_shot"} <= set(metrics)
    card = run.card()
    assert {row["name"] for row in card["data"]} == set(real.sets)
    assert [row["name"] for row in card["held_out"]] == ["wbc_krd"]


# the head file


def test_a_head_serves_any_number_of_classes(whole):
    told = load_head(whole.finish({"name": "tiny"}))
    assert told.name == "tiny"
    assert told.card["training"]["steps"] == 4
    spec = load_backbone("efficientnet_lite0").spec
    for classes in (1, 3):
        head = FewShotHead(spec, classes, HeadForm("light", "slim", "ours", 8))
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


# the head of this package


def test_the_packaged_head_is_small_and_says_where_it_comes_from():
    told = packaged_head("efficientnet_lite0")
    assert told is not None
    assert told.backbone_digest == load_backbone("efficientnet_lite0").digest()
    assert sum(2 * v.numel() for v in told.tensors.values()) < 8e6
    assert told.width == DistillSettings().width
    assert told.card["training"]["steps"] > 1000
    assert len(told.card["data"]) > 30
    assert all(row["licence"] for row in told.card["data"])
    assert {row["name"] for row in told.card["data"]}.isdisjoint(row["name"] for row in told.card["held_out"])
    assert packaged_head("resnet18") is None


def test_it_is_the_default_where_it_fits(support, tiny):
    few = replace(tiny, steps=1)
    told = packaged_head("efficientnet_lite0")
    assert told is not None
    assert distill(support, few).training["head"] == told.name
    for other in (replace(few, head="none"), replace(few, width=8), replace(few, decoder="published")):
        assert distill(support, other).training["head"] is None


def test_it_reads_the_support(nuclei):
    """With masks that belong to other slices it knows next to nothing; with the right ones it does at once."""
    from distillfss_core import LabelledSlice, SupportSet, evaluate

    slices = [
        LabelledSlice(image, (labels > 0).astype(np.uint8))
        for image, labels in zip(nuclei.image, nuclei.labels, strict=True)
    ]
    foreign = [LabelledSlice(s.image, np.ascontiguousarray(s.labels[::-1, ::-1].T)) for s in slices]
    ious = []
    for shown in (slices, foreign):
        model = unrefined_teacher(SupportSet(tuple(shown[:3])), DistillSettings(zoom="1", device="cpu"))
        ious.append(evaluate([(model.predict_labels(slices[4].image), slices[4].labels)], 1).iou)
    right, wrong = ious
    assert right > 0.5
    assert wrong < 0.6 * right


# the command


def test_the_command_trains_and_goes_on(tmp_path, capsys):
    options = ["--size=64", "--tasks=1", "--shots=1", "--judged=1", "--width=8", "--workers=0", "--device=cpu"]
    folder = tmp_path / "run"
    assert main(["pretrain", "-o", str(folder), "--steps=1", "--name=mine", *options]) == FINE
    assert "after 1 steps" in capsys.readouterr().out
    assert load_head(folder / HEAD).name == "mine"
    assert main(["pretrain", "-o", str(folder), "--steps=2", *options]) == FINE
    assert load_head(folder / HEAD).card["training"]["steps"] == 2
    assert main(["pretrain", "-o", str(folder), "--steps=3", "--seed=5", *options]) == FAULT
    assert "give the same settings" in capsys.readouterr().err


def test_an_interrupted_command_says_how_to_go_on(tmp_path, capsys, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(PretrainRun, "__next__", interrupted)
    assert main(["pretrain", "-o", str(tmp_path), "--size=64", "--judged=1", "--workers=0"]) == INTERRUPTED
    assert "goes on from" in capsys.readouterr().err


def test_sets_to_keep_out_need_real_ones(tmp_path, capsys):
    assert main(["pretrain", "-o", str(tmp_path), "--keep-out=a"]) == FAULT
    assert "--real" in capsys.readouterr().err


def test_a_head_is_written_whole_or_not_at_all(tmp_path, whole):
    path = tmp_path / "head.safetensors"
    path.write_bytes(b"old")
    with pytest.raises(TypeError):
        save_head(path, whole.best_teacher, {"bad": object()})
    assert path.read_bytes() == b"old"


def test_info_tells_a_head_from_a_student(whole, capsys):
    path = whole.finish({"name": "tiny"})
    assert main(["info", str(path)]) == FINE
    out = capsys.readouterr().out
    assert "tiny" in out
    assert "4 steps of 2 tasks" in out
    assert main(["info", str(whole.folder / CHECKPOINT)]) == FAULT
    assert "no DistillFSS student" in capsys.readouterr().err
