"""SAM's embeddings of views, computed once and kept on disk."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from distillfss_core.io.writing import atomic_path, make_folder
from distillfss_core.nn.device import Device
from distillfss_core.nn.sam import PATCH, WIDTH, SamEncoder
from distillfss_core.training.backbone_views import Views

_HEADER = 128  # bytes of a .npy file before its values
_NAME = re.compile(r"[0-9a-f]{64}\.npy")


def embedding_files(folder: Path) -> list[Path]:
    """The files of embeddings in a folder; others that lie there are not touched."""
    return [file for file in folder.glob("*.npy") if _NAME.fullmatch(file.name)]


class SamEmbeddings:
    """Embeddings of views by a SAM, in half precision, in a folder with a budget of bytes.

    The name of a file is the SHA-256 of SAM's weights, of its precision, and of the pixels. So any training on the
    same views takes it. Where the budget is used up, the files that were used longest ago, before this training, make
    room. Stored and fresh embeddings are equal: both are rounded, and each view is computed on its own.

    Parameters
    ----------
    sam : SamEncoder
        On the device.
    views : Views
        Each is enlarged to the side of SAM.
    device : Device
    folder : Path
        Made if need be.
    budget : int
        Bytes of all embeddings in the folder.
    """

    def __init__(self, sam: SamEncoder, views: Views, device: Device, folder: Path, budget: int) -> None:
        self.sam: SamEncoder = sam
        self.views: Views = views
        self.device: Device = device
        self.folder: Path = folder
        self.budget: int = budget
        self.origin: dict[str, str] = sam.origin()
        make_folder(folder, parents=True)
        files = sorted(((f.stat(), f) for f in embedding_files(folder)), key=lambda pair: pair[0].st_mtime)
        self._sizes: dict[Path, int] = {file: stat.st_size for stat, file in files}  # the oldest first
        self._used: set[Path] = set()

    @property
    def held(self) -> int:
        """Bytes of the embeddings in the folder."""
        return sum(self._sizes.values())

    def prepare(self, indices: Sequence[int]) -> Iterator[tuple[int, int]]:
        """Compute the embeddings of views as far as the budget goes; yields how many are done, and of how many."""
        for number, index in enumerate(indices):
            pixels = self.views.view(index)
            path = self._path(pixels)
            if self._read(path) is None and not self._keep(path, self._compute(pixels)):
                return
            yield number + 1, len(indices)

    def batch(self, indices: Sequence[int]) -> tuple[Float[Tensor, "b 3 s s"], Float[Tensor, "b 256 g g"]]:
        """Views in [0, 1] and their embeddings, float32 on the device."""
        views = [self.views.view(index) for index in indices]
        embeddings = torch.stack([torch.from_numpy(self._embedding(pixels)) for pixels in views])
        images = self.device.upload(torch.stack(views)) / 255.0
        return images, self.device.upload(embeddings).float()

    def _embedding(self, pixels: UInt8[Tensor, "3 s s"]) -> npt.NDArray[np.float16]:
        path = self._path(pixels)
        embedding = self._read(path)
        if embedding is None:
            embedding = self._compute(pixels)
            self._keep(path, embedding)
        return embedding

    def _path(self, pixels: UInt8[Tensor, "3 s s"]) -> Path:
        what = f"{self.origin['digest']} {self.device.precision} {tuple(pixels.shape)} ".encode()
        return self.folder / f"{hashlib.sha256(what + pixels.numpy().tobytes()).hexdigest()}.npy"

    def _read(self, path: Path) -> npt.NDArray[np.float16] | None:
        """The stored embedding; None where there is none, or it is damaged."""
        grid = self.sam.side // PATCH
        try:
            embedding: npt.NDArray[np.float16] = np.load(path, allow_pickle=False)
        except (OSError, ValueError, EOFError):
            return None
        if embedding.dtype != np.float16 or embedding.shape != (WIDTH, grid, grid):
            return None
        self._used.add(path)
        return embedding

    def _keep(self, path: Path, embedding: npt.NDArray[np.float16]) -> bool:
        """Store an embedding, if the budget has room; whether it had."""
        size = embedding.nbytes + _HEADER
        unused = (file for file in list(self._sizes) if file not in self._used)
        self._sizes.pop(path, None)  # a damaged one
        while self.held + size > self.budget and (oldest := next(unused, None)):
            oldest.unlink(missing_ok=True)
            self._sizes.pop(oldest, None)
        if self.held + size > self.budget:
            return False
        with atomic_path(path) as temporary:
            np.save(temporary, embedding)
        self._sizes[path] = size
        self._used.add(path)
        return True

    def _compute(self, pixels: UInt8[Tensor, "3 s s"]) -> npt.NDArray[np.float16]:
        with self.device.autocast():
            embedding = self.sam(self.device.upload(pixels[None]) / 255.0)
        result: npt.NDArray[np.float16] = embedding[0].half().cpu().numpy()
        return result
