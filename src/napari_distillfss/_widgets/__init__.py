"""The dock: one file a widget; each edits one value or does one thing."""
