"""Texts of the dock: sizes, shares, stages and sentences."""

import numpy as np
import pytest

from napari_distillfss import _format as fmt
from napari_distillfss._annotations import PaintedSlice


def painted_slice(**pixels):
    counts = np.zeros(256, np.int64)
    for label, count in pixels.items():
        counts[int(label[1:])] = count
    return PaintedSlice(7, counts, True)


def test_the_shares_of_a_slice_name_what_they_are_of():
    slice_ = painted_slice(_0=900, _1=37, _2=63)
    assert fmt.painted(slice_, ("object",)) == "plane 7: 10 % labeled\n63 % of the labeled pixels are object"
    slice_ = painted_slice(_0=0, _1=20, _2=50, _3=30)
    expected = "plane 7: 100 % labeled\nof the labeled pixels: 50 % nucleus, 30 % debris"
    assert fmt.painted(slice_, ("nucleus", "debris")) == expected


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("no slice is annotated; paint", "No slice is annotated; paint"),
        ("3 slices are back", "3 slices are back"),
        ("training, about 3 s left", "Training, about 3 s left"),
        ("stack.tif: is damaged", "stack.tif: is damaged"),
        ("my stack.tif: is damaged", "my stack.tif: is damaged"),
        ("/data/a.tif is away", "/data/a.tif is away"),
        ("two lines\nsecond: one", "Two lines\nsecond: one"),
        ("", ""),
    ],
)
def test_a_line_begins_with_a_capital_letter_unless_with_a_file(text, sentence):
    assert fmt.sentence(text) == sentence


@pytest.mark.parametrize(("count", "digits", "text"), [(1_566_000_000, 2, "1.6 GB"), (1_566_000_000, 3, "1.57 GB")])
def test_sizes_have_as_many_digits_as_needed(count, digits, text):
    assert fmt.size(count, digits) == text


def test_progress_of_a_training_names_what_goes_on(qtbot):
    from distillfss_core import TrainStep
    from napari_distillfss._tasks import Doing
    from napari_distillfss._threads import Job
    from napari_distillfss._widgets._common import JobBar

    def work(stop):
        yield Doing("loading the backbone")
        yield TrainStep(1, 4, stage="fit")
        yield TrainStep(2, 4, stage="fit")
        yield TrainStep(4, 4, stage="fit")
        yield TrainStep(1, 10, {"student": 0.5}, stage="joint")

    job = Job()
    bar = JobBar(job, cancel="stop")
    qtbot.addWidget(bar)
    texts, ranges = [], []
    job.stepped.connect(lambda _: texts.append(bar.text.text()))
    job.stepped.connect(lambda _: ranges.append((bar.bar.value(), bar.bar.maximum())))
    with qtbot.waitSignal(job.ended):
        job.start(work)
    assert texts[0] == "Loading the backbone"
    assert texts[1].startswith("Fitting the probe, 1 of 4, about ")
    assert texts[3] == "Preparing augmented crops"  # which is what follows
    assert texts[4].startswith("Training, 1 of 10, loss 0.5, about ")
    assert ranges[1:3] == [(1, 4), (2, 4)]
    assert (ranges[0][1], ranges[3][1]) == (0, 0)  # without a number of steps


def test_the_total_of_slices_names_the_pixels_of_each_class():
    first, second = painted_slice(_0=2_000_000, _1=1_200_000, _2=800_000), painted_slice(_0=0, _1=99, _2=999_600)
    text = "2 slices, 60 % labeled; pixels: background 1.2 M, nucleus 800 k, debris 1.0 M"
    assert fmt.total([(first, ("nucleus",)), (second, ("debris",))]) == text
    assert [fmt.short(n) for n in (0, 999, 1000, 9949, 9950, 999_499, 999_500, 12_345_678)] == [
        "0", "999", "1.0 k", "9.9 k", "10 k", "999 k", "1.0 M", "12 M",
    ]  # fmt: skip
