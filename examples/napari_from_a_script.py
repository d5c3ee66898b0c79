"""napari from a script: show a stack, the lazy labels of a student, and the dock to go on with."""

# %% A stack and a student.
from fractions import Fraction

import napari
import numpy as np

from distillfss_core import (
    AnnotatedSlice,
    DistillSettings,
    SupportSet,
    distill,
    generate_sample,
    open_volume,
    segment_lazy,
)

sample = generate_sample("nuclei", planes=6, size=192)
slices = [AnnotatedSlice(sample.image[z], (sample.labels[z] > 0).astype(np.uint8), f"plane {z}") for z in (1, 4)]
student = distill(SupportSet(tuple(slices), ("nucleus",)), DistillSettings(steps=20, zoom=Fraction(1), crops=24))

# %% What is on screen is segmented when it is shown.
viewer = napari.Viewer()
viewer.add_image(sample.image, name="nuclei")
viewer.add_labels(segment_lazy(open_volume(sample.image), student), name="student")

# %% The dock: annotate, distill, preview, apply.
viewer.window.add_plugin_dock_widget("napari-distillfss")

if __name__ == "__main__":
    napari.run()
