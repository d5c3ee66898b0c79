"""The dock, one widget a file. Each widget edits one value or runs one job."""
