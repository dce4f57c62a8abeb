"""Export a pruned network: measure it, write it in several formats, verify each file, and write a report."""

from intrafusion.reporting.artifact import Made, making
from intrafusion.reporting.export_formats import FORMATS, TOLERANCE, Written, write
from intrafusion.reporting.exporter import Exported, accompany, archive, comparing, export, writing
from intrafusion.reporting.report import Report
from intrafusion.studies.measurement import Width

__all__ = [
    "FORMATS", "TOLERANCE", "Exported", "Made", "Report", "Width", "Written", "accompany",
    "archive", "comparing", "export", "making", "write", "writing",
]  # fmt: skip
