"""Options of transport and recovery: the name, default, range and help of each, in one place.

`PruneSpec`, the public functions, the command line and the pages read them from here. To add an option, add one field to one
class and use it.
"""

import math
import sys
from dataclasses import dataclass, field, fields
from typing import Any, Self, TypedDict

from intrafusion.errors import IntrafusionError, check_choice, shown


@dataclass(frozen=True)
class Option:
    """The values a field may take, stored as "option" in the metadata of a dataclass field.

    help: description in one line. kind: str, bool, int or float. choices: allowed names; empty if a registry lists them. least,
    above, most, below: bounds of a number. optional: whether it may be None.
    """

    help: str
    kind: type
    choices: tuple[str, ...] = ()
    least: float = -math.inf
    above: float = -math.inf
    most: float = sys.float_info.max
    below: float = math.inf
    optional: bool = False

    def check(self, name: str, value: Any) -> Any:
        """Return the value, with equal numbers mapped to one float. Raises IntrafusionError for a wrong type or range."""
        if value is None and self.optional:
            return None
        if self.kind in (str, bool):
            if not isinstance(value, self.kind):
                raise IntrafusionError(
                    f"{name} must be {'a name' if self.kind is str else 'true or false'}, not {shown(value)}"
                )
            if self.choices:
                check_choice(name, str(value), self.choices)
            return value
        wrong = isinstance(value, bool) or not isinstance(value, int if self.kind is int else int | float)
        if wrong or not (self.least <= value <= self.most and self.above < value < self.below):
            raise IntrafusionError(f"{name} must be {self.range_in_words()}, not {shown(value)}")
        return value if self.kind is int else tidy(value)

    def range_in_words(self) -> str:
        """Return the range as text, such as "a number above 0 and at most 1"."""
        bounds = [f"of at least {self.least:g}"] if self.least > -math.inf else []
        bounds += [f"above {self.above:g}"] if self.above > -math.inf else []
        bounds += [f"at most {self.most:,}"] if self.most < sys.float_info.max else []
        bounds += [f"less than {self.below:,.0f}"] if self.below < math.inf else []
        return f"a {'whole ' if self.kind is int else ''}number {' and '.join(bounds)}".rstrip()


def option(default: Any, help: str, kind: type | None = None, **about: Any) -> Any:
    """Return a dataclass field with an `Option`. kind: taken from the default, unless that is None."""
    return field(default=default, metadata={"option": Option(help, kind or type(default), **about)})


def options_of(holder: Any) -> dict[str, Option]:
    """Return the options of a dataclass, or of an instance, by field name."""
    return {one.name: one.metadata["option"] for one in fields(holder) if "option" in one.metadata}


@dataclass(frozen=True)
class Options:
    """Base class of option groups: checks the values on construction."""

    def __post_init__(self) -> None:
        for name, one in options_of(self).items():
            object.__setattr__(self, name, one.check(name, getattr(self, name)))

    @classmethod
    def of(cls, holder: Any) -> Self:
        """Return the options of this class, read from the attributes of a spec or any other object."""
        return cls(**{one.name: getattr(holder, one.name) for one in fields(cls)})


@dataclass(frozen=True)
class TransportOptions(Options):
    """How channels are compared, and how their mass moves. Theus et al., ICLR 2024, section 3."""

    cost: str = option(
        "weights",
        "quantity that the cost compares: weights, or activations on calibration images",
        choices=("weights", "activations"),
    )
    distance: str = option("lp", "distance between channels: lp (with --p) or cosine", choices=("lp", "cosine"))
    p: float = option(1.0, "p of the lp distance", least=1)
    source: str = option("uniform", "source marginal", choices=("uniform", "importance", "softmax"))
    target: str = option("uniform", "target marginal", choices=("uniform", "importance", "softmax"))
    anchors: str = option("important", "targets: important channels, or centroids", choices=("important", "kmeans", "gmm"))
    solver: str = option("exact", "solver of the transport plan")
    reg: float = option(0.02, "entropy regularisation of sinkhorn, in units of the mean cost", above=0)
    reg_m: float = option(5.0, "penalty of unbalanced on violated marginals, in units of the mean cost", above=0)
    mass: float = option(0.9, "share of the mass that partial moves", above=0, most=1)
    normalise: str = option(
        "source",
        "normalise the applied matrix by source or by target",
        choices=("source", "target", "none"),
    )
    bias: bool = option(False, "include biases in the channel vectors")

    def check_together(self) -> None:
        """Raise IntrafusionError for combinations of options that make no sense."""
        if self.distance == "cosine" and self.p != 1:
            raise IntrafusionError(f"the cosine distance has no p, but p is {self.p:g}; leave p at 1, or choose distance lp")
        if self.cost == "activations" and self.bias:
            raise IntrafusionError("activations already include biases; leave bias out, or choose cost weights")


class TransportKeywords(TypedDict, total=False):
    """`TransportOptions` as keyword arguments of functions, for type checkers."""

    cost: str
    distance: str
    p: float
    source: str
    target: str
    anchors: str
    solver: str
    reg: float
    reg_m: float
    mass: float
    normalise: str
    bias: bool


@dataclass(frozen=True)
class RecoveryOptions(Options):
    """Options of recoveries that train."""

    epochs: float = option(5.0, "recovery epochs", above=0, below=1e6)
    budget: str = option(
        "epochs",
        "training budget: epochs, or compute (the multiply-accumulates of plain fine-tuning for these epochs)",
        choices=("epochs", "compute"),
    )
    rate: float | None = option(
        None, "peak learning rate of a recovery; found by a short test if not given", float, above=0, below=1e6, optional=True
    )
    patience: int | None = option(
        None,
        "early-stopping patience: evaluations on held-out images (25 per run) without a lower loss",
        int,
        least=0,
        below=1e6,
        optional=True,
    )
    ratio: float = option(2.0, "over-parameterization ratio", least=1, below=1e6)
    gamma: float = option(100.0, "weight of the similarity loss", least=0, below=1e6)
    rank: int = option(8, "rank of low-rank updates", least=1, below=1e6)
    seed: int = option(0, "seed of the evaluation subset and of random choices", least=0, below=2**63)


CHOICES = {name: one.choices for cls in (TransportOptions, RecoveryOptions) for name, one in options_of(cls).items()}


def tidy(value: float) -> float:
    """Return one float for all roundings of a number: for 0, 0.0 and -0.0, and for 0.3 and 0.1 + 0.2.

    A value below 1 is never rounded up to 1.
    """
    rounded = float(f"{value:.14g}") + 0.0
    return float(value) if value < 1 <= rounded else rounded
