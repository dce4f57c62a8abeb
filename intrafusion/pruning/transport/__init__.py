"""Transport plans from all channels of a group to the kept ones."""

__all__: list[str] = []
