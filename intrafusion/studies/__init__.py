"""Many measured points: sessions, sweeps, sensitivity, allocation, and the store that keeps them."""

from intrafusion.studies.measurement import Result
from intrafusion.studies.session import Session, open_session
from intrafusion.studies.store.sqlite import Store
from intrafusion.studies.study_file import Study
from intrafusion.studies.sweeps import Failure, grid, sweep

__all__ = ["Failure", "Result", "Session", "Store", "Study", "grid", "open_session", "sweep"]
