"""What a recovery is given, and what it tells on its way."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from intrafusion.data.datasets import ImageData
from intrafusion.errors import IntrafusionError
from intrafusion.options import RecoveryOptions
from intrafusion.pruning.pruner import Pruned


@dataclass(frozen=True, eq=False)
class Case:
    """A pruned network, whose layers are to be changed in place so that it does better.

    data: images (labelled ones where the recovery needs labels). keep: a file for the state of training that is stopped.
    """

    pruned: Pruned
    data: ImageData | None
    how: RecoveryOptions
    keep: Path | None = None

    def images(self) -> ImageData:
        """The images. Raises IntrafusionError where there are none."""
        if self.data is None:
            raise IntrafusionError("this recovery looks at images: pass data=")
        return self.data


@dataclass(frozen=True)
class Facts:
    """What a recovery that trains costs.

    trainable: parameters that learn. memory: bytes that training holds: weights, gradients, momentum, what the backward
    pass needs of one batch, and the teacher. macs: multiply-accumulates of training, a step on one image. rate: peak
    learning rate, found in `tuning` seconds.
    """

    trainable: int
    memory: int
    macs: int
    rate: float
    tuning: float

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)
