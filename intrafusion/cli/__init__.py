"""The command line: one module a family of commands."""

__all__: list[str] = []
