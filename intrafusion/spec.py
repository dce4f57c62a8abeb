"""PruneSpec: a frozen, JSON-able description of one pruned model and of how it is measured.

It serves as the key of every cache, a page's permalink, the command line's flags and the caption of a figure. Its fields, with
their ranges and help, are defined here and in `options`.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

from intrafusion.errors import IntrafusionError, check_choice, shown
from intrafusion.options import Options, RecoveryOptions, TransportOptions, option, options_of, tidy

MOST_ROUNDED = 4096
COUNTS = ("limit", "calibration", "training")  # numbers of images; None for all


@dataclass(frozen=True)
class _PruningOptions(Options):
    """The network, and what is removed from it."""

    model: str = option("digits-resnet", "network: a name from `models`, or package.module:factory in your own code")
    dataset: str = option("digits", "dataset: a name from `data`, or kept/NAME; by default the model's")
    weights: str | None = option(None, "weights: a file, 'random', or the name of a torchvision enum", str, optional=True)
    data_path: str | None = option(None, ".npz file or image folder to read the dataset from", str, optional=True)
    groups: str | tuple[str, ...] = "all"
    criterion: str = option("l1", "importance criterion")
    sparsity: float = option(0.3, "fraction of each group's channels to remove", least=0, below=1)
    sparsities: tuple[float, ...] | None = None
    round_to: int = option(1, "round the number of kept channels to a multiple of this", least=1, most=MOST_ROUNDED)
    merge: str = option("fusion", "how to merge the removed channels")
    fold_norms: str = option(
        "none",
        "BatchNorm in folding's k-means: none, or columns (scale and inverse deviation as extra features)",
        choices=("none", "columns"),
    )
    recovery: str = option("none", "how to recover the pruned network's accuracy")
    training: int | None = 5000


@dataclass(frozen=True)
class PruneSpec(RecoveryOptions, TransportOptions, _PruningOptions):
    """Which model is pruned, how, and on what it is measured. Frozen and hashable; equal specs give equal results.

    weights, data_path: None for the defaults of `load_model` and `load_data`. groups: "all" or names. sparsity: share of each
    group's channels to remove, in [0, 1). sparsities: one for each of the named groups, replacing `sparsity`, which is then 0.
    cost to bias: see `TransportOptions`; epochs to rank: see `RecoveryOptions`. calibration: number of images that criteria and
    costs may use; limit: images of the evaluation; training: images that recoveries train on; None for all. precision: "exact"
    (fp32) or "fast" (bf16). Raises IntrafusionError when a field has the wrong type or range; names from registries are checked
    where they are looked up.
    """

    calibration: int | None = 512
    limit: int | None = 2000
    precision: str = option("exact", "precision of the evaluation: exact (fp32) or fast (bf16)")

    def __post_init__(self) -> None:
        for name in ("groups", "sparsities"):
            if isinstance(getattr(self, name), list):
                object.__setattr__(self, name, tuple(getattr(self, name)))
        super().__post_init__()
        if self.groups != "all" and not (
            isinstance(self.groups, tuple) and self.groups and all(isinstance(g, str) for g in self.groups)
        ):
            raise IntrafusionError(f'groups must be "all" or a list of group names, not {shown(self.groups)}')
        if not isinstance(self.groups, str) and self.sparsities is None:
            object.__setattr__(self, "groups", tuple(dict.fromkeys(self.groups)))  # the same groups give the same key
        if self.sparsities is not None:
            self._check_sparsities()
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
            raise IntrafusionError("sparsities must have one number for each name in groups; name each group once")
        object.__setattr__(self, "sparsities", tuple(map(tidy, self.sparsities)))
        object.__setattr__(self, "sparsity", 0.0)

    def sparsity_of(self, group: str) -> float:
        """Return the share of this group's channels to remove."""
        if self.sparsities is None:
            return self.sparsity
        return dict(zip(self.groups, self.sparsities, strict=True)).get(group, 0.0)

    def but(self, **changes: Any) -> "PruneSpec":
        """Return this spec with some fields changed."""
        return replace(self, **changes)

    def only(self, names: tuple[str, ...]) -> dict[str, Any]:
        """Return some fields by name, as keyword arguments: `PLAN_FIELDS` for `plan`, for example."""
        return {name: getattr(self, name) for name in names}

    def part(self, *names: str) -> tuple[Any, ...]:
        """Return the values of some fields, as part of a cache key."""
        return tuple(getattr(self, name) for name in names)

    def to_dict(self) -> dict[str, Any]:
        """Return a JSON-able dict, from which `from_dict` restores the same spec."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items()}

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any]) -> "PruneSpec":
        """Build a spec from a mapping; missing fields take their defaults. Raises IntrafusionError for unknown or bad ones."""
        if not isinstance(raw, Mapping):
            raise IntrafusionError(f"a spec must be a mapping of fields, not {type(raw).__name__}")
        known = [field.name for field in fields(cls)]
        for name in raw:
            check_choice("spec field", str(name), known)
        return cls(**raw)

    def key(self) -> str:
        """Return a canonical text of the spec, equal exactly for equal specs."""
        return json.dumps(self.to_dict(), sort_keys=True)


KINDS = (
    {field.name: type(field.default) for field in fields(PruneSpec)}
    | dict.fromkeys(COUNTS, int)
    | {name: one.kind for name, one in options_of(PruneSpec).items()}
)
TRANSPORT_FIELDS = tuple(field.name for field in fields(TransportOptions))
RECOVERY_FIELDS = tuple(field.name for field in fields(RecoveryOptions))
MERGE_FIELDS = ("fold_norms",)
PLAN_FIELDS = ("round_to", *TRANSPORT_FIELDS, "calibration", "seed")
CUT_FIELDS = ("dataset", "data_path", "groups", "criterion", "sparsity", "sparsities", "merge", *MERGE_FIELDS, *PLAN_FIELDS)
NETWORK_FIELDS = (*CUT_FIELDS, "recovery", "training", *RECOVERY_FIELDS)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
