"""A pruned network made ready to be handed out: measured, written in several formats, each verified, with a report."""

from intrafusion.export.files import FORMATS, TOLERANCE, Written, write
from intrafusion.export.made import Made, Making, making
from intrafusion.export.report import Report
from intrafusion.export.road import Exported, Exporting, Writing, accompany, archive, comparing, export, writing
from intrafusion.run import Width

__all__ = [
    "FORMATS", "TOLERANCE", "Exported", "Exporting", "Made", "Making", "Report", "Width", "Writing", "Written", "accompany",
    "archive", "comparing", "export", "making", "write", "writing",
]  # fmt: skip
