"""The pieces of each page: one module a page."""
