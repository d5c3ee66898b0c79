"""A task to learn few-shot segmentation from: images of one kind of object, and where it is in each."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

F32 = npt.NDArray[np.float32]
U8 = npt.NDArray[np.uint8]


@dataclass(frozen=True, eq=False)
class Task:
    """Views that any of the others may explain.

    Parameters
    ----------
    images : uint8 array, shape (n, size, size, 3)
        Gray pictures hold the same values three times.
    labels : uint8 array, shape (n, size, size)
        1 where the object is, 0 where it is not, IGNORE where nothing is known.
    source : str
        Where the task comes from: "synthetic/tubes", "real/wbc_krd", ...
    """

    images: U8
    labels: U8
    source: str

    def __len__(self) -> int:
        return len(self.images)
