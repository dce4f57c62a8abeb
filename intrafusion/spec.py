"""PruneSpec: one frozen, JSON-able description of one pruned model, and of how it is measured.

It is the key of every cache, a page's permalink, the command line's flags and the caption of a figure. A new knob is one
field here.
"""

import json
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

from intrafusion.errors import IntrafusionError, shown


@dataclass(frozen=True)
class PruneSpec:
    """Which model, pruned how, measured on what. Frozen and hashable; equal specs give equal results.

    weights, data_path: None for the defaults of `load_model` and `load_data`. groups: "all" or names. sparsity: share of
    each group's channels that goes, in [0, 1). sparsities: one for each of the named groups, in place of `sparsity`, which
    is then 0. round_to, cost to bias: keywords of `plan`; fold_norms: how folding sees BatchNorm. calibration: images that
    criteria and costs may look at, limit: images of the evaluation; None for all. training: images that recoveries learn
    from; epochs to rank: see `settings.How`. precision: "exact" (fp32) or "fast" (bf16). Raises IntrafusionError when a field
    has the wrong type or range; names are checked where they are looked up.
    """

    model: str = "digits-resnet"
    dataset: str = "digits"
    weights: str | None = None
    data_path: str | None = None
    groups: str | tuple[str, ...] = "all"
    criterion: str = "l1"
    sparsity: float = 0.3
    sparsities: tuple[float, ...] | None = None
    round_to: int = 1
    merge: str = "fusion"
    cost: str = "weights"
    distance: str = "lp"
    p: float = 1.0
    source: str = "uniform"
    target: str = "uniform"
    anchors: str = "important"
    solver: str = "exact"
    reg: float = 0.02
    reg_m: float = 5.0
    mass: float = 0.9
    normalise: str = "source"
    bias: bool = False
    fold_norms: str = "none"
    recovery: str = "none"
    training: int | None = 5000
    epochs: float = 5.0
    budget: str = "epochs"
    rate: float | None = None
    patience: int | None = None
    ratio: float = 2.0
    gamma: float = 100.0
    rank: int = 8
    seed: int = 0
    calibration: int | None = 512
    limit: int | None = 2000
    precision: str = "exact"

    def __post_init__(self) -> None:
        for name in ("groups", "sparsities"):
            if isinstance(getattr(self, name), list):
                object.__setattr__(self, name, tuple(getattr(self, name)))
        for name in (
            "model",
            "dataset",
            "criterion",
            "merge",
            "cost",
            "distance",
            "source",
            "target",
            "anchors",
            "solver",
            "normalise",
            "fold_norms",
            "recovery",
            "budget",
            "precision",
        ):
            _expect(name, getattr(self, name), str, "a name")
        for name in ("weights", "data_path"):
            _expect(name, getattr(self, name), (str, type(None)), "a path or null")
        if self.groups != "all" and not (
            isinstance(self.groups, tuple) and self.groups and all(isinstance(g, str) for g in self.groups)
        ):
            raise IntrafusionError(f'groups must be "all" or a list of group names, not {shown(self.groups)}')
        if not isinstance(self.groups, str) and self.sparsities is None:
            object.__setattr__(self, "groups", tuple(dict.fromkeys(self.groups)))  # one key for the same groups
        if not _is_number(self.sparsity) or not 0 <= self.sparsity < 1:
            raise IntrafusionError(f"sparsity must be at least 0 and less than 1, not {shown(self.sparsity)}")
        if self.sparsities is not None:
            self._check_sparsities()
        if not _is_number(self.p) or not 1 <= self.p <= _MOST:
            raise IntrafusionError(f"p must be a number of at least 1, not {shown(self.p)}")
        for name in ("reg", "reg_m"):
            if not _is_number(getattr(self, name)) or not 0 < getattr(self, name) <= _MOST:
                raise IntrafusionError(f"{name} must be a positive number, not {shown(getattr(self, name))}")
        if not _is_number(self.mass) or not 0 < self.mass <= 1:
            raise IntrafusionError(f"mass must be a share above 0 and at most 1, not {shown(self.mass)}")
        for name in ("epochs", "ratio", "gamma", "rate", "patience", "rank"):
            value = getattr(self, name)
            if value is None and name in ("rate", "patience"):
                continue
            whole = KINDS[name] is int
            if not _is_number(value) or not 0 <= value <= _MOST or (whole and type(value) is not int):
                raise IntrafusionError(f"{name} must be a {'whole ' * whole}number from 0, not {shown(value)}")
            object.__setattr__(self, name, value if whole else _tidy(value))
        for name in ("sparsity", "p", "reg", "reg_m", "mass"):
            object.__setattr__(self, name, _tidy(getattr(self, name)))
        _expect("bias", self.bias, bool, "true or false")
        if type(self.round_to) is not int or not 1 <= self.round_to <= MOST_ROUNDED:
            raise IntrafusionError(f"round_to must be a whole number from 1 to {MOST_ROUNDED}, not {shown(self.round_to)}")
        if type(self.seed) is not int or not 0 <= self.seed < 2**63:
            raise IntrafusionError(f"seed must be a whole number from 0, not {shown(self.seed)}")
        for name in COUNTS:
            count = getattr(self, name)
            if count is not None and (type(count) is not int or not 1 <= count < 2**63):
                raise IntrafusionError(f"{name} must be at least 1 image, or null for all, not {shown(count)}")

    def _check_sparsities(self) -> None:
        if not isinstance(self.sparsities, tuple) or not all(_is_number(s) and 0 <= s < 1 for s in self.sparsities):
            raise IntrafusionError(
                f"sparsities must be a list of numbers, each at least 0 and less than 1, not {shown(self.sparsities)}"
            )
        if isinstance(self.groups, str) or not len({*self.groups}) == len(self.groups) == len(self.sparsities):
            raise IntrafusionError("sparsities needs as many numbers as groups has names: name each group once")
        object.__setattr__(self, "sparsities", tuple(map(_tidy, self.sparsities)))
        object.__setattr__(self, "sparsity", 0.0)

    def sparsity_of(self, group: str) -> float:
        """The share of this group's channels that goes."""
        if self.sparsities is None:
            return self.sparsity
        return dict(zip(self.groups, self.sparsities, strict=True)).get(group, 0.0)

    def but(self, **changes: Any) -> "PruneSpec":
        """This spec with some fields changed."""
        return replace(self, **changes)

    def only(self, names: tuple[str, ...]) -> dict[str, Any]:
        """Some fields by name, as keywords: MEASURE_KNOBS for `measure`, SOLVE_KNOBS for `solve`, PLAN_KNOBS for `plan`."""
        return {name: getattr(self, name) for name in names}

    def to_dict(self) -> dict[str, Any]:
        """JSON-able; `from_dict` gives the same spec back."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items()}

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any]) -> "PruneSpec":
        """The spec of a mapping; missing fields take their defaults. Raises IntrafusionError for unknown or bad ones."""
        if not isinstance(raw, Mapping):
            raise IntrafusionError(f"a spec is a mapping of fields, not {type(raw).__name__}")
        known = {field.name for field in fields(cls)}
        unknown = [str(name) for name in raw if name not in known]
        if unknown:
            raise IntrafusionError(f"unknown spec field {unknown[0]!r}: the fields are {', '.join(sorted(known))}")
        return cls(**raw)

    def key(self) -> str:
        """A canonical text of the spec, equal exactly for equal specs."""
        return json.dumps(self.to_dict(), sort_keys=True)


MOST_ROUNDED = 4096
_MOST = sys.float_info.max  # whole numbers above it are no floats
COUNTS = ("limit", "calibration", "training")  # numbers of images; None for all
KINDS = {f.name: type(f.default) for f in fields(PruneSpec)} | dict.fromkeys((*COUNTS, "patience"), int) | {"rate": float}
SOLVE_KNOBS = ("round_to", "source", "target", "anchors", "solver", "reg", "reg_m", "mass", "normalise", "seed")
MEASURE_KNOBS = ("cost", "distance", "p", "bias", "calibration", "seed")
RECOVERY_KNOBS = ("epochs", "budget", "rate", "patience", "ratio", "gamma", "rank", "seed")
MERGE_KNOBS = ("fold_norms",)
PLAN_KNOBS = (*MEASURE_KNOBS[:-1], *SOLVE_KNOBS)


def _expect(name: str, value: object, kind: type | tuple[type, ...], what: str) -> None:
    if not isinstance(value, kind):
        raise IntrafusionError(f"{name} must be {what}, not {shown(value)}")


def _tidy(value: float) -> float:
    """One float for what is meant to be one number: for 0, 0.0 and -0.0, and for 0.3 and 0.1 + 0.2. Never up to one."""
    rounded = float(f"{value:.14g}") + 0.0
    return float(value) if value < 1 <= rounded else rounded


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
