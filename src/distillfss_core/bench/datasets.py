"""The seven data sets of the DistillFSS benchmark [1]_: read as they are downloaded, split and scored as published.

The layouts of the folders are those that the published code expects. The splits of Industrial-5i, Pothole-mix, WeedMap
and Lung Nodule follow from the files alone. Nucleus, KVASIR-Seg and ISIC were split at random over the listing of a
folder, whose order is not published. A file ``test.csv`` (a column ``id``) in the folder defines the split. Without it,
sorted names are split by scikit-learn's ``train_test_split(test_size=0.2, random_state=42)``.

References
----------
.. [1] De Marinis, Blok, Kaymak, Brussee, Vessio, Castellano, "DistillFSS: Synthesizing Few-Shot Knowledge into a
   Lightweight Segmentation Model", arXiv:2512.05613, 2025.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import numpy as np
from PIL import Image

from distillfss_core.bench.pickled import read_pickled_table
from distillfss_core.errors import InputFileError, SettingsError
from distillfss_core.io.images import DECODER_ERRORS, PILLOW_SUFFIXES, read_image
from distillfss_core.io.labels import pair_files, read_labels
from distillfss_core.types import AnnotatedSlice, Array

Entry = TypeVar("Entry")

OWN = "own"
FOLD, FOLDS = 0, 4  # of Industrial-5i: classes 1, 5, 9, ... of its list


@dataclass(frozen=True)
class Item:
    """An image and its truth, not read yet; ``shows`` is the class that it is listed under (0: none)."""

    name: str
    read: Callable[[], AnnotatedSlice]
    shows: int = 0


@dataclass(frozen=True)
class Split:
    """Training and test images of a data set.

    Parameters
    ----------
    classes : sequence of str
        Names of classes 1..K.
    training, test : sequence of Item
    one_scale : bool
        Whether intensities mean the same in all images (CT).
    """

    classes: Sequence[str]
    training: Sequence[Item]
    test: Sequence[Item]
    one_scale: bool = False


@dataclass(frozen=True)
class DataSet:
    """A data set of the benchmark.

    Parameters
    ----------
    title, home, layout : str
        Its name, where it comes from with its license, and what must lie in the folder.
    shots : (int, int)
        Annotated pictures of the published comparison, few and many.
    side : int or None
        Scores are taken at this size, y and x; None: at the pictures' own.
    published : mapping of int to (float, float)
        Shots -> foreground IoU of TransferFSS and of DistillFSS in the paper, 0..1.
    """

    title: str
    home: str
    layout: str
    shots: tuple[int, int]
    side: int | None
    load: Callable[[Path], Split]
    published: dict[int, tuple[float, float]] = field(default_factory=dict)

    def open(self, folder: str | Path) -> Split:
        """Find the pictures; they are read on access.

        Raises
        ------
        InputFileError
            If something is not where it should be; one line names the files and the source of the data set.
        """
        folder = Path(folder)
        try:
            if not folder.is_dir():
                raise _Missing(f"there is no folder {folder}")
            split = self.load(folder)
            for what, items in (("training", split.training), ("test", split.test)):
                if not items:
                    raise _Missing(f"{folder} holds no {what} pictures")
            return split
        except _Missing as missing:
            raise InputFileError(f"{self.title}: {missing}; wanted: {self.layout}; source: {self.home}") from None


class _Missing(Exception):
    """A file of the layout that the folder does not have."""


def find_set(name: str) -> DataSet:
    """The data set of a name.

    Raises
    ------
    SettingsError
        If there is none.
    """
    if name not in SETS:
        raise SettingsError(f"there is no data set {name!r}; choose one of {', '.join(SETS)}")
    return SETS[name]


# -- loaders ---------------------------------------------------------------------------------------------


def _nucleus(folder: Path) -> Split:
    if (folder / "images").is_dir() and (folder / "labels").is_dir():
        return Split(("nucleus",), *_split(_pairs(folder), folder))
    cases = [case for case in sorted(folder.iterdir()) if (case / "images").is_dir() and (case / "masks").is_dir()]
    if not cases:
        raise _Missing(f"{folder} has neither folders ID/images with ID/masks nor images and labels")

    def read(case: Path) -> AnnotatedSlice:
        image = _rgb(_only(case / "images"))
        labels = np.zeros(image.shape[:2], np.uint8)
        for mask in _pictures(case / "masks"):
            labels |= _mask(mask, 128)
        return AnnotatedSlice(image, labels, case.name)

    return Split(("nucleus",), *_split([_item(read, case.name, case) for case in cases], folder))


def _own(folder: Path) -> Split:
    if not ((folder / "images").is_dir() and (folder / "labels").is_dir()):
        raise _Missing(f"{folder} has no folders images and labels")
    return Split(("object",), *_split(_pairs(folder), folder))


def _pairs(folder: Path) -> list[Item]:
    def read(image: Path, labels: Path) -> AnnotatedSlice:
        return AnnotatedSlice(_rgb(image), (read_labels(labels) > 0).astype(np.uint8), image.stem)

    pairs = sorted(pair_files(folder / "images", folder / "labels"), key=lambda pair: pair[0].stem)
    return [_item(read, image.stem, image, labels) for image, labels in pairs]


def _lung(folder: Path) -> Split:
    wanted = ("lung_cancer_train.pkl", "lung_cancer_test.pkl")
    base = next((f for f in (folder, *sorted(folder.glob("*/"))) if (f / wanted[0]).is_file()), folder)
    parts = []
    for name in wanted:
        if not (base / name).is_file():
            raise _Missing(f"there is no {base / name}")
        columns = read_pickled_table(base / name, ("hu_array", "mask"))
        kind = name.split("_")[-1].removesuffix(".pkl")
        read = [
            _item(_ct_plane, f"{kind} {i}", np.asarray(image), np.asarray(mask), f"{kind} {i}")
            for i, (image, mask) in enumerate(zip(columns["hu_array"], columns["mask"], strict=True))
        ]
        parts.append(read)
    return Split(("nodule",), parts[0], parts[1], one_scale=True)


def _ct_plane(image: Array, mask: Array, source: str) -> AnnotatedSlice:
    return AnnotatedSlice(image, (mask > 0).astype(np.uint8), source)


def _isic(folder: Path) -> Split:
    table, images, masks = (
        folder / "ISIC_2019_Training_GroundTruth.csv",
        folder / "ISIC2018_Task1-2_Training_Input",
        folder / "ISIC2018_Task1_Training_GroundTruth",
    )
    if not table.is_file():
        raise _Missing(f"there is no {table}")
    _need_folders(images, masks)
    diagnoses = {"NV": 1, "MEL": 2, "BKL": 3}
    shows = {}
    for row in _rows_of(table):
        chosen = [number for column, number in diagnoses.items() if float(row.get(column) or 0) == 1]
        if chosen:
            shows[row["image"].removesuffix("_downsampled")] = chosen[0]

    def read(name: str) -> AnnotatedSlice:
        mask = _mask(masks / f"{name}_segmentation.png", 128)
        return AnnotatedSlice(_rgb(images / f"{name}.jpg"), mask * np.uint8(shows[name]), name)

    names = sorted(p.name.removesuffix("_segmentation.png") for p in masks.glob("*_segmentation.png"))
    items = [_item(read, name, name, shows=shows[name]) for name in names if name in shows]
    return Split(("nevus", "melanoma", "seborrheic keratosis"), *_split(items, folder))


def _kvasir(folder: Path) -> Split:
    base = folder / "Kvasir-SEG" if (folder / "Kvasir-SEG").is_dir() else folder
    _need_folders(base / "images", base / "masks")

    def read(name: str) -> AnnotatedSlice:
        return AnnotatedSlice(_rgb(base / "images" / name), _mask(base / "masks" / name, 246), Path(name).stem)

    items = [_item(read, path.stem, path.name) for path in _pictures(base / "masks")]
    return Split(("polyp",), *_split(items, base))


def _weedmap(folder: Path) -> Split:
    places = (".", "RedEdge", "Tiles/RedEdge", "0_rotations_processed_003_test/RedEdge")
    base = next((folder / p for p in places if (folder / p / "000").is_dir()), None)
    if base is None:
        raise _Missing(f"{folder} has no folder RedEdge/000")
    fields = []
    for number in ("000", "003"):
        tiles, truth = base / number / "tile", base / number / "groundtruth"
        _need_folders(*(tiles / c for c in "RGB"), truth)
        fields.append([_item(_weed_tile, f"{number} {p.stem}", tiles, truth, p.name) for p in _pictures(tiles / "R")])
    return Split(("crop", "weed"), fields[0], fields[1])


def _weed_tile(tiles: Path, truth: Path, name: str) -> AnnotatedSlice:
    channels = [_numbers(tiles / channel / name) for channel in "RGB"]
    path = truth / f"{truth.parent.name}_{Path(name).stem}_GroundTruth_iMap.png"
    numbers = _numbers(path)
    crop, weed = np.isin(numbers, (1, 10000)), numbers == 2
    if (beyond := numbers[~(crop | weed | (numbers == 0))]).size:
        raise InputFileError(f"{path}: holds the label {beyond[0]}; 0, 1 or 10000 (crop) and 2 (weed) are known")
    return AnnotatedSlice(np.stack(channels, -1), (crop + 2 * weed).astype(np.uint8), f"{truth.parent.name} {name}")


def _pothole(folder: Path) -> Split:
    parts = []
    for part in ("training", "testing"):
        _need_folders(folder / part)
        cases = [case for case in sorted((folder / part).iterdir()) if (case / "images").is_dir()]
        if not cases:
            raise _Missing(f"{folder / part} holds no folder with images and masks")
        _need_folders(*(case / "masks" for case in cases))
        items = [
            _item(_pothole_picture, f"{part} {case.name}.{image.stem}", image, case / "masks" / f"{image.stem}.png")
            for case in cases
            for image in _pictures(case / "images")
        ]
        parts.append(items)
    return Split(("pothole",), parts[0], parts[1])


def _pothole_picture(image: Path, mask: Path) -> AnnotatedSlice:
    return AnnotatedSlice(_rgb(image), _mask(mask, 1), image.stem)


def _industrial(folder: Path) -> Split:
    listing = folder / "data.json"
    if not listing.is_file():
        raise _Missing(f"there is no {listing}")
    try:
        record = json.loads(listing.read_text())
        names = [str(name) for name in record["clsName"]]
        listed = [(str(path), kind) for kind, images in record["clsDic"].items() for path in images["bad"]]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputFileError(f"{listing}: has no lists clsName and clsDic ({error}); download it anew") from error
    chosen = {name: i for i, name in enumerate(names[FOLD::FOLDS][: len(names) // FOLDS], 1)}
    training, test = _published_split(listed)

    def items(part: Iterable[tuple[str, str]]) -> list[Item]:
        images = []
        for path, kind in part:
            if kind in chosen:
                inside = Path(path).relative_to("data") if Path(path).parts[0] == "data" else Path(path)
                image = next((f for f in (folder / inside, folder / "data" / inside) if f.is_file()), None)
                if image is None:
                    raise _Missing(f"there is no {folder / inside}")
                name = f"{kind}_{image.stem}"
                images.append(_item(_defect, name, image, chosen[kind], name, shows=chosen[kind]))
        return images

    return Split(tuple(chosen), items(training), items(test))


def _defect(image: Path, kind: int, source: str) -> AnnotatedSlice:
    return AnnotatedSlice(_rgb(image), _mask(image.with_suffix(".bmp"), 1) * np.uint8(kind), source)


# -- parts of loaders ------------------------------------------------------------------------------------


def _item(read: Callable[..., AnnotatedSlice], name: str, *arguments: object, shows: int = 0) -> Item:
    return Item(name, lambda: read(*arguments), shows)


def _split(items: list[Item], folder: Path) -> tuple[list[Item], list[Item]]:
    """Training and test, by ``test.csv`` where there is one."""
    listing = folder / "test.csv"
    if not listing.is_file():
        return _published_split(items)
    by_name = {item.name: item for item in items}
    named = [row.get("id", "") for row in _rows_of(listing)]
    if unknown := [name for name in named if name not in by_name]:
        raise InputFileError(f"{listing}: names {unknown[0]!r}, which is not there; it needs a column id of pictures")
    return [item for item in items if item.name not in set(named)], [by_name[name] for name in named]


def _published_split(items: Sequence[Entry]) -> tuple[list[Entry], list[Entry]]:
    from sklearn.model_selection import train_test_split

    if len(items) < 2:
        raise _Missing(f"{len(items)} pictures were found")
    training, test = train_test_split(list(items), test_size=0.2, random_state=42)
    return training, test


def _need_folders(*folders: Path) -> None:
    for folder in folders:
        if not folder.is_dir():
            raise _Missing(f"there is no folder {folder}")


def _pictures(folder: Path) -> list[Path]:
    return sorted(p for p in folder.iterdir() if p.suffix.lower() in PILLOW_SUFFIXES and not p.name.startswith("."))


def _only(folder: Path) -> Path:
    images = _pictures(folder)
    if len(images) != 1:
        raise InputFileError(f"{folder}: holds {len(images)} pictures where one is wanted")
    return images[0]


def _rows_of(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def _rgb(path: Path) -> Array:
    """Three channels: gray is repeated, an alpha channel left out."""
    image = read_image(path)
    return image[..., :3] if image.ndim == 3 else np.repeat(image[..., None], 3, -1)


def _mask(path: Path, least: int) -> Array:
    """1 where a picture, turned gray, is ``least`` or brighter; uint8 "y x"."""
    return (np.asarray(_opened(path).convert("L")) >= least).astype(np.uint8)


def _numbers(path: Path) -> Array:
    """The numbers of a picture's (first) channel, "y x"."""
    array = np.asarray(_opened(path))
    return array[..., 0] if array.ndim == 3 else array


def _opened(path: Path) -> Image.Image:
    if not path.is_file():
        raise InputFileError(f"{path}: no such file; the data set is not whole")
    try:
        picture = Image.open(path)
        picture.load()
        return picture
    except DECODER_ERRORS as error:
        raise InputFileError(f"{path}: cannot be read ({error}); download it anew") from error


SETS = {
    "nucleus": DataSet(
        "Nucleus",
        "Data Science Bowl 2018, kaggle.com/c/data-science-bowl-2018 or bbbc.broadinstitute.org/BBBC038 (CC0)",
        "the unpacked stage1_train (ID/images/*.png, ID/masks/*.png), or images/NAME.png with labels/NAME.png",
        (5, 50),
        384,
        _nucleus,
        {5: (0.7312, 0.6957), 50: (0.7939, 0.7996)},
    ),
    "lung": DataSet(
        "Lung Nodule",
        "Lung cancer segmentation dataset with Lung-RADS class, doi.org/10.17632/5rr22hgzwr.1 (license: see there)",
        "lung_cancer_train.pkl and lung_cancer_test.pkl",
        (5, 50),
        384,
        _lung,
        {5: (0.0343, 0.0331), 50: (0.0251, 0.0487)},
    ),
    "isic": DataSet(
        "ISIC",
        "ISIC 2018 task 1 with the labels of ISIC 2019, challenge.isic-archive.com/data (CC BY-NC 4.0)",
        "ISIC_2019_Training_GroundTruth.csv, ISIC2018_Task1-2_Training_Input and ISIC2018_Task1_Training_GroundTruth",
        (9, 60),
        384,
        _isic,
        {9: (0.1435, 0.1331), 60: (0.2215, 0.2341)},
    ),
    "kvasir": DataSet(
        "KVASIR-Seg",
        "Kvasir-SEG, datasets.simula.no/kvasir-seg (for research and education; license: see there)",
        "Kvasir-SEG with images/*.jpg and masks/*.jpg",
        (5, 50),
        384,
        _kvasir,
        {5: (0.4518, 0.3729), 50: (0.5997, 0.5709)},
    ),
    "weedmap": DataSet(
        "WeedMap",
        "Remote Sensing 2018 Weed Map, projects.asl.ethz.ch/datasets (license: see there); the paper has a copy of it "
        "named 0_rotations_processed_003_test",
        "RedEdge/000 (training) and RedEdge/003 (test), each with tile/R, tile/G, tile/B and groundtruth",
        (5, 50),
        None,
        _weedmap,
        {5: (0.5101, 0.4443), 50: (0.6418, 0.6196)},
    ),
    "pothole": DataSet(
        "Pothole-mix",
        "Pothole Mix, data.mendeley.com/datasets/kfth5g2xk3/2 (license: see there)",
        "training/SOURCE/images, training/SOURCE/masks and the same of testing",
        (5, 50),
        384,
        _pothole,
        {5: (0.1736, 0.1701), 50: (0.3177, 0.3196)},
    ),
    "industrial": DataSet(
        "Industrial-5i",
        "Industrial-5i, scidb.cn, files data.zip and data.json (license: see there)",
        "data.json and the unpacked data.zip (pictures .png, masks .bmp beside them)",
        (10, 80),
        384,
        _industrial,
        {10: (0.0409, 0.0350), 80: (0.4819, 0.4609)},
    ),
    OWN: DataSet(
        "your own",
        "your own pictures",
        "images/NAME.EXT with labels/NAME.EXT; whatever is not 0 is the object",
        (5, 50),
        None,
        _own,
    ),
}
"""By the names of ``--data``; "own" is any folder of images and labels, without published figures."""
