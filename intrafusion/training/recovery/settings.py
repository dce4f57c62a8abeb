"""What a recovery is given, and what it tells on its way."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from intrafusion.data.datasets import ImageData
from intrafusion.errors import IntrafusionError, check_choice
from intrafusion.pruning.pruner import Pruned

BUDGETS = ("epochs", "compute")


@dataclass(frozen=True)
class How:
    """Settings of recoveries that train.

    epochs: passes over the training images. budget: "epochs", or "compute": as many multiply-accumulates as plain
    fine-tuning takes for these epochs. rate: peak learning rate; None: found by a short test. patience: looks (25 a run)
    at held-out images without a smaller loss after which training ends early; None: it does not. ratio: of
    over-parameterization. gamma: weight of the similarity loss. rank: of low-rank changes.
    """

    epochs: float = 5.0
    budget: str = "epochs"
    rate: float | None = None
    patience: int | None = None
    ratio: float = 2.0
    gamma: float = 100.0
    rank: int = 8
    seed: int = 0

    def __post_init__(self) -> None:
        check_choice("budget", self.budget, BUDGETS)
        for name, least in (("epochs", 0), ("rate", 0), ("patience", 0), ("ratio", 1), ("gamma", 0), ("rank", 1)):
            value = getattr(self, name)
            if value is None and name in ("rate", "patience"):
                continue
            whole = name in ("patience", "rank")
            fits = isinstance(value, int if whole else int | float) and not isinstance(value, bool)
            if not fits or not (least < value if name in ("epochs", "rate") else least <= value) or not value < 1e6:
                bound = f"above {least}" if name in ("epochs", "rate") else f"of at least {least}"
                raise IntrafusionError(f"{name} must be a {'whole ' if whole else ''}number {bound}, not {value!r}")


@dataclass(frozen=True, eq=False)
class Case:
    """A pruned network, whose layers are to be changed in place so that it does better.

    data: images (labelled ones where the recovery needs labels). keep: a file for the state of training that is stopped.
    """

    pruned: Pruned
    data: ImageData | None
    how: How
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
