"""Objects of a labeled volume: their numbers and measurements."""
