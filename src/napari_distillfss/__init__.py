"""The napari plugin of DistillFSS. What it offers is listed in napari.yaml; it imports no torch."""
