"""Input of a recovery, and the cost that it reports."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from intrafusion.data.datasets import ImageData
from intrafusion.errors import IntrafusionError
from intrafusion.options import RecoveryOptions
from intrafusion.pruning.pruner import Pruned


@dataclass(frozen=True, eq=False)
class Case:
    """A pruned network to improve by changing its layers in place.

    data: images (labelled ones if the recovery needs labels). how: options of the recovery. keep: a file for the state of
    training that is stopped.
    """

    pruned: Pruned
    data: ImageData | None
    how: RecoveryOptions
    keep: Path | None = None

    def images(self) -> ImageData:
        """Return the images. Raises IntrafusionError if there are none."""
        if self.data is None:
            raise IntrafusionError("this recovery needs images; pass data=")
        return self.data


@dataclass(frozen=True)
class TrainingCost:
    """Cost of a recovery that trains.

    trainable: number of trained parameters. memory: bytes that training holds: weights, gradients, momentum, values of one
    batch that the backward pass needs, and the teacher. macs: multiply-accumulates of a training step on one image. rate: peak
    learning rate, found in `tuning` seconds. where: precision and device, such as "fp32 on cpu".
    """

    trainable: int
    memory: int
    macs: int
    rate: float
    tuning: float
    where: str = ""

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)
