"""Segmentation of volumes: lazily, into OME-Zarr, in batches, on a cluster."""
