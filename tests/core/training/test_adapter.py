"""Distillation of an adapter from SAM: only the adapter learns, from coarse to fine, with embeddings kept on disk."""

from __future__ import annotations

import os
import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tifffile
import torch
import torch.nn.functional as F

from distillfss_core import (
    AdapterSettings,
    DistilledAdapter,
    ModelFileError,
    SettingsError,
    WeightsUnavailableError,
    distill_adapter,
    iter_distill_adapter,
    load_backbone,
)
from distillfss_core.cli.console import ERROR, FINE, INTERRUPTED
from distillfss_core.cli.main import main
from distillfss_core.nn.adapter_file import load_adapter
from distillfss_core.nn.device import Device
from distillfss_core.nn.sam import SamEncoder, map_sam
from distillfss_core.training import adapter as module
from distillfss_core.training.backbone_views import Views
from distillfss_core.training.sam_embeddings import SamEmbeddings
from pictures import blobs
from sam_files import small_sam

IMAGES = [blobs(seed, 96).image for seed in range(4)]
TINY = AdapterSettings(
    backbone="lcnet_050",
    weights="random",
    sizes="64,96,128",
    steps=6,
    batch=2,
    views=2,
    device="cpu",
    precision="float32",
)
ENTRY = 256 * 5 * 5 * 2 + 128
"""Bytes of an embedding of the small SAM on disk."""

pytestmark = pytest.mark.filterwarnings("ignore:.*has random weights.*:UserWarning")


@pytest.fixture(scope="module")
def sam(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("sam") / "small_sam.pth"
    torch.save(small_sam(), path)
    return path


@pytest.fixture(scope="module")
def whole(sam) -> DistilledAdapter:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return distill_adapter(IMAGES, sam, TINY)


def same(one: DistilledAdapter, other: DistilledAdapter) -> bool:
    a, b = one.adapter.state_dict(), other.adapter.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def embeddings(folder: Path, *, budget: int = 1 << 30, seed: int = 0, precision: str = "float32") -> SamEmbeddings:
    views = Views(IMAGES, 128, 2, 0)
    for _ in views.scan():
        pass
    return SamEmbeddings(map_sam(small_sam(seed), "here"), views, Device("cpu", precision), folder, budget)


def refused(*_) -> None:
    pytest.fail("SAM was run")


# the training


def test_steps_follow_the_embedding_of_every_view_that_is_used(sam) -> None:
    steps = list(iter_distill_adapter(IMAGES, sam, TINY))
    assert [step.stage for step in steps] == ["images"] * 4 + ["embed"] * 8 + ["distill"] * 6
    assert [step.is_preparation for step in steps] == [True] * 12 + [False] * 6
    assert all(step.losses.keys() == {"embedding"} for step in steps[12:])
    few = [step for step in iter_distill_adapter(IMAGES, sam, replace(TINY, steps=2)) if step.stage == "embed"]
    assert [(step.index, step.total) for step in few] == [(1, 4), (2, 4), (3, 4), (4, 4)]


def test_the_backbone_sees_coarse_views_first_and_sam_always_its_own_size(sam, monkeypatch) -> None:
    sides, seen = [], []
    embed, forward = module._Training.embed, SamEncoder.forward

    def watch(self, images, size):
        sides.append(size)
        found = embed(self, images, size)
        assert found.shape == (2, 256, size // 16, size // 16)
        return found

    def watch_sam(self, image):
        found = forward(self, image)
        seen.append((image.shape[-1], found.shape[-1]))
        return found

    monkeypatch.setattr(module._Training, "embed", watch)
    monkeypatch.setattr(SamEncoder, "forward", watch_sam)
    distill_adapter(IMAGES, sam, TINY)
    assert sides == [64, 64, 96, 96, 128, 128]
    assert set(seen) == {(128, 5)}


def test_the_loss_is_the_squared_error_of_the_enlarged_embedding(sam, tmp_path) -> None:
    run = iter_distill_adapter(IMAGES, sam, replace(TINY, sizes="64", learning_rate=1e-7), cache=tmp_path)
    losses = [step.losses["embedding"] for step in run if step.stage == "distill"]
    kept = embeddings(tmp_path)
    kept.views = Views(IMAGES, 64, 2, 0)
    for _ in kept.views.scan():
        pass
    training = module._Training(replace(TINY, sizes="64"), kept, Device("cpu"), None)
    expected = []
    for step in range(6):
        images, target = kept.batch(training.indices(8, step))
        with torch.no_grad():
            found = F.interpolate(training.embed(images, 64), (5, 5), mode="bilinear", align_corners=False)
        expected.append(float(((found - target) ** 2).mean()))
    np.testing.assert_allclose(losses, expected, rtol=1e-3)


def test_only_the_adapter_learns(sam, monkeypatch) -> None:
    trainings, init = [], module._Training.__init__

    def watch(self, *args):
        init(self, *args)
        trainings.append((self, {name: value.clone() for name, value in self.adapter.state_dict().items()}))

    monkeypatch.setattr(module._Training, "__init__", watch)
    distilled = distill_adapter(IMAGES, sam, TINY)
    training, before = trainings[0]
    assert not any(torch.equal(before[name], value) for name, value in distilled.adapter.state_dict().items())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert training.backbone.digest() == load_backbone("lcnet_050", "random").digest()
    for frozen in (training.backbone, training.embeddings.sam):
        assert not any(p.requires_grad or p.grad is not None for p in frozen.parameters())


@pytest.mark.slow
def test_an_adapter_comes_nearer_to_sam_than_the_mean_embedding(sam, tmp_path) -> None:
    settings = replace(TINY, backbone="efficientnet_lite0", weights="auto", sizes="64,128", steps=80, batch=8, views=1)
    run = iter_distill_adapter(IMAGES, sam, settings, cache=tmp_path)
    losses = [step.losses["embedding"] for step in run if step.stage == "distill"]
    files = np.stack([np.load(file) for file in tmp_path.glob("*.npy")]).astype(float)
    spread = float(((files - files.mean((0, 2, 3), keepdims=True)) ** 2).mean())
    assert np.mean(losses[-3:]) < 0.7 * spread < losses[0]


@pytest.mark.parametrize("stop", [1, 3, 5])
def test_a_training_that_was_stopped_goes_on_to_the_same_weights(tmp_path, sam, whole, stop: int) -> None:
    checkpoint = tmp_path / "state.safetensors"
    run = iter_distill_adapter(IMAGES, sam, TINY, checkpoint=checkpoint)
    for step in run:
        if step.stage == "distill" and step.index == stop:
            break
    run.close()
    rest = iter_distill_adapter(IMAGES, sam, TINY, checkpoint=checkpoint)
    assert [step.index for step in rest if step.stage == "distill"] == list(range(stop + 1, 7))
    assert same(rest.result(), whole)
    assert rest.result().card["losses"] == whole.card["losses"]


def test_the_same_seed_gives_the_same_weights_and_another_one_others(sam, whole) -> None:
    assert same(distill_adapter(IMAGES, sam, replace(TINY, cache_mb=0)), whole)
    assert not same(distill_adapter(IMAGES, sam, replace(TINY, seed=1)), whole)


def test_a_checkpoint_of_another_training_is_refused(tmp_path, sam) -> None:
    checkpoint, other = tmp_path / "state.safetensors", tmp_path / "other.pth"
    torch.save(small_sam(1), other)
    run = iter_distill_adapter(IMAGES, sam, TINY, checkpoint=checkpoint)
    while next(run).stage != "distill":
        pass
    run.close()
    for images, file, changes, message in (
        (IMAGES, sam, {"sizes": "64"}, "was made with sizes '64,96,128', now it is '64'"),
        (IMAGES[:3], sam, {}, "was made with other images"),
        (IMAGES, other, {}, "was made with another SAM"),
    ):
        with pytest.raises(SettingsError, match=message):
            distill_adapter(images, file, replace(TINY, **changes), checkpoint=checkpoint)


@pytest.mark.parametrize("sizes", ["", "64,64", "128,64", "100", "32", "2048", "64,x"])
def test_sizes_that_are_no_ascending_multiples_of_32_are_refused(sizes: str) -> None:
    with pytest.raises(SettingsError, match="give multiples of 32 from 64 to 1024, ascending"):
        AdapterSettings(sizes=sizes)


def test_a_sam_that_is_missing_is_named_with_its_download() -> None:
    with pytest.raises(WeightsUnavailableError, match=r"sam_vit_b_01ec64\.pth and give the path"):
        distill_adapter(IMAGES, "vit_b", TINY)


def test_the_adapter_of_a_dino_is_read_from_its_early_blocks(sam) -> None:
    card = distill_adapter(IMAGES, sam, replace(TINY, backbone="dinov2_small", weights="random", steps=3)).card
    assert card["backbone"]["name"] == "dinov2_small"


# embeddings on disk


def test_a_second_training_takes_the_embeddings_of_the_first(sam, tmp_path, monkeypatch, whole) -> None:
    distill_adapter(IMAGES, sam, TINY, cache=tmp_path)
    files = sorted(tmp_path.glob("*.npy"))
    assert len(files) == 8
    assert all(file.stat().st_size == ENTRY for file in files)
    monkeypatch.setattr(SamEncoder, "forward", refused)
    assert same(distill_adapter(IMAGES, sam, TINY, cache=tmp_path), whole)


def test_an_embedding_is_sam_s_of_the_view_in_half_precision(tmp_path) -> None:
    kept = embeddings(tmp_path)
    images, found = kept.batch([3, 0])
    assert torch.equal(images, torch.stack([kept.views.view(i) for i in (3, 0)]) / 255)
    for image, embedding in zip(images, found, strict=True):
        assert torch.equal(embedding, kept.sam(image[None])[0].half().float())
    assert torch.equal(kept.batch([3, 0])[1], found)


def test_another_sam_or_precision_has_other_files(tmp_path) -> None:
    for number, kept in enumerate(
        (embeddings(tmp_path), embeddings(tmp_path, seed=1), embeddings(tmp_path, precision="bfloat16")), 1
    ):
        assert list(kept.prepare([0])) == [(1, 1)]
        assert len(list(tmp_path.glob("*.npy"))) == number


def test_the_budget_holds_and_embeddings_of_earlier_trainings_make_room(tmp_path) -> None:
    earlier = embeddings(tmp_path, seed=1)
    assert list(earlier.prepare([0, 1, 2])) == [(1, 3), (2, 3), (3, 3)]
    for age, file in enumerate(sorted(tmp_path.glob("*.npy"))):
        os.utime(file, (1e9 + age, 1e9 + age))
    oldest = sorted(tmp_path.glob("*.npy"))
    kept = embeddings(tmp_path, budget=4 * ENTRY + 10)
    assert list(kept.prepare([0, 1])) == [(1, 2), (2, 2)]
    assert [file.exists() for file in oldest] == [False, True, True]
    assert list(kept.prepare(range(8))) == [(1, 8), (2, 8), (3, 8), (4, 8)]  # its own are not thrown away
    assert kept.held == sum(file.stat().st_size for file in tmp_path.glob("*.npy")) == 4 * ENTRY
    fresh = embeddings(tmp_path / "none", budget=0)
    assert torch.equal(kept.batch([7, 1])[1], fresh.batch([7, 1])[1])
    assert (fresh.held, list((tmp_path / "none").glob("*"))) == (0, [])


def test_what_else_lies_among_embeddings_is_not_touched(tmp_path) -> None:
    names = ["mine.npy", f"{'0' * 63}.npy", f"{'g' * 64}.npy", "notes.txt"]
    for name in names:
        (tmp_path / name).write_bytes(b"of the user" * 9999)
    kept = embeddings(tmp_path, budget=2 * ENTRY + 10)
    assert list(kept.prepare([0, 1])) == [(1, 2), (2, 2)]
    assert kept.held == 2 * ENTRY
    embeddings(tmp_path, seed=1, budget=2 * ENTRY + 10).batch([0, 1])
    assert all((tmp_path / name).stat().st_size == 11 * 9999 for name in names)


def test_a_damaged_embedding_is_made_again(tmp_path) -> None:
    kept = embeddings(tmp_path)
    expected = kept.batch([0])[1]
    (file,) = tmp_path.glob("*.npy")
    for content in (b"", b"no numpy file at all", file.read_bytes()[:-5]):
        file.write_bytes(content)
        again = embeddings(tmp_path)
        assert torch.equal(again.batch([0])[1], expected)
        assert file.stat().st_size == ENTRY == again.held


# the file and the command


def test_the_file_has_the_adapter_and_its_origin(whole, tmp_path) -> None:
    whole.save(tmp_path / "adapter.safetensors")
    loaded = load_adapter(tmp_path / "adapter.safetensors")
    assert all(torch.equal(value, loaded.tensors[name]) for name, value in whole.adapter.state_dict().items())
    assert (loaded.card["width"], loaded.card["sam"]["name"], loaded.card["sam"]["file"]) == (
        256,
        "vit_32",
        "small_sam.pth",
    )
    assert loaded.origin == f"distilled from SAM vit_32 (small_sam.pth, SHA-256 {loaded.card['sam']['digest']})"
    assert (loaded.card["steps"], loaded.card["images"]) == (6, 4)
    with pytest.raises(ModelFileError, match="there is no such file"):
        load_adapter(tmp_path / "none.safetensors")


OPTIONS = ["--backbone", "lcnet_050", "--weights", "random", "--sizes", "64,96", "--steps", "4", "--batch", "2"]
OPTIONS += ["--views", "1", "--device", "cpu", "--precision", "float32"]


@pytest.fixture
def command(tmp_path, sam) -> list[str]:
    (tmp_path / "pictures").mkdir()
    for number, image in enumerate(IMAGES):
        tifffile.imwrite(tmp_path / "pictures" / f"{number}.tif", image)
    return ["distill-adapter", str(tmp_path / "pictures"), "--sam", str(sam), *OPTIONS, "-o"]


def test_the_command_writes_an_adapter_that_info_describes(command, tmp_path, capsys) -> None:
    out = tmp_path / "adapter.safetensors"
    assert main([*command, str(out)]) == FINE
    assert "4 steps on 4 images" in capsys.readouterr().out
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter.safetensors", "pictures"]
    assert main(["info", str(out)]) == FINE
    described = capsys.readouterr().out
    assert "SAM         vit_32, from small_sam.pth, SHA-256" in described
    assert "pictures (4)" in described
    assert main([*command, str(out)]) == ERROR
    assert "--overwrite" in capsys.readouterr().err
    assert main([*command, str(out), "--overwrite", "--json", "--cache", str(tmp_path / "kept")]) == FINE
    assert '"steps": 4' in capsys.readouterr().out
    assert len(list((tmp_path / "kept").glob("*.npy"))) == 4
    mine = tmp_path / "adapter.embeddings" / "mine.npy"
    mine.parent.mkdir()
    mine.write_bytes(b"of the user")
    assert main([*command, str(out), "--overwrite"]) == FINE
    assert [file.name for file in mine.parent.iterdir()] == ["mine.npy"]
    assert main([*command, str(tmp_path / "adapter.tif")]) == ERROR
    assert "end its name in .safetensors" in capsys.readouterr().err


def test_a_command_that_is_interrupted_goes_on_to_the_same_weights(command, tmp_path, capsys, monkeypatch) -> None:
    whole, stopped = tmp_path / "whole.safetensors", tmp_path / "stopped.safetensors"
    assert main([*command, str(whole)]) == FINE
    for stage, index in (("embed", 2), ("distill", 2)):

        def interrupt(bar, step, stage=stage, index=index):
            if (step.stage, step.index) == (stage, index):
                raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr("distillfss_core.cli.resumable.show_step", interrupt)
            assert main([*command, str(stopped)]) == INTERRUPTED
        assert "interrupted at step 2 of 4; the same command goes on" in capsys.readouterr().err
        assert not stopped.exists()
    monkeypatch.setattr(SamEncoder, "forward", refused)  # all embeddings are there
    assert main([*command, str(stopped)]) == FINE
    one, other = (load_adapter(path).tensors for path in (whole, stopped))
    assert all(torch.equal(value, other[name]) for name, value in one.items())
