"""The parts that each page is built from, in one module per page."""
