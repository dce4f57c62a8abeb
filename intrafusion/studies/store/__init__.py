"""Studies and their points in one SQLite file."""
