"""Measure many specs: sessions, sweeps, sensitivity, allocation, and the store of results."""

from intrafusion.studies.measurement import Result
from intrafusion.studies.session import Session, merged, open_session, recovery
from intrafusion.studies.store.sqlite import Store
from intrafusion.studies.study_file import Study
from intrafusion.studies.sweeps import Failure, grid, sweep
from intrafusion.studies.weight_space import Solutions, slices

__all__ = [
    "Failure",
    "Result",
    "Session",
    "Solutions",
    "Store",
    "Study",
    "grid",
    "merged",
    "open_session",
    "recovery",
    "slices",
    "sweep",
]
