"""The benchmark's data sets: every loader reads the layout that is downloaded, and says what is missing."""

import csv
import shutil

import numpy as np
import pytest

from distillfss_core.bench.datasets import SETS, find_set
from distillfss_core.bench.pickled import read_pickled_table
from distillfss_core.errors import InputFileError, SettingsError
from layouts import LAYOUTS, picture, write_hostile_table, write_pairs

CLASSES = {"isic": 3, "weedmap": 2, "industrial": 5}
LOSSLESS = ("nucleus", "pothole", "industrial", "own", "weedmap")


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Folder of each data set."""
    folders = {}
    for name, write in LAYOUTS.items():
        folders[name] = tmp_path_factory.mktemp(name)
        write(folders[name])
    return folders


@pytest.mark.parametrize("name", SETS)
def test_a_loader_reads_its_layout(made, name):
    split = SETS[name].open(made[name])
    assert len(split.classes) == CLASSES.get(name, 1)
    training, test = {i.name for i in split.training}, {i.name for i in split.test}
    assert len(training) == len(split.training) > len(test) == len(split.test) > 0
    assert not training & test
    for item in (split.training[0], split.test[-1]):
        labeled = item.read()
        assert labeled.labels.dtype == np.uint8
        assert 0 < labeled.labels.max() <= len(split.classes)
        if item.shows:
            assert set(np.unique(labeled.labels)) == {0, item.shows}


@pytest.mark.parametrize("name", ["nucleus", "lung", "own", "kvasir"])
def test_pixels_and_truth_are_those_of_the_files(made, name):
    split = SETS[name].open(made[name])
    item = next(i for i in split.training)
    labeled = item.read()
    image, mask = picture(int(item.name.removeprefix("train").lstrip("idpck").strip()))
    np.testing.assert_array_equal(labeled.labels, mask)
    if name == "lung":
        np.testing.assert_array_equal(labeled.image, image[..., 0].astype(float) - 1000)
        assert split.one_scale
    elif name != "kvasir":  # JPEG
        np.testing.assert_array_equal(labeled.image, image)


def test_the_split_of_nucleus_is_the_published_one(made):
    """By an own reading of train_test_split: a permutation of RandomState(42), the first fifth is the test part."""
    names = [f"id{i:02d}" for i in range(10)]
    order = np.random.RandomState(42).permutation(10)
    split = SETS["nucleus"].open(made["nucleus"])
    assert [i.name for i in split.test] == [names[i] for i in order[:2]]
    assert [i.name for i in split.training] == [names[i] for i in order[2:]]


def test_the_real_nuclei_are_split_as_published(shared):
    split = SETS["nucleus"].open(shared / "data" / "dsb2018")
    assert (len(split.training), len(split.test)) == (531, 133)
    labeled = split.test[0].read()
    assert labeled.image.shape == (*labeled.labels.shape, 3)


def test_a_list_of_test_pictures_is_obeyed(made, tmp_path):
    shutil.copytree(made["kvasir"], tmp_path, dirs_exist_ok=True)
    with (tmp_path / "Kvasir-SEG" / "test.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["id"], ["ck07"], ["ck01"]])
    split = SETS["kvasir"].open(tmp_path)
    assert [i.name for i in split.test] == ["ck07", "ck01"]
    assert len(split.training) == 8
    (tmp_path / "Kvasir-SEG" / "test.csv").write_text("id\nck99\n")
    with pytest.raises(InputFileError, match="ck99"):
        SETS["kvasir"].open(tmp_path)


def test_industrial_takes_every_fourth_class(made):
    split = SETS["industrial"].open(made["industrial"])
    assert list(split.classes) == ["kind00", "kind04", "kind08", "kind12", "kind16"]
    assert len(split.training) + len(split.test) == 25


def test_weeds_and_crops_are_told_apart(made):
    split = SETS["weedmap"].open(made["weedmap"])
    labels = next(i for i in split.training if i.name == "000 frame0001_0").read().labels
    assert set(np.unique(labels)) == {0, 1, 2}
    assert (labels[:4, :4] == 2).all()


@pytest.mark.parametrize("name", SETS)
def test_what_is_missing_is_one_line_with_the_source(name, tmp_path):
    with pytest.raises(InputFileError) as error:
        SETS[name].open(tmp_path)
    text = str(error.value)
    assert "\n" not in text
    assert text.startswith(SETS[name].title)
    assert SETS[name].home in text
    with pytest.raises(InputFileError, match="there is no folder"):
        SETS[name].open(tmp_path / "nowhere")


def test_a_missing_mask_is_named(made, tmp_path):
    shutil.copytree(made["pothole"], tmp_path, dirs_exist_ok=True)
    split = SETS["pothole"].open(tmp_path)
    lost = next(tmp_path.glob("training/*/masks/*.png"))
    lost.unlink()
    with pytest.raises(InputFileError, match=lost.name):
        [item.read() for item in split.training]


def test_a_table_that_would_run_something_is_not_read(tmp_path):
    write_hostile_table(tmp_path / "lung_cancer_train.pkl")
    with pytest.raises(InputFileError, match="mkdir"):
        SETS["lung"].open(tmp_path)
    assert not (tmp_path / "lung_cancer_train.pkl.was-run").exists()


def test_a_damaged_table_is_one_line(made, tmp_path):
    whole = (made["lung"] / "lung_cancer_train.pkl").read_bytes()
    (tmp_path / "short.pkl").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(InputFileError, match=r"short\.pkl: cannot be read"):
        read_pickled_table(tmp_path / "short.pkl", ("mask",))
    with pytest.raises(InputFileError, match="no column 'x'"):
        read_pickled_table(made["lung"] / "lung_cancer_train.pkl", ("x",))


def test_an_unknown_set_is_told_which_there_are():
    with pytest.raises(SettingsError, match="nucleus, lung"):
        find_set("cityscapes")


def test_one_picture_cannot_be_split(tmp_path):
    write_pairs(tmp_path, count=1)
    with pytest.raises(InputFileError, match="1 pictures"):
        SETS["own"].open(tmp_path)
