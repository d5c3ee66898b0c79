from .images import read_image, read_stack
from .labels import labels_from_image, pair_files, read_label_stack, read_labels
from .writing import write_labels

__all__ = [
    "labels_from_image",
    "pair_files",
    "read_image",
    "read_label_stack",
    "read_labels",
    "read_stack",
    "write_labels",
]
