"""Labels that look beyond their plane are those computed in memory, and quieter."""

from __future__ import annotations

import json
import pickle
import warnings
from fractions import Fraction

import numpy as np
import pytest
import zarr

from distillfss_core.cli.main import main
from distillfss_core.errors import ConsensusWarning, IntensityWarning, SettingsError
from distillfss_core.models.student import StudentModel
from distillfss_core.segmentation.modes import ConsensusLabels, SmoothedLabels
from distillfss_core.segmentation.to_zarr import iter_segment, segment_to_zarr
from distillfss_core.settings import DistillSettings
from distillfss_core.training import distill
from distillfss_core.volumes.volume import open_volume
from pictures import blobs
from volumes import noise, write_ome_zarr

TILE = 32
SMALL = {"crop_size": 64, "queries": 2, "shots": 2, "crops": 8}


@pytest.fixture(scope="module")
def ball() -> np.ndarray:
    """A bright ball of radius 12 in noise."""
    z, y, x = np.indices((40, 44, 48))
    image = np.where((z - 20) ** 2 + (y - 22) ** 2 + (x - 24) ** 2 < 144, 180.0, 100.0)
    return (image + np.random.default_rng(0).normal(0, 8, image.shape)).clip(0, 255).astype(np.uint8)


def labels_of(path) -> np.ndarray:
    return zarr.open_array(path / "0", mode="r")[...]


def test_a_volume_along_another_axis_has_the_same_voxels(tmp_path):
    array = noise((5, 7, 9))
    volume = open_volume(write_ome_zarr(tmp_path / "a.zarr", array, scale=(1.0, 2.0, 3.0), chunks=(2, 3, 4)))
    for axis, order in (("y", (1, 0, 2)), ("x", (2, 0, 1))):
        turned = volume.along(axis)
        assert np.array_equal(turned.read(), array.transpose(order))
        assert np.array_equal(turned[1:3, 2, 4:], array.transpose(order)[1:3, 2, 4:])
        assert turned.shape == turned.read().shape
        assert turned.scale == tuple((1.0, 2.0, 3.0)[k] for k in order)
        assert turned.chunks == tuple((2, 3, 4)[k] for k in order)
        assert np.array_equal(pickle.loads(pickle.dumps(turned)).read(), turned.read())
    color = open_volume(noise((3, 4, 5, 3)), axes="zyxc", channel="all")
    assert color.along("x").shape == (5, 3, 4, 3)


def test_smoothing_is_that_of_probabilities_in_memory_for_any_shards(plain_student, tmp_path, monkeypatch):
    stack = np.stack([blobs(seed, 90).image for seed in (0, 0, 1, 2, 2)])
    planes = np.stack([plain_student.predict(plane, tile=TILE).probabilities for plane in stack])
    around = np.concatenate([np.zeros_like(planes[:1]), planes, np.zeros_like(planes[:1])])
    expected = (2 * planes + around[:-2] + around[2:]).argmax(1)
    monkeypatch.setattr("distillfss_core.labelstore.layout._SHARD", 2 * 32 * 32)
    monkeypatch.setattr("distillfss_core.labelstore.layout._SIDE", 32)
    segment_to_zarr(open_volume(stack), plain_student, tmp_path / "out.zarr", mode="smoothed", tile=TILE)
    assert np.array_equal(labels_of(tmp_path / "out.zarr"), expected)
    assert not np.array_equal(expected, planes.argmax(1))


def test_a_consensus_is_the_mean_of_three_directions_for_any_blocks(plain_student: StudentModel, ball, tmp_path):
    def along(order: tuple[int, int, int]) -> np.ndarray:
        planes = [plain_student.predict_region(*whole(plane), tile=TILE) for plane in ball.transpose(order)]
        return np.stack(planes, 1).transpose(0, *(1 + np.argsort(order)))

    volume = open_volume(ball)
    mode_labels = ConsensusLabels(volume, plain_student, tile=TILE)
    limits = {order: mode_labels._others[k].limits(0) for k, order in enumerate([(1, 0, 2), (2, 0, 1)])}
    order = (0, 1, 2)

    def whole(plane: np.ndarray):
        pixels, shape, region, own = plain_student._whole(plane)
        return pixels, shape, region, limits.get(order, own)

    total = along(order)
    for order in ((1, 0, 2), (2, 0, 1)):
        total = total + along(order)
    expected = total.argmax(0)
    segment_to_zarr(volume, plain_student, tmp_path / "out.zarr", mode="consensus", tile=TILE)
    assert np.array_equal(labels_of(tmp_path / "out.zarr"), expected)
    truth = np.indices(ball.shape)
    inside = sum((axis - c) ** 2 for axis, c in zip(truth, (20, 22, 24), strict=True)) < 144
    planes = np.stack([plain_student.predict_labels(plane, tile=TILE) for plane in ball])
    assert (expected == inside).mean() > (planes == inside).mean()
    region = ((10, 35), (5, 30), (33, 47))
    segment_to_zarr(volume, plain_student, tmp_path / "part.zarr", region=region, mode="consensus", tile=TILE)
    box = tuple(slice(*span) for span in region)
    assert np.array_equal(labels_of(tmp_path / "part.zarr")[box], expected[box])


def test_a_mode_that_does_not_go_with_the_volume_is_refused(plain_student, tmp_path, caplog):
    flat = open_volume(write_ome_zarr(tmp_path / "a.zarr", noise((9, 32, 32)), scale=(2.0, 0.5, 0.5)))
    with pytest.raises(SettingsError, match=r"2 x 0.5 x 0.5.*mode smooth"):
        segment_to_zarr(flat, plain_student, tmp_path / "out.zarr", mode="consensus")
    with pytest.raises(SettingsError, match="has one plane"):
        ConsensusLabels(open_volume(noise((32, 32))), plain_student)
    with pytest.raises(SettingsError, match="no mode 'magic'"):
        segment_to_zarr(flat, plain_student, tmp_path / "out.zarr", mode="magic")
    segment_to_zarr(flat, plain_student, tmp_path / "out.zarr")
    with pytest.raises(SettingsError, match="another mode"):
        segment_to_zarr(flat, plain_student, tmp_path / "out.zarr", resume=True, mode="smoothed")
    ConsensusLabels(open_volume(noise((4, 32, 32))), plain_student)
    assert "taken to be cubes" in caplog.text


@pytest.fixture(scope="module")
def quick_student(support) -> StudentModel:
    """A student after one step: its labels mean nothing."""
    model = distill(
        support, DistillSettings(steps=1, head="none", probe="none", zoom=Fraction(1), device="cpu", **SMALL)
    )
    model.halo = 32
    return model


@pytest.fixture
def compared(monkeypatch) -> list[object]:
    """Regions in which directions were compared; each time they are found to be contrary."""
    regions = []

    def compare(_, region, block):
        regions.append(region)
        warnings.warn("stack: is contrary", ConsensusWarning, stacklevel=1)
        return "stack: is contrary"

    monkeypatch.setattr("distillfss_core.segmentation.modes.compare_directions", compare)
    return regions


def test_directions_are_compared_before_the_first_shard_only(quick_student, ball, compared, tmp_path):
    """A run that goes on compares no directions, and one of another region does. The report holds both warnings."""
    negative = open_volume(255 - ball[:, :32])
    out, options = tmp_path / "out.zarr", {"mode": "consensus", "tile": TILE, "resume": True}
    first, second = ((0, 32), (0, 32), (0, 48)), ((32, 40), (0, 32), (0, 48))
    run = iter_segment(negative, quick_student, out, region=first, **options)
    with pytest.warns(ConsensusWarning, match="contrary"):
        next(run)
    assert compared == [first]
    run.close()
    with pytest.warns(IntensityWarning, match="inverted"):
        report = segment_to_zarr(negative, quick_student, out, region=first, **options)
    assert report.finished >= 1
    assert report.warning.endswith("distill with slices of this kind")
    assert compared == [first]
    with pytest.warns(IntensityWarning, match="inverted"):
        report = segment_to_zarr(negative, quick_student, out, region=second, **options)
    assert report.warning.endswith("distill with slices of this kind; stack: is contrary")
    assert compared == [first, second]


def test_contrary_directions_are_a_line_of_the_command(quick_student, ball, compared, tmp_path, capsys):
    np.save(tmp_path / "ball.npy", ball[:8, :32, :32])
    quick_student.save(tmp_path / "m.safetensors")
    command = ["segment", str(tmp_path / "ball.npy"), "-m", str(tmp_path / "m.safetensors"), "--json"]
    assert main([*command, "-o", str(tmp_path / "a.ome.zarr"), "--mode", "consensus"]) == 0
    printed = capsys.readouterr()
    assert printed.err.splitlines().count("distillfss: warning: stack: is contrary") == 1
    assert json.loads(printed.out)["warning"] == "stack: is contrary"
    assert main([*command, "-o", str(tmp_path / "b.ome.zarr")]) == 0
    assert json.loads(capsys.readouterr().out)["warning"] == ""
    assert len(compared) == 1


def test_one_plane_is_smoothed_to_itself(plain_student, tmp_path):
    plane = blobs(1, 64).image
    mode_labels = SmoothedLabels(open_volume(plane), plain_student)
    box = ((0, 1), (0, 64), (0, 64))
    assert np.array_equal(mode_labels.labels(box, mode_labels.read(box))[0], plain_student.predict_labels(plane))
