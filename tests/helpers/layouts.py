"""Tiny made-up copies of the benchmark's data sets, in the layout in which each is downloaded."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

SIZE = 48


def picture(seed: int, size: int = SIZE) -> tuple[np.ndarray, np.ndarray]:
    """An RGB picture of two bright squares on noise, and where they are."""
    rng = np.random.default_rng(seed)
    image, mask = rng.integers(20, 60, (size, size, 3), dtype=np.uint8), np.zeros((size, size), bool)
    for _ in range(2):
        y, x = rng.integers(2, size - 14, 2)
        mask[y : y + 12, x : x + 12] = True
    image[mask] += 120
    return image, mask


def save(path: Path, array: np.ndarray) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path, **({"quality": 95} if path.suffix == ".jpg" else {}))
    return path


def gray(mask: np.ndarray) -> np.ndarray:
    return mask.astype(np.uint8) * 255


def write_nucleus(folder: Path, count: int = 10) -> None:
    for i in range(count):
        image, mask = picture(i)
        save(folder / f"id{i:02d}" / "images" / f"id{i:02d}.png", image)
        left = mask & (np.arange(SIZE) < SIZE // 2)
        save(folder / f"id{i:02d}" / "masks" / "a.png", gray(left))
        save(folder / f"id{i:02d}" / "masks" / "b.png", gray(mask & ~left))


def write_pairs(folder: Path, count: int = 10, size: int = SIZE) -> None:
    """Images and labels: the flattened layout of Nucleus, and that of one's own pictures."""
    for i in range(count):
        image, mask = picture(i, size)
        save(folder / "images" / f"p{i:02d}.png", image)
        save(folder / "labels" / f"p{i:02d}.png", mask.astype(np.uint8) * 7)


def write_lung(folder: Path) -> None:
    import pandas

    for name, count in (("train", 6), ("test", 3)):
        masks = [picture(i)[1] for i in range(count)]
        planes = [(picture(i)[0][..., 0].astype(np.float64) - 1000) for i in range(count)]
        columns = {"label1": [3] * count, "mask": masks, "hu_array_old": planes, "hu_array": planes}
        folder.mkdir(parents=True, exist_ok=True)
        pandas.DataFrame(columns).to_pickle(folder / f"lung_cancer_{name}.pkl")


def write_isic(folder: Path) -> None:
    lines = ["image,MEL,NV,BCC,AK,BKL,DF,VASC,SCC,UNK"]
    for i in range(15):
        name, column = f"ISIC_{i:07d}", (2, 1, 5)[i % 3]  # NV, MEL, BKL
        image, mask = picture(i)
        save(folder / "ISIC2018_Task1-2_Training_Input" / f"{name}.jpg", image)
        save(folder / "ISIC2018_Task1_Training_GroundTruth" / f"{name}_segmentation.png", gray(mask))
        ones = ["1.0" if c == column else "0.0" for c in range(1, 10)]
        lines.append(",".join([name + "_downsampled" * (i % 2), *ones]))
    (folder / "ISIC_2019_Training_GroundTruth.csv").write_text("\n".join(lines) + "\n")


def write_kvasir(folder: Path) -> None:
    for i in range(10):
        image, mask = picture(i)
        save(folder / "Kvasir-SEG" / "images" / f"ck{i:02d}.jpg", image)
        save(folder / "Kvasir-SEG" / "masks" / f"ck{i:02d}.jpg", np.repeat(gray(mask)[..., None], 3, -1))


def write_weedmap(folder: Path) -> None:
    for number, count in (("000", 6), ("003", 3)):
        for i in range(count):
            image, mask = picture(i)
            for c, channel in enumerate("RGB"):
                save(folder / "RedEdge" / number / "tile" / channel / f"frame{i:04d}_0.png", image[..., c])
            truth = np.where(mask, 10000, 0).astype(np.uint16)
            if i % 2:
                truth[:4, :4] = 2
            save(folder / "RedEdge" / number / "groundtruth" / f"{number}_frame{i:04d}_0_GroundTruth_iMap.png", truth)


def write_pothole(folder: Path) -> None:
    for part, count in (("training", 6), ("validation", 1), ("testing", 3)):
        for i in range(count):
            image, mask = picture(i)
            case = folder / part / ("edmcrack600", "pothole600")[i % 2]
            save(case / "images" / (f"{i:03d}.jpg" if i % 3 else f"{i:03d}.png"), image)
            color = np.zeros((SIZE, SIZE, 3), np.uint8)
            color[mask] = (0, 0, 255)
            save(case / "masks" / f"{i:03d}.png", color)


def write_industrial(folder: Path) -> None:
    names = [f"kind{k:02d}" for k in range(20)]
    listed: dict[str, dict[str, list[str]]] = {name: {"bad": [], "good": []} for name in names}
    for k, name in enumerate(names):
        for i in range(5):
            image, mask = picture(10 * k + i)
            save(folder / name / f"{i}.png", image)
            save(folder / name / f"{i}.bmp", gray(mask))
            listed[name]["bad"].append(f"data/{name}/{i}.png")
    (folder / "data.json").write_text(json.dumps({"clsName": names, "clsDic": listed}))


def write_hostile_table(path: Path) -> None:
    """A pickle that makes a folder where it is loaded as pickles are."""
    import os

    class Hostile:
        def __reduce__(self) -> tuple[Callable[..., None], tuple[str]]:
            return os.mkdir, (str(path) + ".was-run",)

    path.write_bytes(pickle.dumps(Hostile()))


LAYOUTS: dict[str, Callable[[Path], None]] = {
    "nucleus": write_nucleus,
    "lung": write_lung,
    "isic": write_isic,
    "kvasir": write_kvasir,
    "weedmap": write_weedmap,
    "pothole": write_pothole,
    "industrial": write_industrial,
    "own": write_pairs,
}
