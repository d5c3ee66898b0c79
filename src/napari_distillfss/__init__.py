"""napari plugin of DistillFSS. napari.yaml lists its contributions. This package does not import torch."""
