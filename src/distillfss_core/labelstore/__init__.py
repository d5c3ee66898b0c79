"""Labels on disk: an OME-Zarr pyramid with a journal of what is finished."""
