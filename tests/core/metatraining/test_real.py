"""Tasks from folders of real pictures: repeatable, well formed, and honest about files that do not fit."""

import json

import numpy as np
import pytest
import tifffile
from PIL import Image

pytest.importorskip("skimage")

from distillfss_core.errors import DistillFSSError, ImageError, InputFileError, SettingsError
from distillfss_core.metatraining.real import RealSource, _draw_object, _truly_empty
from distillfss_core.types import IGNORE


def plain(image, rng, *, strength):
    """In place of the optics: pictures as they are."""
    return image


def discs(seed: int, shape=(90, 110), color=True):
    """Bright discs (class 1) and dim squares (class 2) over a textured ground."""
    rng = np.random.default_rng(seed)
    image = rng.normal(70, 8, (*shape, 3) if color else shape)
    labels = np.zeros(shape, np.uint8)
    y, x = np.indices(shape)
    for number, light in ((1, 200), (2, 120)):
        for _ in range(3):
            cy, cx = rng.uniform(10, shape[0] - 10), rng.uniform(10, shape[1] - 10)
            dy, dx = np.abs(y - cy), np.abs(x - cx)
            inside = dy**2 + dx**2 < 90 if number == 1 else np.maximum(dy, dx) < 8
            labels[inside] = number
            image[inside] = light + rng.normal(0, 5, image[inside].shape)
    return np.clip(image, 0, 255).astype(np.uint8), labels


def write_set(folder, pictures=4, labeled=True, color=True, ignore=False):
    (folder / "images").mkdir(parents=True)
    if labeled:
        (folder / "labels").mkdir()
    for i in range(pictures):
        image, labels = discs(i, color=color)
        if ignore:
            labels[:20] = IGNORE
        Image.fromarray(image).save(folder / "images" / f"p{i}.png")
        if labeled:
            Image.fromarray(labels).save(folder / "labels" / f"p{i}.png")
    return folder


def tasks(source: RealSource, count: int, superpixel=False, **settings):
    """The first tasks of one kind."""
    found = []
    for seed in range(400):
        task = source.task(seed, **settings)
        if task.source.endswith("/superpixel") == superpixel:
            found.append(task)
        if len(found) == count:
            return found
    raise AssertionError("too few tasks of this kind")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two sets, of color and gray pictures."""
    top = tmp_path_factory.mktemp("real")
    write_set(top / "color")
    write_set(top / "gray", color=False)
    about = {"name": "gray", "what": "discs", "license": "CC0", "repo": "a/b", "cite": "Doe 2024"}
    (top / "gray" / "SOURCE.json").write_text(json.dumps(about))
    return top


@pytest.fixture(scope="module")
def source(folder):
    return RealSource([folder])


def test_the_same_seed_gives_the_same_task_whatever_was_drawn_before(folder, source):
    wanted = [source.task([3, n], size=64) for n in range(12)]
    for n in reversed(range(12)):
        task = RealSource([folder], memory=50_000).task([3, n], size=64)
        assert task.source == wanted[n].source
        assert (task.images == wanted[n].images).all()
        assert (task.labels == wanted[n].labels).all()
    assert len({w.images.tobytes() for w in wanted}) == 12


@pytest.mark.parametrize(("n_images", "size"), [(2, 64), (5, 96), (4, 256)])
def test_views_are_bytes_of_the_size_asked_for(source, n_images, size):
    for seed in range(12):
        task = source.task(seed, n_images=n_images, size=size)
        assert task.images.shape == (n_images, size, size, 3)
        assert task.labels.shape == (n_images, size, size)
        assert task.images.dtype == task.labels.dtype == np.uint8
        assert set(np.unique(task.labels)) <= {0, 1}


def test_at_least_two_views_show_the_object(source):
    for seed in range(60):
        shown = (source.task(seed, size=64).labels == 1).any((1, 2))
        assert shown.sum() >= 2


def test_image_and_labels_are_cut_and_turned_alike(tmp_path):
    """The picture is its own truth, so a threshold on a view finds its labels again, up to polarity."""
    (tmp_path / "images").mkdir()
    (tmp_path / "labels").mkdir()
    for i in range(4):
        labels = (discs(i)[1] == 1).astype(np.uint8)
        Image.fromarray(40 + 160 * labels).save(tmp_path / "images" / f"{i}.png")
        Image.fromarray(labels).save(tmp_path / "labels" / f"{i}.png")
    for task in tasks(RealSource([tmp_path], degrade=plain), 30, size=128):
        middle = (task.images.max() / 2 + task.images.min() / 2).astype(int)
        agreement = ((task.images[..., 0] > middle) == (task.labels == 1)).mean()
        assert max(agreement, 1 - agreement) > 0.97


def test_pixels_that_nobody_labeled_stay_ignored(tmp_path):
    source = RealSource([write_set(tmp_path / "part", ignore=True)], degrade=plain)
    found = tasks(source, 20, size=64)
    assert any((task.labels == IGNORE).any() for task in found)
    assert all(set(np.unique(task.labels)) <= {0, 1, IGNORE} for task in found)


def write_masks(folder, object_value, stacked=False):
    """Discs as masks in which ``object_value`` is the object; one picture shows none."""
    (folder / "images").mkdir(parents=True)
    (folder / "labels").mkdir()
    images, masks = [], []
    for n in range(4):
        image, labels = discs(n, color=False)
        images.append(image)
        masks.append((labels == 1).astype(np.uint8) * np.uint8(object_value if n else 0))
    if stacked:
        tifffile.imwrite(folder / "images" / "v.tif", np.stack(images), photometric="minisblack")
        tifffile.imwrite(folder / "labels" / "v.tif", np.stack(masks), photometric="minisblack")
    for n in range(0 if stacked else 4):
        Image.fromarray(images[n]).save(folder / "images" / f"{n}.png")
        Image.fromarray(masks[n]).save(folder / "labels" / f"{n}.png")
    return folder


@pytest.mark.parametrize("stacked", [False, True])
def test_masks_of_0_and_255_give_the_tasks_that_masks_of_0_and_1_give(tmp_path, stacked):
    ones, masks = (RealSource([write_masks(tmp_path / str(v) / "s", v, stacked)]) for v in (1, 255))
    assert masks.licenses() == ones.licenses()  # which may decode files before any is indexed
    for seed in range(20):
        wanted, task = (source.task(seed, size=64) for source in (ones, masks))
        assert task.source == wanted.source
        assert (task.images == wanted.images).all()
        assert (task.labels == wanted.labels).all()
        assert set(np.unique(task.labels)) == {0, 1}


def test_one_class_anywhere_in_a_set_makes_255_ignored_in_all_its_files(tmp_path):
    folder = write_masks(tmp_path / "s", 255)
    labels = np.zeros((90, 110), np.uint8)
    labels[30:60, 30:60] = 1
    Image.fromarray(labels).save(folder / "labels" / "0.png")
    found = tasks(RealSource([folder]), 30, size=64)
    assert any((task.labels == IGNORE).any() for task in found)


def test_classes_are_merged_into_one_object_or_its_complement():
    counts = np.zeros((3, 256), np.int64)
    counts[:, :4] = 500, 100, 200, 100
    tables = {tuple(_draw_object(np.random.default_rng(seed), counts)[:4].tolist()) for seed in range(300)}
    assert {(0, 1, 0, 0), (0, 0, 1, 0), (0, 1, 0, 1), (0, 1, 1, 1)} <= tables
    assert (1, 0, 0, 0) in tables  # without the union of all classes
    assert not any(len(set(table)) < 2 for table in tables)


def test_classes_that_never_meet_are_not_merged_nor_taken_as_absent():
    counts = np.zeros((3, 256), np.int64)
    counts[:, 0] = 900
    counts[0, 1] = counts[1, 2] = 100  # picture 2 is empty
    for seed in range(50):
        table = _draw_object(np.random.default_rng(seed), counts)
        assert table[1] != table[2]
    only_first = np.arange(256) == 1
    assert _truly_empty(counts, only_first).tolist() == [2]


def test_sets_that_are_kept_out_are_never_drawn(folder, source):
    assert source.sets == ("color", "gray")
    rest = RealSource([folder], holdout=["gray"])
    assert rest.sets == ("color",)
    assert {rest.task(seed, size=64).source.split("/")[1] for seed in range(10)} == {"color"}


def test_licenses_come_from_the_source_file(source):
    first, second = source.licenses()
    assert second == {
        "name": "gray",
        "what": "discs",
        "license": "CC0",
        "repo": "a/b",
        "citation": "Doe 2024",
        "pictures": 4,
    }
    assert first["license"] == ""


def test_pictures_without_labels_give_superpixel_tasks_only(tmp_path):
    write_set(tmp_path / "bare", labeled=False)
    for where in (tmp_path, tmp_path / "bare", tmp_path / "bare" / "images"):
        source = RealSource([where])
        for seed in range(4):
            task = source.task(seed, size=96)
            assert task.source == f"real/{source.sets[0]}/superpixel"
            share = (task.labels == 1).mean((1, 2))
            assert (share > 0).all()
            assert 0.005 < share.mean() < 0.7


def test_a_superpixel_keeps_its_light_through_all_views(tmp_path):
    """Image and label are warped alike: a bright disc stays under its label."""
    (tmp_path / "images").mkdir()
    y, x = np.indices((120, 120))
    image = np.where((y - 50) ** 2 + (x - 70) ** 2 < 400, 220, 60).astype(np.uint8)
    Image.fromarray(image).save(tmp_path / "images" / "disc.png")
    source = RealSource([tmp_path], degrade=plain)
    contrasts = []
    for seed in range(12):
        task = source.task(seed, size=96)
        for view, label in zip(task.images[..., 0].astype(float), task.labels, strict=True):
            contrasts.append(abs(np.median(view[label == 1]) - np.median(view[label == 0])))
    assert np.median(contrasts) > 80


def test_a_flat_picture_still_gives_a_task(tmp_path):
    (tmp_path / "images").mkdir()
    Image.fromarray(np.full((40, 60), 9, np.uint8)).save(tmp_path / "images" / "flat.png")
    task = RealSource([tmp_path]).task(0, size=64)
    assert (task.labels == 1).any()


def write_volume(folder, planes=5, dtype=np.uint16):
    (folder / "images").mkdir(parents=True)
    (folder / "labels").mkdir()
    images, labels = zip(*[discs(n, color=False) for n in range(planes)], strict=True)
    tifffile.imwrite(folder / "images" / "v.tif", np.stack(images).astype(dtype) * 100, metadata={"axes": "ZYX"})
    tifffile.imwrite(folder / "labels" / "v.tif", np.stack(labels), metadata={"axes": "ZYX"})
    return folder


def test_each_plane_of_a_volume_is_a_picture(tmp_path):
    source = RealSource([write_volume(tmp_path / "volume")], degrade=plain)
    assert source.licenses()[0]["pictures"] == 5
    for task in tasks(source, 5, size=64):
        assert task.images.max() > 150  # 16 bits were stretched
        assert (task.labels == 1).any()


def test_gray_pictures_hold_the_same_values_three_times(folder):
    for task in tasks(RealSource([folder / "gray"], degrade=plain), 3, size=64):
        assert (task.images[..., :1] == task.images).all()


def test_little_memory_gives_up_old_pictures(folder):
    source = RealSource([folder], memory=60_000)
    for seed in range(6):
        source.task(seed, size=64)
    assert source._bytes <= 60_000


def broken_folder(tmp_path, what):
    if what == "size":
        write_set(tmp_path / "s")
        Image.fromarray(np.ones((30, 40), np.uint8)).save(tmp_path / "s" / "labels" / "p2.png")
    elif what == "depth":
        write_volume(tmp_path / "s")
        tifffile.imwrite(tmp_path / "s" / "labels" / "v.tif", np.ones((3, 90, 110), np.uint8), photometric="minisblack")
    elif what == "numbers":
        write_set(tmp_path / "s")
        Image.fromarray(np.full((90, 110), 300, np.uint16)).save(tmp_path / "s" / "labels" / "p1.png")
    elif what == "speck":
        (tmp_path / "s" / "images").mkdir(parents=True)
        Image.fromarray(np.ones((9, 40), np.uint8)).save(tmp_path / "s" / "images" / "p.png")
    return tmp_path


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("size", r"p2\.png: is 30 x 40 but p2\.png is 90 x 110"),
        ("depth", r"v\.tif: has 3 planes, v\.tif has 5"),
        ("numbers", r"p1\.png: holds the label 300"),
        ("speck", r"p\.png: is 9 x 40 pixels"),
    ],
)
def test_a_file_that_does_not_fit_is_named(tmp_path, what, message):
    source = RealSource([broken_folder(tmp_path, what)])
    with pytest.raises(ImageError, match=message) as error:
        [source.task(seed, size=64) for seed in range(40)]
    assert "\n" not in str(error.value)


def test_a_missing_or_empty_folder_is_named(tmp_path):
    with pytest.raises(InputFileError, match="nowhere: no such folder"):
        RealSource([tmp_path / "nowhere"])
    with pytest.raises(InputFileError, match="no picture in this folder"):
        RealSource([tmp_path])
    (tmp_path / "file.png").write_bytes(b"")
    with pytest.raises(InputFileError, match="is a file"):
        RealSource([tmp_path / "file.png"])


def test_a_damaged_source_file_is_named(tmp_path):
    write_set(tmp_path / "s", pictures=1)
    (tmp_path / "s" / "SOURCE.json").write_text("{")
    with pytest.raises(InputFileError, match=r"SOURCE\.json: is no JSON"):
        RealSource([tmp_path])


def test_names_of_sets_are_checked(folder):
    with pytest.raises(SettingsError, match="no set 'violet' to keep out; there are: color, gray"):
        RealSource([folder], holdout=["violet"])
    with pytest.raises(SettingsError, match="all sets are kept out"):
        RealSource([folder], holdout=["gray", "color"])
    with pytest.raises(SettingsError, match="two sets have the name 'gray'"):
        RealSource([folder, folder / "gray"])
    with pytest.raises(SettingsError, match="no folder"):
        RealSource([])


def test_too_few_or_too_small_views_are_refused(source):
    with pytest.raises(DistillFSSError, match="at least 2 images of at least 32 pixels"):
        source.task(0, n_images=1)
    with pytest.raises(DistillFSSError, match="size is 8"):
        source.task(0, size=8)


def test_labels_without_a_class_leave_superpixels(tmp_path, caplog):
    write_set(tmp_path / "s", pictures=1)
    Image.fromarray(np.full((90, 110), IGNORE, np.uint8)).save(tmp_path / "s" / "labels" / "p0.png")
    source = RealSource([tmp_path])
    assert source.task(0, size=64).source == "real/s/superpixel"
    assert "hold no class" in caplog.text


def test_the_shared_pictures_give_tasks(shared):
    folder = shared / "train"
    if not folder.is_dir():
        pytest.skip("needs ../shared/train beside the project")
    source = RealSource([folder])
    assert len(source.sets) > 40
    assert all(row["license"] and row["citation"] and row["pictures"] for row in source.licenses())
    seen = set()
    for seed in range(10):
        task = source.task([7, seed])
        seen.add(task.source)
        assert (task.labels == 1).any((1, 2)).sum() >= 2
        assert all(view.std() > 1 for view in task.images)
    assert len(seen) > 5
