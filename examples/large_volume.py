"""A volume on disk: look at any part of it at once, then write all labels to OME-Zarr, and count the objects."""

# %% A student and a volume; here both are made from a generated stack. Your own: StudentModel.load, open_volume(path).
from fractions import Fraction

import numpy as np
import zarr

from distillfss_core import (
    AnnotatedSlice,
    DistillSettings,
    SupportSet,
    distill,
    generate_sample,
    iter_segment,
    label_instances,
    open_volume,
    segment_lazy,
)

sample = generate_sample("nuclei", planes=6, size=256)
zarr.create_array("nuclei.zarr", data=sample.image, chunks=(1, 128, 128))
slices = [AnnotatedSlice(sample.image[z], (sample.labels[z] > 0).astype(np.uint8), f"plane {z}") for z in (1, 4)]
student = distill(SupportSet(tuple(slices), ("nucleus",)), DistillSettings(steps=20, zoom=Fraction(1), crops=24))

# %% Any part of any plane, computed when it is looked at (a dask array, as napari shows it).
volume = open_volume("nuclei.zarr")
lazy = segment_lazy(volume, student)
print(f"plane 2, upper left: {lazy[2, :64, :64].compute().mean():.1%} nucleus")

# %% All of it, shard by shard. With resume=True a run that was stopped goes on where it was.
run = iter_segment(volume, student, "labels.ome.zarr", resume=True)
for step in run:
    print(f"shard {step.index} of {step.total}")
print(f"{run.result().computed} shards computed")

# %% Number the objects over the whole volume, with a table of their measures.
report = label_instances(open_volume("labels.ome.zarr"), "objects.ome.zarr", table="objects.csv", min_voxels=20)
print(f"{report.objects} objects")
