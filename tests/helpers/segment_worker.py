"""A process to be killed: python segment_worker.py VOLUME MODEL OUT TILE."""

import sys

from distillfss_core import StudentModel, open_volume, segment_to_zarr
from distillfss_core.labelstore import layout as label_layout

if __name__ == "__main__":
    volume, model, out, tile = sys.argv[1:]
    label_layout._SIDE = int(tile)
    label_layout._SHARD = 2 * label_layout._SIDE**2
    print("begun", flush=True)
    report = segment_to_zarr(
        open_volume(volume),
        StudentModel.load(model, device="cpu", precision="float32"),
        out,
        tile=int(tile),
        resume=True,
    )
    print(report.computed, report.finished, flush=True)
