"""Objects in a labeled volume: numbered and measured."""
