"""The importer of exported graphs: a graph becomes a description of layers and steps.

For each node, `translation` reads the operator and its arguments (`nodes`), follows changes in place (`aliases`), and writes
layers and steps (`draft`) by the tables of `calls`: directly for calls that are one operator, and by `layer_calls`,
`shape_calls` and `operator_calls` for the others.
"""

from intrafusion.models.exported_program.importer.translation import lifted as lifted

__all__ = ["lifted"]
