"""Synthetic results of a sensitivity study, for tests of how results are shown."""

from collections.abc import Sequence
from typing import Any

import numpy as np

import intrafusion as itf
from intrafusion.evaluation.accuracy import wilson
from intrafusion.studies.measurement import Result

DENSE = 0.9


def made_result(
    group: str,
    sparsity: float,
    merge: str = "fusion",
    right: Sequence[bool] | np.ndarray | float = 0.5,
    *,
    total: int | None = None,
    channels: tuple[int, int] = (5, 10),
    **spec: Any,
) -> Result:
    """Make a result. right: which images are classified correctly, or the fraction of 100 images, the first ones."""
    answers = np.arange(100) < round(100 * right) if isinstance(right, float | int) else np.asarray(right, bool)
    count, hits = len(answers), int(answers.sum())
    kept, before = channels
    return Result(
        spec=itf.PruneSpec(groups=(group,), sparsity=sparsity, merge=merge, **spec),
        accuracy=hits / count,
        interval=wilson(hits, count),
        count=count,
        total=total or count,
        dense_accuracy=DENSE,
        params=1000 - 10 * (before - kept),
        params_before=1000,
        macs=5000 - 100 * (before - kept),
        macs_before=5000,
        channels=kept,
        channels_before=before,
        seconds=0.1,
        correct=np.packbits(answers).tobytes(),
    )
