"""Transport plans from the channels that go to those that stay."""

__all__: list[str] = []
