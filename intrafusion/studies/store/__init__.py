"""Studies and their points in one SQLite file."""

__all__: list[str] = []
