"""The command line, with one module for each family of commands."""

__all__: list[str] = []
