"""Shared by the pages; in a folder of its own so that it is no page itself."""
