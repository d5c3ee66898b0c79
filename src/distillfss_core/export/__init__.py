"""Export of students for other programs."""
