"""A volume's labels on disk are those in memory, whatever stopped the run on the way."""

from __future__ import annotations

import errno
import json
import os
import pickle
import random
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import zarr

from distillfss_core.errors import ImageError, InputFileError, OutputError, SettingsError
from distillfss_core.labelstore import layout as label_layout
from distillfss_core.labelstore import store as label_store
from distillfss_core.labelstore.pyramid import coarsen_labels
from distillfss_core.labelstore.store import JOURNAL
from distillfss_core.segmentation.cluster import Connection
from distillfss_core.segmentation.to_zarr import iter_segment, segment_to_zarr
from distillfss_core.volumes.volume import Volume, open_volume
from pictures import blobs
from volumes import write_ome_zarr

TILE = 96
STACK = np.stack([blobs(seed, 200).image for seed in range(5)])


@pytest.fixture(autouse=True)
def small_shards(monkeypatch):
    """Shards of two planes and one tile, and a pyramid of a few levels."""
    monkeypatch.setattr(label_layout, "_SIDE", 96)
    monkeypatch.setattr(label_layout, "_SHARD", 2 * 96 * 96)
    monkeypatch.setattr(label_layout, "_SMALLEST", 60)


@pytest.fixture(scope="module")
def expected(plain_student) -> np.ndarray:
    return np.stack([plain_student.predict_labels(plane, tile=TILE) for plane in STACK])


@pytest.fixture
def volume(tmp_path):
    return open_volume(write_ome_zarr(tmp_path / "image.ome.zarr", STACK, scale=(2.0, 0.5, 0.5), levels=1))


def labels_of(path: Path, level: int = 0) -> np.ndarray:
    return zarr.open_array(path / str(level), mode="r")[...]


def files_of(path: Path) -> dict[str, bytes]:
    return {str(f.relative_to(path)): f.read_bytes() for f in path.rglob("*") if f.is_file() and f.name != JOURNAL.name}


def test_labels_on_disk_are_those_in_memory(volume, plain_student, expected, tmp_path):
    out = tmp_path / "out.ome.zarr"
    steps = list(iter_segment(volume, plain_student, out, tile=TILE))
    assert expected.any()
    assert np.array_equal(labels_of(out), expected)
    assert [s.index for s in steps] == list(range(1, steps[-1].total + 1))
    assert steps[-1].eta == 0
    assert steps[0].eta > 0
    report = segment_to_zarr(volume, plain_student, out, resume=True, tile=TILE)  # all is there
    assert report.computed == 0
    assert report.finished == 3 * 3 * 3


def test_chunks_under_a_halo_are_read_once_in_a_row(plain_student, expected, tmp_path, monkeypatch):
    image = open_volume(write_ome_zarr(tmp_path / "image.ome.zarr", STACK, levels=1, chunks=(1, 40, 40)))
    read, asked = Volume.read, []

    def note(self, z, y, x):
        asked.append((z, y, x))
        return read(self, z, y, x)

    monkeypatch.setattr(Volume, "read", note)
    segment_to_zarr(image, plain_student, tmp_path / "labels.ome.zarr", tile=TILE)
    np.testing.assert_array_equal(labels_of(tmp_path / "labels.ome.zarr"), expected)
    blocks = [(z.start, y.start, y.stop, x) for z, y, x in asked if x.stop - x.start < 200]
    for row in {block[:3] for block in blocks}:
        seen = [c for *place, x in blocks if tuple(place) == row for c in range(x.start // 40, -(-x.stop // 40))]
        assert len(seen) == len(set(seen))


def test_the_pyramid_holds_what_most_voxels_have(volume, plain_student, expected, tmp_path):
    out = tmp_path / "out.ome.zarr"
    segment_to_zarr(volume, plain_student, out, tile=TILE)
    group = zarr.open_group(out, mode="r")
    about = group.attrs["ome"]["multiscales"][0]
    assert [d["coordinateTransformations"][0]["scale"] for d in about["datasets"]] == [
        [2.0, 0.5, 0.5],
        [2.0, 1.0, 1.0],
        [2.0, 2.0, 2.0],
    ]
    first = labels_of(out, 1)
    assert first.shape == (5, 100, 100)
    blocks = expected.reshape(5, 100, 2, 100, 2).sum((2, 4))
    assert np.array_equal(first, blocks >= 2)
    assert np.array_equal(labels_of(out, 2), coarsen_labels(first, (1, 2, 2)))


def test_labels_inside_an_image_are_listed_and_know_it(volume, plain_student, tmp_path):
    image = tmp_path / "image.ome.zarr"
    segment_to_zarr(volume, plain_student, image / "labels" / "blob", tile=TILE)
    labels = zarr.open_group(image / "labels", mode="r")
    assert labels.attrs["ome"]["labels"] == ["blob"]
    about = labels["blob"].attrs["ome"]["image-label"]
    assert about["source"] == {"image": "../.."}
    assert about["properties"][1] == {"label-value": 1, "class": "blob"}
    assert labels["blob"].attrs["distillfss"]["model"]["digest"] == plain_student.digest()


def test_labels_of_a_coarser_level_lie_where_that_level_lies(plain_student, tmp_path):
    path = write_ome_zarr(tmp_path / "a.zarr", STACK, scale=(2.0, 0.5, 0.5), levels=2)
    group = zarr.open_group(path, mode="r+")
    about = group.attrs["ome"]
    about["multiscales"][0]["coordinateTransformations"] = [
        {"type": "scale", "scale": [1.0, 2.0, 2.0]},
        {"type": "translation", "translation": [10.0, 20.0, 30.0]},
    ]
    shift = {"type": "translation", "translation": [0.0, 0.25, 0.25]}
    about["multiscales"][0]["datasets"][1]["coordinateTransformations"].append(shift)
    group.attrs["ome"] = about
    volume = open_volume(path, level=1)
    assert volume.scale == (2.0, 2.0, 2.0)
    assert volume.origin == (10.0, 20.5, 30.5)
    segment_to_zarr(volume, plain_student, tmp_path / "out.zarr", tile=TILE)
    assert open_volume(tmp_path / "out.zarr").origin == (10.0, 20.5, 30.5)
    assert open_volume(tmp_path / "out.zarr").scale == (2.0, 2.0, 2.0)


def test_a_region_is_that_of_the_whole_and_can_be_extended(volume, plain_student, expected, tmp_path):
    out, once = tmp_path / "parts" / "out.ome.zarr", tmp_path / "once" / "out.ome.zarr"
    once.parent.mkdir()
    out.parent.mkdir()
    segment_to_zarr(volume, plain_student, once, tile=TILE)
    region = ((1, 4), (50, 130), (100, 200))
    segment_to_zarr(volume, plain_student, out, region=region, tile=TILE)
    inside = np.zeros_like(expected)
    box = tuple(slice(*span) for span in region)
    inside[box] = expected[box]
    assert np.array_equal(labels_of(out), inside)
    assert zarr.open_group(out, mode="r").attrs["distillfss"]["finished"] == [[list(span) for span in region]]
    assert (
        segment_to_zarr(
            volume, plain_student, out, region=((2, 3), (60, 90), (120, 130)), resume=True, tile=TILE
        ).computed
        == 0
    )
    segment_to_zarr(volume, plain_student, out, resume=True, tile=TILE)
    assert files_of(out) == files_of(once)
    for wrong in (((0, 6), (0, 9), (0, 9)), ((2, 2), (0, 9), (0, 9)), ((0, 1), (-1, 9), (0, 9))):
        with pytest.raises(SettingsError, match="region"):
            segment_to_zarr(volume, plain_student, out, region=wrong, tile=TILE)


def test_a_cancelled_run_goes_on_without_computing_again(volume, plain_student, expected, tmp_path):
    out = tmp_path / "out.ome.zarr"
    run = iter_segment(volume, plain_student, out, tile=TILE)
    for _ in range(4):
        next(run)
    run.close()
    seen = []
    original = plain_student.region_labels
    spied = pickle.loads(pickle.dumps(plain_student))
    spied.region_labels = lambda *a, **k: seen.append(1) or original(*a, **k)
    report = segment_to_zarr(volume, spied, out, resume=True, tile=TILE)
    assert report.finished >= 4
    assert len(seen) < 5 * 9 - 3 * 2
    assert np.array_equal(labels_of(out), expected)


@pytest.mark.parametrize("mode", ["planewise", "smoothed", "consensus"])
def test_a_run_by_planes_pauses_within_each_shard(plain_student, tmp_path, mode):
    """Who closes it need not wait for a shard, and nothing of the shard under way is taken for finished."""
    volume, options = open_volume(STACK[:, :100, :100]), {"tile": TILE, "mode": mode}
    segment_to_zarr(volume, plain_student, tmp_path / "once.ome.zarr", **options)
    run = iter_segment(volume, plain_student, tmp_path / "parts.ome.zarr", by_plane=True, **options)
    preparing = next(run)
    assert (preparing.index, preparing.total) == (0, 0)
    first = next(step for step in run if step.total)
    assert (first.index, first.total > 1, np.isnan(first.eta)) == (0, True, True)
    run.close()
    run = iter_segment(volume, plain_student, tmp_path / "parts.ome.zarr", resume=True, by_plane=True, **options)
    indices = [step.index for step in run]
    assert run.result().finished == 0
    assert sorted(set(indices)) == list(range(first.total + 1))
    assert indices == sorted(indices)
    assert len(indices) > first.total + 1
    assert np.array_equal(labels_of(tmp_path / "parts.ome.zarr"), labels_of(tmp_path / "once.ome.zarr"))


def test_a_half_written_shard_is_never_taken_for_whole(volume, plain_student, expected, tmp_path):
    out = tmp_path / "out.ome.zarr"
    segment_to_zarr(volume, plain_student, out, tile=TILE)
    before = files_of(out)
    shards = sorted((out / "0" / "c").rglob("[0-9]"))
    shards = [s for s in shards if s.is_file()]
    shards[0].write_bytes(shards[0].read_bytes()[:-7])
    shards[1].unlink()
    shards[2].write_bytes(b"")
    (shards[0].parent / "x.partial").write_bytes(b"left over")
    coarse = next(f for f in sorted((out / "1" / "c").rglob("[0-9]")) if f.is_file())
    coarse.write_bytes(coarse.read_bytes() + b"!")
    (out / "zarr.json").write_bytes(b"{")
    report = segment_to_zarr(volume, plain_student, out, resume=True, tile=TILE)
    assert report.finished == 27 - 3
    before.pop("zarr.json")
    after = files_of(out)
    assert json.loads(after.pop("zarr.json"))["attributes"]["ome"]
    assert after == before


def test_a_lost_shard_gets_back_what_an_earlier_region_had(volume, plain_student, expected, tmp_path):
    out = tmp_path / "out.ome.zarr"
    segment_to_zarr(volume, plain_student, out, region=((0, 1), (0, 200), (0, 200)), tile=TILE)
    for shard in [f for f in (out / "0" / "c").rglob("*") if f.is_file()]:
        shard.write_bytes(b"harmed")
    segment_to_zarr(volume, plain_student, out, region=((1, 2), (0, 200), (0, 200)), resume=True, tile=TILE)
    assert np.array_equal(labels_of(out)[:2], expected[:2])


def test_a_run_with_anything_else_is_refused_in_one_line(volume, plain_student, tmp_path):
    out = tmp_path / "out.ome.zarr"
    first = iter_segment(volume, plain_student, out, tile=TILE)
    next(first)
    with pytest.raises(OutputError, match="another run is writing"):
        segment_to_zarr(volume, plain_student, out, resume=True, tile=TILE)
    first.close()
    with pytest.raises(OutputError, match="is there already"):
        segment_to_zarr(volume, plain_student, out, tile=TILE)
    with pytest.raises(SettingsError, match="resume and overwrite contradict one another"):
        segment_to_zarr(volume, plain_student, out, tile=TILE, resume=True, overwrite=True)
    with pytest.raises(SettingsError, match="another volume"):
        segment_to_zarr(open_volume(STACK[:, ::-1]), plain_student, out, resume=True, tile=TILE)
    other = pickle.loads(pickle.dumps(plain_student))
    other.preprocess = replace(other.preprocess, scope="volume" if other.preprocess.scope == "image" else "image")
    with pytest.raises(SettingsError, match="another model"):
        segment_to_zarr(volume, other, out, resume=True, tile=TILE)
    with pytest.raises(SettingsError, match="another test-time augmentation"):
        segment_to_zarr(volume, plain_student.with_tta(), out, resume=True, tile=TILE)
    with pytest.raises(SettingsError, match="another layout, tile"):
        segment_to_zarr(volume, plain_student, out, resume=True, tile=192)
    for path in (volume.path, volume.path / "out.zarr", tmp_path):
        with pytest.raises(OutputError, match="is read"):
            segment_to_zarr(volume, plain_student, path, tile=TILE, overwrite=True)
    with pytest.raises(OutputError, match="not from here"):
        segment_to_zarr(open_volume(STACK), plain_student, tmp_path / "image.ome.zarr", tile=TILE)
    with pytest.raises(OutputError, match="not from here"):
        segment_to_zarr(open_volume(STACK), plain_student, tmp_path / "image.ome.zarr", tile=TILE, overwrite=True)
    with pytest.raises(OutputError, match="no folder"):
        segment_to_zarr(volume, plain_student, tmp_path / "no" / "out.zarr", tile=TILE)
    segment_to_zarr(volume, other, out, tile=TILE, overwrite=True)
    old = write_ome_zarr(tmp_path / "old.zarr", STACK, version="0.4")
    with pytest.raises(OutputError, match=r"no OME-Zarr 0\.5 image"):
        segment_to_zarr(open_volume(old), plain_student, old / "labels" / "blob", tile=TILE)


def test_labels_of_a_volume_are_not_taken_for_those_of_the_turned_one(plain_student, tmp_path):
    volume = open_volume(np.stack([blobs(seed, 40).image for seed in range(40)]))
    for begun, other in ((volume, volume.along("y")), (volume.along("y"), volume)):
        out = tmp_path / f"{begun.order}.ome.zarr"
        segment_to_zarr(begun, plain_student, out)
        with pytest.raises(SettingsError, match="another order of axes"):
            segment_to_zarr(other, plain_student, out, resume=True)
        assert segment_to_zarr(begun, plain_student, out, resume=True).computed == 0


def test_going_on_never_names_another_volume(volume, plain_student, tmp_path):
    out = tmp_path / "out.ome.zarr"
    part = ((0, 1), (None, None), (None, None))
    segment_to_zarr(volume, plain_student, out, region=part, tile=TILE)
    before = zarr.open_group(out, mode="r").attrs["distillfss"]
    other = write_ome_zarr(tmp_path / "other.ome.zarr", 255 - STACK, scale=(2.0, 0.5, 0.5), levels=1)
    with pytest.raises(SettingsError, match="another volume"):
        segment_to_zarr(open_volume(other), plain_student, out, resume=True, tile=TILE)
    copy = shutil.copytree(volume.path, tmp_path / "copy.ome.zarr")
    segment_to_zarr(open_volume(copy), plain_student, out, region=part, resume=True, tile=TILE)  # the same, elsewhere
    assert zarr.open_group(out, mode="r").attrs["distillfss"] == before


def test_labels_are_deleted_only_when_their_successor_can_begin(volume, plain_student, tmp_path, monkeypatch):
    out = tmp_path / "out.ome.zarr"
    segment_to_zarr(volume, plain_student, out, tile=TILE)
    before = files_of(out)
    with pytest.raises(SettingsError, match="no scheduler answers"):
        segment_to_zarr(volume, plain_student, out, tile=TILE, overwrite=True, cluster="tcp://127.0.0.1:9")
    dead = Connection(type("Client", (), {"run": lambda *_: {"a": "cpu float32"}})(), "auto", "auto")
    with pytest.raises(SettingsError, match="array in memory"):
        segment_to_zarr(open_volume(STACK), plain_student, out, tile=TILE, overwrite=True, cluster=dead)
    assert files_of(out) == before

    def killed(path, **_):
        next(f for f in path.rglob("*") if f.is_file()).unlink()
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(label_store.shutil, "rmtree", killed)
        with pytest.raises(KeyboardInterrupt):
            segment_to_zarr(volume, plain_student, out, tile=TILE, overwrite=True)
    assert not out.exists()
    segment_to_zarr(volume, plain_student, out, tile=TILE)
    assert files_of(out) == before
    assert sorted(f.name for f in tmp_path.iterdir()) == ["image.ome.zarr", "out.ome.zarr"]


def test_a_full_disk_stops_clearly_and_can_be_resumed(volume, plain_student, expected, tmp_path, monkeypatch):
    out = tmp_path / "out.ome.zarr"
    with monkeypatch.context() as patch:
        patch.setattr(zarr.storage.LocalStore, "set", _full_after(7, zarr.storage.LocalStore.set))
        with pytest.raises(OutputError, match=r"No space left on device.*kept"):
            segment_to_zarr(volume, plain_student, out, tile=TILE)
    report = segment_to_zarr(volume, plain_student, out, resume=True, tile=TILE)
    assert report.finished > 0
    assert np.array_equal(labels_of(out), expected)


def _full_after(count: int, original):
    """A disk that takes ``count`` shards, then no more."""
    taken = []

    async def put(self, key, value, *rest):
        if "/c/" in f"/{key}" or key.startswith("c/"):
            taken.append(key)
            if len(taken) > count:
                raise OSError(errno.ENOSPC, "No space left on device")
        return await original(self, key, value, *rest)

    return put


def test_damage_met_on_the_way_is_named_and_the_rest_is_kept(plain_student, tmp_path):
    path = write_ome_zarr(tmp_path / "a.zarr", STACK, chunks=(1, 200, 200), levels=1)
    (path / "0" / "c" / "4" / "0" / "0").write_bytes(b"nothing of the kind")
    with pytest.raises(InputFileError, match=r"a\.zarr.*z 4:5"):
        segment_to_zarr(open_volume(path), plain_student, tmp_path / "out.zarr", tile=TILE)
    broken = STACK.astype(np.float32)
    broken[3, 5, 5] = np.nan
    with pytest.raises(ImageError, match="plane 3"):
        segment_to_zarr(open_volume(broken), plain_student, tmp_path / "nan.zarr", tile=TILE)


def test_killed_at_any_moment_the_result_is_that_of_a_run_never_stopped(saved_model, tmp_path, root):
    image = write_ome_zarr(tmp_path / "image.ome.zarr", np.concatenate([STACK] * 2), levels=1)
    environment = {**os.environ, "PYTHONPATH": f"{root / 'src'}", "OMP_NUM_THREADS": "1"}
    code = root / "tests" / "helpers" / "segment_worker.py"

    def start(out: Path) -> subprocess.Popen:
        command = [sys.executable, str(code), str(image), str(saved_model), str(out), "64"]
        return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    for folder in ("once", "parts"):
        (tmp_path / folder).mkdir()
    once = start(tmp_path / "once" / "out.zarr")
    text, errors = once.communicate()
    assert once.returncode == 0, errors
    rng, out, kills = random.Random(0), tmp_path / "parts" / "out.zarr", 0
    journal = out / JOURNAL
    while True:
        process = start(out)
        lines = len(journal.read_bytes().splitlines()) if journal.exists() else 0
        more = rng.randint(0, 20)  # killed after so many further shards, or a little later
        while process.poll() is None and kills < 2:
            now = len(journal.read_bytes().splitlines()) if journal.exists() else 0
            if now > lines + more:
                time.sleep(rng.random() * 0.05)
                process.send_signal(signal.SIGKILL)
                kills += 1
                break
            time.sleep(0.002)
        text, errors = process.communicate()
        if process.returncode == 0:
            break
        assert process.returncode == -signal.SIGKILL, errors
    assert kills == 2
    assert int(text.split()[-1]) > 0  # found finished
    assert files_of(out) == files_of(tmp_path / "once" / "out.zarr")


def test_a_volume_that_states_too_many_small_planes_is_refused(plain_student, tmp_path):
    zarr.create_array(tmp_path / "a.zarr", shape=(2**31, 40, 48), chunks=(1, 16, 16), dtype="u1")
    volume = open_volume(tmp_path / "a.zarr")
    with pytest.raises(SettingsError, match=r"shards .* at most 1048576 are possible in one run"):
        segment_to_zarr(volume, plain_student, tmp_path / "o.ome.zarr")
    assert not (tmp_path / "o.ome.zarr").exists()


def test_a_volume_that_states_an_absurd_size_is_refused(plain_student, tmp_path):
    array = zarr.create_array(tmp_path / "a.zarr", shape=(4, 99_999_999_999, 256), chunks=(1, 128, 128), dtype="u1")
    assert array.ndim == 3
    volume = open_volume(tmp_path / "a.zarr")
    with pytest.raises(SettingsError, match=r"102399999998976 voxels .* at most 8796093022208 are possible in one run"):
        segment_to_zarr(volume, plain_student, tmp_path / "o.ome.zarr")
    assert not (tmp_path / "o.ome.zarr").exists()


def test_a_run_that_is_closed_before_its_first_shard_leaves_nothing(volume, plain_student, tmp_path):
    image, out = tmp_path / "image.ome.zarr", tmp_path / "out.ome.zarr"
    before = files_of(tmp_path)
    for labels in (out, image / "labels" / "blob"):
        run = iter_segment(volume, plain_student, labels, tile=TILE, by_plane=True)
        step = next(run)
        assert (step.index, step.total) == (0, 0)  # the preparation
        while not step.total:
            step = next(run)
        assert step.index == 0
        assert labels.is_dir()
        run.close()
        assert not labels.exists()
    after = files_of(tmp_path)
    listed = json.loads(after.pop(str(Path("image.ome.zarr", "labels", "zarr.json"))))
    assert listed["attributes"]["ome"]["labels"] == []
    after.pop(str(Path("image.ome.zarr", "labels", ".distillfss.lock")), None)
    assert after == before


def test_a_run_that_is_closed_later_keeps_what_is_finished(volume, plain_student, expected, tmp_path):
    out = tmp_path / "out.ome.zarr"
    run = iter_segment(volume, plain_student, out, tile=TILE)
    next(run)
    run.close()
    assert next(iter_segment(volume, plain_student, out, tile=TILE, resume=True)).index >= 1
    segment_to_zarr(volume, plain_student, out, resume=True, tile=TILE)
    np.testing.assert_array_equal(labels_of(out), expected)


def test_a_volume_that_cannot_be_segmented_leaves_nothing(plain_student, tmp_path):
    stack = STACK.astype(np.float32)
    stack[0, :3] = np.nan
    with pytest.raises(ImageError, match="NaN"):
        segment_to_zarr(open_volume(stack), plain_student, tmp_path / "out.ome.zarr", tile=TILE)
    assert list(tmp_path.iterdir()) == []


def test_what_others_have_put_among_labels_that_were_just_begun_stays(volume, plain_student, tmp_path):
    out = tmp_path / "out.ome.zarr"
    run = iter_segment(volume, plain_student, out, tile=TILE, by_plane=True)
    while not next(run).total:
        pass
    (out / "notes.txt").write_text("mine")
    run.close()
    assert (out / "notes.txt").read_text() == "mine"
