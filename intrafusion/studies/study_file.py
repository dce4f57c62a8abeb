"""Study files: a base spec and the values of the fields that vary, as TOML that people can edit."""

import json
import math
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unicodedata import category

from intrafusion.errors import IntrafusionError, check_choice, one_line, shown, unknown
from intrafusion.pruning.groups.group import Group
from intrafusion.spec import COUNTS, KINDS, PruneSpec
from intrafusion.studies.ranges import expand_range
from intrafusion.studies.sweeps import grid

FIXED = ("model", "dataset", "weights", "data_path", "sparsities")  # a study has one network and one set of images
_MOST = 100_000


@dataclass(frozen=True)
class Study:
    """A base spec combined with every combination of the axes' values; the last axis varies fastest.

    axes: field -> values. A value of `groups` is "each" (every prunable group alone), "all" (all groups together), a name,
    or names joined by "+" (those groups together). decide: stop measuring a point once the difference between its merges
    is decided. Raises IntrafusionError for a name that is empty or unprintable, a field that cannot vary, an axis without
    values, a value that the field does not take, or more than 100,000 points.
    """

    name: str
    base: PruneSpec
    axes: Mapping[str, tuple[Any, ...]]
    decide: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not self.name.strip():
            raise IntrafusionError("a study must have a name")
        if any(category(letter) in ("Cc", "Cs") for letter in self.name):
            raise IntrafusionError(f"the study's name {self.name!r} contains unprintable characters; choose another name")
        if math.prod(map(len, self.axes.values())) > _MOST:
            raise IntrafusionError(f"the study has more than {_MOST:,} points; leave some values out")
        for field, values in self.axes.items():
            if field not in KINDS or field in FIXED:
                raise unknown("axis", field, [name for name in KINDS if name not in FIXED])
            if not values:
                raise IntrafusionError(f"axis {field} has no values")
            for value in values:
                if field != "groups":
                    self.base.but(**{field: value})
                elif not isinstance(value, str):
                    raise IntrafusionError(f"groups must be each, all, names, or names joined by +, not {shown(value)}")

    def specs(self, groups: Sequence[Group]) -> list[PruneSpec]:
        """Return all points of the study on a network with these groups, without duplicates."""
        axes = {field: list(dict.fromkeys(values)) for field, values in self.axes.items()}
        if "groups" in axes:
            axes["groups"] = list(dict.fromkeys(choice for value in axes["groups"] for choice in _choices(value, groups)))
        return list(dict.fromkeys(grid(self.base, **axes)))

    def to_toml(self) -> str:
        """Return the study as TOML for `from_toml`. None is written as "all"; a path that is None is omitted."""
        base = {k: "all" if v is None else v for k, v in self.base.to_dict().items() if v is not None or k in COUNTS}
        lines = [f"name = {_toml(self.name)}", f"decide = {_toml(self.decide)}", "", "[base]"]
        lines += [f"{field} = {_toml(value)}" for field, value in base.items() if field not in self.axes]
        lines += ["", "[axes]", *(f"{field} = {_toml(list(values))}" for field, values in self.axes.items())]
        return "\n".join(lines) + "\n"

    @classmethod
    def from_toml(cls, text: str) -> "Study":
        """Parse a study from TOML. Raises IntrafusionError if the text is not TOML or does not describe a study."""
        try:
            raw = tomllib.loads(text)
        except (ValueError, RecursionError) as error:  # also for numbers that are too long and tables nested too deeply
            raise IntrafusionError(f"the study is not TOML: {one_line(error)}") from error
        entries = ("name", "decide", "base", "axes")
        for name in sorted(raw):
            check_choice("entry of a study", name, entries)
        base, axes = raw.get("base", {}), raw.get("axes", {})
        if not isinstance(base, dict) or not isinstance(axes, dict) or not isinstance(raw.get("decide", False), bool):
            raise IntrafusionError("the study's base and axes must be tables of fields, and decide true or false")
        fields_ = {name: None if value == "all" and name in COUNTS else value for name, value in base.items()}
        values = {name: parse(name, value) for name, value in axes.items()}
        return cls(raw.get("name", "study"), PruneSpec.from_dict(fields_), values, raw.get("decide", False))

    @classmethod
    def read(cls, path: str | Path) -> "Study":
        """Read a study from a file. Raises IntrafusionError if the file cannot be read."""
        try:
            return cls.from_toml(Path(path).expanduser().read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, RuntimeError) as error:  # RuntimeError: the home directory of an unknown user
            raise IntrafusionError(f"cannot read the study file {path}: {one_line(error)}") from error


def parse(field: str, given: object) -> tuple[Any, ...]:
    """Return an axis's values from a list or a single value.

    "0.1:0.5:0.1" is a range that includes its end; the step defaults to 1.
    """
    values = given if isinstance(given, list | tuple) else [given]
    return tuple(v for value in values for v in _expand(field, value))


def _expand(field: str, value: object) -> list[Any]:
    kind = KINDS.get(field)
    if field in COUNTS and value == "all":
        return [None]
    if kind is bool and value in ("true", "false"):
        return [value == "true"]
    if kind not in (int, float) or not isinstance(value, str):
        return [value]
    return [*expand_range(value, kind, field)]


def _choices(value: str, groups: Sequence[Group]) -> list[str | tuple[str, ...]]:
    if value == "each":
        return [(group.name,) for group in groups if group.reason is None]
    return ["all" if value == "all" else tuple(value.split("+"))]


def _toml(value: object) -> str:
    if isinstance(value, list):
        return f"[{', '.join(map(_toml, value))}]"
    if isinstance(value, str | bool):
        # TOML strings are JSON strings, except that TOML has no surrogate pairs (\u) and no unescaped DEL
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    return json.dumps("all") if value is None else repr(value)
