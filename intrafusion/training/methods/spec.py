"""Specification of one run of the training lab, hashable and convertible to JSON."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

from intrafusion._registry import CRITERIA, MERGES, TRAINERS
from intrafusion.errors import IntrafusionError, check_choice, shown
from intrafusion.training.methods.masks import WEIGHTS
from intrafusion.training.methods.smooth import PENALTIES
from intrafusion.training.model_fusion import ALIGNED

_BOUNDS: dict[str, tuple[float, float]] = {  # for each number: minimum, and exclusive maximum
    "epochs": (0, 1e5), "lr": (0, 1e4), "batch": (1, 1e5), "seed": (0, 2**62), "training": (20, 1e9), "reach": (0, 1e3),
    "c": (0, 1e6), "mu": (0, 1), "strength": (0, 1e6), "energy": (0, 1.0000001), "sparsity": (0, 1), "rounds": (1, 101),
    "tune": (0, 1e4), "folds": (2, 13),
}  # fmt: skip
_WHOLE = ("batch", "seed", "training", "rounds", "folds")
_CHOICES = {"drawn": WEIGHTS, "penalty": PENALTIES, "by": ALIGNED}
_OPEN = ("lr", "batch", "training", "c", "penalty", "strength")  # None: the method chooses
_COMMON = ("model", "method", "data_path", "training", "epochs", "lr", "batch", "seed", "folds", "part")


@dataclass(frozen=True)
class TrainSpec:
    """One run of the lab.

    method: a trainer's name. model: its architecture, with weights drawn by `seed`.
    training: number of training images, None for all. lr: peak learning rate. batch: images per step. None for lr, batch,
    penalty or strength: the method's own value.
    reach: for SDprun, the threshold at the end of the run, in units of the median norm at the start of what is shrunk. c: the
    paper's strength, used instead of `reach`. mu: how fast the threshold grows.
    drawn: frozen weights of subnetworks. penalty, strength: for smooth compression. energy: share of each layer's squared
    singular values that its truncation keeps. sparsity: share of channels to remove. criterion, merge, rounds, tune: how to
    prune, in `rounds` rounds, each followed by `tune` epochs. folds, by: for split-data training, the number of folds and how
    its networks are aligned. part: the folds of the training images to train on; empty: all.
    """

    model: str = "digits-vgg"
    method: str = "sdprun"
    data_path: str | None = None
    training: int | None = None
    epochs: float = 20.0
    lr: float | None = None
    batch: int | None = None
    seed: int = 0
    reach: float = 1.4
    c: float | None = None
    mu: float = 0.51
    drawn: str = "kaiming"
    penalty: str | None = None
    strength: float | None = None
    energy: float = 0.98
    sparsity: float = 0.5
    criterion: str = "l1"
    merge: str = "fusion"
    rounds: int = 2
    tune: float = 5.0
    folds: int = 2
    by: str = "activations"
    part: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        for name in ("model", "method", "criterion", "merge"):
            if not isinstance(getattr(self, name), str):
                raise IntrafusionError(f"{name} must be a name, not {shown(getattr(self, name))}")
        if not isinstance(self.data_path, str | None):
            raise IntrafusionError(f"data_path must be a path or null, not {shown(self.data_path)}")
        entry = TRAINERS[self.method]
        for name, (least, most) in _BOUNDS.items():
            value = getattr(self, name)
            if value is None and name in _OPEN:
                continue
            kind: Any = int if name in _WHOLE else int | float
            if not isinstance(value, kind) or isinstance(value, bool) or not least <= value < most:
                whole = "whole " if name in _WHOLE else ""
                span = f"of at least {least:g} and less than {most:g}"
                raise IntrafusionError(f"{name} must be a {whole}number {span}, not {shown(value)}")
            object.__setattr__(self, name, value if name in _WHOLE else float(value))
        if self.epochs == 0 or self.lr == 0 or self.mu == 0 or self.energy == 0:
            raise IntrafusionError("epochs, lr, mu and energy must be above 0")
        for name, choices in _CHOICES.items():
            if getattr(self, name) is not None or name not in _OPEN:
                check_choice(name, getattr(self, name), choices)
        _ = CRITERIA[self.criterion], MERGES[self.merge]
        if not isinstance(self.part, list | tuple) or not all(type(n) is int and 0 <= n < self.folds for n in self.part):
            raise IntrafusionError(f"part must be folds from 0 to {self.folds - 1}, not {shown(self.part)}")
        object.__setattr__(self, "part", tuple(self.part))
        for field in fields(self):  # fields that the method does not read are not part of the run
            if field.name not in (*_COMMON, *entry.knobs):
                object.__setattr__(self, field.name, field.default)
        if not self.part and "folds" not in entry.knobs:
            object.__setattr__(self, "folds", 2)

    def but(self, **changes: Any) -> "TrainSpec":
        """Return this spec with some fields changed."""
        return replace(self, **changes)

    def to_dict(self) -> dict[str, Any]:
        """Return a dictionary that JSON can hold; `from_dict` restores the same spec."""
        return asdict(self) | {"part": list(self.part)}

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any]) -> "TrainSpec":
        """Return the spec of a mapping; missing fields take their defaults. Raises IntrafusionError for unknown or bad ones."""
        known = [field.name for field in fields(cls)]
        if not isinstance(raw, Mapping):
            raise IntrafusionError(f"a spec must be a mapping of fields, not {type(raw).__name__}")
        for name in raw:
            check_choice("spec field", str(name), known)
        return cls(**raw)

    def key(self) -> str:
        """Return a canonical text of the spec; two texts are equal if and only if the specs are."""
        return json.dumps(self.to_dict(), sort_keys=True)
