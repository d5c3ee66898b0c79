"""Two-dimensional images in a folder: learn from a few annotated ones, segment all of them, and score the result."""

# %% A folder of images, and one of labels for some of them. Here they are generated; use your own files instead.
from fractions import Fraction
from pathlib import Path

from distillfss_core import (
    DistillSettings,
    StudentModel,
    distill,
    evaluate,
    generate_sample,
    load_support,
    read_image,
    read_labels,
    write_labels,
)

sample = generate_sample("nuclei", planes=8, size=256)
for folder in ("images", "labels", "truth", "segmented"):
    Path(folder).mkdir(exist_ok=True)
for z in range(8):
    write_labels(f"images/cell_{z}.tif", sample.image[z])
    write_labels(f"truth/cell_{z}.tif", sample.labels[z])
for z in (1, 4, 6):
    write_labels(f"labels/cell_{z}.tif", sample.labels[z])

# %% Distill a student. Leave the settings out for a model of full quality: 20 steps only show how it is done.
support = load_support("images", "labels")
student = distill(support, DistillSettings(steps=20, zoom=Fraction(1), crops=24))
student.save("nuclei.safetensors")

# %% Segment every image. A student is one file, so this can be another script on another computer.
student = StudentModel.load("nuclei.safetensors")
for path in sorted(Path("images").iterdir()):
    write_labels(f"segmented/{path.name}", student.predict(read_image(path)).labels)

# %% Compare the images without annotations with the truth.
names = [f"cell_{z}.tif" for z in (0, 2, 3, 5, 7)]
pairs = [(read_labels(f"segmented/{name}"), (read_labels(f"truth/{name}") > 0).astype("uint8")) for name in names]
scores = evaluate(pairs)
print(f"IoU {scores.pooled.iou[0]:.3f} on {len(names)} images")
