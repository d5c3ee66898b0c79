"""Two-dimensional images: learn from a few annotated slices, segment the others, and score the result."""

# %% Images and labels; here they are generated. Your own: load_support("images", "labels").
import numpy as np

from distillfss_core import AnnotatedSlice, DistillSettings, SupportSet, distill, evaluate, generate_sample

sample = generate_sample("nuclei", planes=8, size=256)
truth = (sample.labels > 0).astype(np.uint8)
annotated = [1, 4, 6]
support = SupportSet(
    tuple(AnnotatedSlice(sample.image[z], truth[z], f"plane {z}") for z in annotated), class_names=("nucleus",)
)

# %% Distill a student. Leave the settings out for a model of full quality: 20 steps only show how it is done.
student = distill(support, DistillSettings(steps=20, zoom="1", crops=24))
student.save("nuclei.safetensors")

# %% Segment the other planes.
others = [z for z in range(8) if z not in annotated]
labels = {z: student.predict(sample.image[z]).labels for z in others}

# %% Compare with the truth.
scores = evaluate((labels[z], truth[z]) for z in others)
print(f"IoU {scores.pooled.iou[0]:.3f} on {len(others)} planes")
