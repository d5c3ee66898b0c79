"""The long jobs without a window, and what is said of them."""

from threading import Event

import numpy as np
import pytest
import tifffile

from distillfss_core import AnnotatedSlice, DistillFSSError, DistillSettings, StudentModel, SupportSet, open_volume
from napari_distillfss import _format as fmt
from napari_distillfss._annotations import Annotations
from napari_distillfss._tasks import iter_applying, iter_import, iter_teacher, iter_until, thumbnail, tiles_on_screen


def drain(run):
    while True:
        try:
            next(run)
        except StopIteration as end:
            return end.value


def test_tiles_on_screen_come_from_its_middle_and_no_others():
    tiles = tiles_on_screen([100] * 10, [100] * 10, ((310, 490), (510, 590)))
    assert [(y.start, x.start) for y, x in tiles] in ([(300, 500), (400, 500)], [(400, 500), (300, 500)])
    assert len(tiles_on_screen([100] * 3, [100] * 2, ((0, 300), (0, 200)))) == 6


def test_work_that_is_told_to_stop_closes_its_run():
    closed = []

    def endless():
        try:
            while True:
                yield 1
        finally:
            closed.append(True)

    stop = Event()
    run = iter_until(endless(), stop)
    next(run)
    stop.set()
    assert drain(run) is None
    assert closed == [True]


def test_applying_stops_between_the_planes_of_its_first_piece(student, sample, tmp_path):
    volume, stop, model = open_volume(sample.image), Event(), StudentModel.load(student)
    run = iter_applying(volume, model, tmp_path / "labels.ome.zarr", stop)
    steps = [next(run) for _ in range(2)]
    assert [step.text for step in steps] == ["preparing", "segmenting the first piece"]
    stop.set()
    assert drain(run) is None
    done = drain(iter_applying(volume, model, tmp_path / "labels.ome.zarr", Event()))
    assert done.finished == 0


def test_the_preparation_of_a_teacher_shows_its_steps_and_stops_between_them(sample):
    labels = (sample.labels[2] > 0).astype(np.uint8)
    stop, steps = Event(), []
    run = iter_teacher(
        lambda: SupportSet([AnnotatedSlice(sample.image[2], labels)]), DistillSettings(), "prototype", stop
    )
    for step in run:
        steps.append(step)
        if getattr(step, "stage", "") == "zoom":
            break
    assert 1 == steps[-1].index < steps[-1].total
    stop.set()
    assert drain(run) is None


@pytest.fixture
def annotations(tmp_path):
    return Annotations(tmp_path / "a", (4, 20, 30), lambda z: (z,))


def test_labels_of_a_whole_stack_are_taken_over_where_there_are_any(tmp_path, annotations):
    labels = np.zeros((4, 20, 30), np.uint8)
    labels[2, 5:9] = 3
    tifffile.imwrite(tmp_path / "l.tif", labels, photometric="minisblack", metadata={"axes": "ZYX"})
    ((z, before, _),) = drain(iter_import(annotations, tmp_path / "l.tif", (4, 20, 30), 0, "masks", Event()))
    assert (z, before.any()) == (2, False)
    assert set(np.unique(annotations.plane(2))) == {1, 2}


def test_labels_of_one_plane_go_into_the_plane_on_screen(tmp_path, annotations):
    tifffile.imwrite(tmp_path / "l.tif", np.eye(20, 30, dtype=np.uint8))
    ((z, _, _),) = drain(iter_import(annotations, tmp_path / "l.tif", (4, 20, 30), 3, "classes", Event()))
    assert z == 3


def test_labels_of_another_size_are_one_sentence(tmp_path, annotations):
    tifffile.imwrite(tmp_path / "l.tif", np.eye(20, 31, dtype=np.uint8))
    with pytest.raises(DistillFSSError, match="give labels of the same size"):
        drain(iter_import(annotations, tmp_path / "l.tif", (4, 20, 30), 3, "classes", Event()))


def test_a_thumbnail_is_stretched_and_small():
    small = thumbnail(np.linspace(0, 1e6, 200 * 300).reshape(200, 300))
    assert small.shape == (48, 48)
    assert (small.min(), small.max()) == (0, 255)
    assert thumbnail(np.zeros((20, 30, 3))).shape == (48, 48)


def test_the_time_left_is_judged_by_the_last_steps():
    now = iter([0.0, 10.0, 12.0])
    pace = fmt.Pace(lambda: next(now))
    assert pace.left(5, 10) == pytest.approx(10)
    assert pace.left(6, 10) == pytest.approx(8)


def test_sizes_times_and_shares_are_said_in_words():
    assert [fmt.size(n) for n in (12, 4.3e9)] == ["12 bytes", "4.3 GB"]
    assert [fmt.duration(s) for s in (5, 600, 9000, float("nan"))] == ["5 s", "10 min", "2.5 h", "?"]
    assert [fmt.lengths(*s) for s in ((0.008, 0.008), (0.5,), (800.0, 800.0), (2500.0,), (0.05, 4.0))] == [
        "8 × 8 nm",
        "0.5 µm",
        "0.8 × 0.8 mm",
        "2.5 mm",
        "0.05 × 4 µm",
    ]
    assert [fmt.count(n, "piece") for n in (1, 2)] == ["1 piece", "2 pieces"]
    assert [fmt.share(s) for s in (0, 0.001, 0.5)] == ["0 %", "<1 %", "50 %"]


def test_a_volume_says_its_size_pixel_and_memory():
    from napari.layers import Image

    from napari_distillfss._layers import choose_layer

    text = fmt.volume(choose_layer(Image(np.zeros((4, 20, 30), np.uint16), scale=(2, 0.5, 0.5), units=("um",) * 3)))
    assert "4 × 20 × 30 voxels (z y x), uint16" in text
    assert "0.5 × 0.5 µm, planes every 2 µm" in text
    assert open_volume(np.zeros((4, 20, 30))).scale == (None, None, None)
