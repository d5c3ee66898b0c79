"""Models that segment: preprocessing, tiles, engines, files."""
