"""Accuracy and cost beside the paper and beside what people use today; needs the extra "bench"."""
