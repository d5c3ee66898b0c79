"""A task for few-shot learning: images of one kind of object, and the masks of the object."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

F32 = npt.NDArray[np.float32]
U8 = npt.NDArray[np.uint8]


@dataclass(frozen=True, eq=False)
class Task:
    """Images of one kind of object; any of them may serve as support of the others.

    Parameters
    ----------
    images : uint8 array, shape (n, size, size, 3)
        Gray images hold the same values three times.
    labels : uint8 array, shape (n, size, size)
        1 where the object is, 0 where it is not, IGNORE where nothing is annotated.
    source : str
        Where the task comes from: "synthetic/tubes", "real/wbc_krd", ...
    """

    images: U8
    labels: U8
    source: str

    def __len__(self) -> int:
        return len(self.images)
