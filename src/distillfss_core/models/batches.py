"""Labels of many planes at once, for devices that compute large batches.

Raw pixels are copied to the device, labels are copied back.

::

    this process     read a tile of n planes | pinned copy of a batch | pinned copy of the next | labels of the first
    the device                               | limits, zoom, network, labels of a batch | of the next | ...

The copies are asynchronous: while the device computes a batch, this process prepares the next.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt
import torch
from jaxtyping import Float, Shaped, UInt8
from torch import Tensor

from distillfss_core.models.preprocess import Limits, Preprocess, resize
from distillfss_core.nn.device import Device, out_of_memory, release_memory
from distillfss_core.nn.features import strongest
from distillfss_core.types import Array

log: logging.Logger = logging.getLogger(__name__)

PIXELS = 1 << 23
"""Pixels after zooming in a batch: enough to keep a large GPU busy."""
NEVER = -1e4
"""The margin of a class without example: minus infinity cannot be interpolated."""
_AHEAD = 2  # batches whose labels the device has not returned yet

Network = Callable[[Tensor], Tensor]
"""From zoomed images "b 3 h w" in [0, 1] to margins "b k hg wg", on a grid of any size that covers them."""

Crop = tuple[slice, slice]


class PlaneBatches:
    """Compute the labels of one window of many planes.

    A batch always has as many planes as the size of its window allows. The last batch is filled up with copies of its
    last plane, so that the labels of a plane do not depend on the number of planes beside it.

    Parameters
    ----------
    network, preprocess, device
        Of the model.
    step : int
        Sides of windows are padded to multiples of it, by reflection.
    pixels : int
        Of a batch, after zooming. It is halved where the device runs out of memory.
    """

    def __init__(
        self, network: Network, preprocess: Preprocess, device: Device, *, step: int, pixels: int = PIXELS
    ) -> None:
        self.network: Network = network
        self.preprocess: Preprocess = preprocess
        self.device: Device = device
        self.step: int = step
        self.pixels: int = pixels
        self._pending: deque[tuple[Tensor, torch.cuda.Event | None, npt.NDArray[np.uint8]]] = deque()

    def label(
        self, windows: Shaped[Array, "n y x c"], crop: Crop, limits: Sequence[Limits], out: UInt8[Array, "n h w"]
    ) -> bool:
        """Put the labels of a part of the window into ``out``, which is complete after `finish`.

        Parameters
        ----------
        windows : array "n y x c"
            The window of each plane, with the channels of the model.
        crop : two slices (y, x)
            The part of the window that is wanted.
        limits : sequence of Limits
            Of each plane.

        Returns
        -------
        bool
            False where not even one plane fits into the device's memory.
        """
        zoom = self.preprocess.zoom_factor
        area = int(windows.shape[1] * zoom) * int(windows.shape[2] * zoom)
        start = 0
        while start < len(windows):
            size = max(1, self.pixels // max(1, area))
            part = slice(start, start + size)
            rest = size - len(windows[part])
            batch = np.concatenate([windows[part], np.repeat(windows[-1:], rest, 0)]) if rest else windows[part]
            try:
                labels = self._compute(batch, crop, [*limits[part], *[limits[-1]] * rest])
            except RuntimeError as error:
                if not out_of_memory(error):
                    raise
                labels = None
            if labels is not None:
                self._fetch(labels, out[part])
                start = part.stop
                continue
            # Outside of the handler, whose traceback keeps the failed tensors alive.
            self.finish()
            release_memory(self.device)
            if size == 1:
                return False
            self.pixels = size // 2 * area
            log.warning("%s is out of memory; going on with %d planes at a time", self.device.name, size // 2)
        return True

    def finish(self) -> None:
        """Wait for all labels."""
        while self._pending:
            self._take()

    @torch.inference_mode()
    def _compute(
        self, windows: Shaped[Array, "b y x c"], crop: Crop, limits: Sequence[Limits]
    ) -> UInt8[Tensor, "b h w"]:
        native = np.ascontiguousarray(windows, windows.dtype.newbyteorder("="))
        x = self.preprocess.to_tensors(self.device.upload(torch.from_numpy(native)), limits)
        for axis in (2, 3):
            length = x.shape[axis]
            if pad := -length % self.step:
                mirrored = np.pad(np.arange(length), (0, pad), mode="symmetric")
                x = x.index_select(axis, torch.from_numpy(mirrored).to(x.device))
        padded, zoom = (x.shape[2], x.shape[3]), self.preprocess.zoom_factor
        x = resize(x, (int(padded[0] * zoom), int(padded[1] * zoom))).clamp_(0, 1)
        margins = resize(self.network(x).float().clamp_min_(NEVER), padded)
        return likeliest_class(margins[:, :, crop[0], crop[1]])

    def _fetch(self, labels: UInt8[Tensor, "b h w"], out: UInt8[Array, "n h w"]) -> None:
        """Have labels copied back, and take those that were computed before."""
        returned = None
        if self.device.kind == "cuda":
            pinned = torch.empty(labels.shape, dtype=labels.dtype, pin_memory=True)
            labels = pinned.copy_(labels, non_blocking=True)
            returned = torch.cuda.Event()
            returned.record(torch.cuda.current_stream(self.device.torch))
        self._pending.append((labels.cpu(), returned, out))
        if len(self._pending) > _AHEAD:
            self._take()

    def _take(self) -> None:
        labels, returned, out = self._pending.popleft()
        if returned is not None:
            returned.synchronize()
        out[...] = labels[: len(out)].numpy()


def likeliest_class(margins: Float[Tensor, "b k h w"]) -> UInt8[Tensor, "b h w"]:
    """The likeliest class of each pixel: the background, 0, where no margin is above zero."""
    if margins.shape[1] == 1:
        return (margins[:, 0] > 0).to(torch.uint8)
    return strongest(torch.cat([torch.zeros_like(margins[:, :1]), margins], 1)).to(torch.uint8)
