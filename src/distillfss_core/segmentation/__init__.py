"""Volumes to labels: lazily, into OME-Zarr, in batches, on a cluster."""
