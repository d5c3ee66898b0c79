"""OME-TIFF of one or several files, with metadata as a test wants them."""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import tifffile

OME = "http://www.openmicroscopy.org/Schemas/OME/2016-06"


def ome_xml(
    own: str | None, plan: Sequence[tuple[str | None, int, str]], size: tuple[int, int], planes: int, channels: int = 1
) -> str:
    """Metadata of uint16 planes: of each plane the file, the page in it and the identifier of the file."""
    data = ""
    for k, (file, page, identifier) in enumerate(plan):
        z, c = k % planes, k // planes
        name = f'<UUID FileName="{file}">urn:uuid:{identifier}</UUID>' if file else ""
        data += f'<TiffData FirstZ="{z}" FirstC="{c}" FirstT="0" IFD="{page}" PlaneCount="1">{name}</TiffData>'
    listed = "".join(f'<Channel ID="Channel:0:{c}" SamplesPerPixel="1"/>' for c in range(channels))
    return (
        f'<?xml version="1.0"?><OME xmlns="{OME}"{f" UUID={chr(34)}urn:uuid:{own}{chr(34)}" if own else ""}>'
        f'<Image ID="Image:0"><Pixels ID="Pixels:0" DimensionOrder="XYZCT" Type="uint16" SizeX="{size[1]}" '
        f'SizeY="{size[0]}" SizeZ="{planes}" SizeC="{channels}" SizeT="1">{listed}{data}</Pixels></Image></OME>'
    )


def write_pages(path: Path, planes: Sequence[np.ndarray], text: str) -> Path:
    """A page a plane, the text as the description of the first."""
    with tifffile.TiffWriter(path, ome=False) as file:
        for k, plane in enumerate(planes):
            description = text if k == 0 else None
            file.write(plane, description=description, metadata=None, contiguous=False, photometric="minisblack")
    return path


def write_ome_set(folder: Path, stack: np.ndarray, names: Sequence[str]) -> list[Path]:
    """The planes of a stack in as many files of equal depth as there are names."""
    folder.mkdir(exist_ok=True)
    each = len(stack) // len(names)
    ids = [str(uuid.uuid5(uuid.NAMESPACE_URL, name)) for name in names]
    plan = [(name, k, i) for name, i in zip(names, ids, strict=True) for k in range(each)]
    return [
        write_pages(folder / name, stack[n * each : (n + 1) * each], ome_xml(ids[n], plan, stack.shape[1:], len(stack)))
        for n, name in enumerate(names)
    ]
