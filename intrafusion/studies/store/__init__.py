"""The store of studies and their measured points, in one SQLite file."""

__all__: list[str] = []
