"""Provenance of single channels: what a plan does to a channel, as data and as text."""

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from intrafusion.pruning.transport.planning import TransportPlan


@dataclass(frozen=True)
class Story:
    """One channel's part in a plan.

    rank: 1 for the most important. goes_to: (kept channel, weight in the applied matrix) for each channel that this one is
    merged into, heaviest first. absorbs: the same for the channels merged into this one, without itself; empty if this channel
    is not kept.
    """

    channel: int
    rank: int
    score: float
    kept: bool
    goes_to: tuple[tuple[int, float], ...]
    absorbs: tuple[tuple[int, float], ...]

    @property
    def weights(self) -> tuple[tuple[int, float], ...]:
        """(channel, weight) of the sources of a kept channel, itself first; of the targets of any other channel."""
        if not self.kept:
            return self.goes_to
        return ((self.channel, dict(self.goes_to).get(self.channel, 0.0)), *self.absorbs)

    def sentence(self, merge: str = "fusion") -> str:
        """Return the story as text, for the merge "drop" or for fusion."""
        place = f"Channel {self.channel} ranks {self.rank} by importance (score {self.score:.3g})"
        own = dict(self.goes_to).get(self.channel, 0.0)
        if self.kept and (merge == "drop" or (not self.absorbs and abs(own - 1) < 0.005)):
            return f"{place}. It is kept unchanged."
        if self.kept:
            share = "" if abs(own - 1) < 0.005 else f" with a weight of {own:.2f}"
            return f"{place}. It is kept{share}, and absorbs {_listed(self.absorbs)}."
        if merge == "drop":
            return f"{place}. It is removed."
        if not self.goes_to:
            return f"{place}. It is removed, and this plan discards its mass."
        return f"{place}. It is merged into {_listed(self.goes_to)}."


def story(plan: TransportPlan, scores: Tensor, channel: int) -> Story:
    """Return the story of `channel` under `plan`; the scores (n,) rank the channels."""
    rank = 1 + int((scores > scores[channel]).sum())
    rows = (plan.kept == channel).nonzero()[:, 0]
    absorbs = _heaviest(plan.matrix[rows[0]], exclude=channel) if len(rows) else ()
    column = plan.matrix[:, channel]
    goes_to = tuple((int(plan.kept[row]), weight) for row, weight in _heaviest(column))
    return Story(channel, rank, float(scores[channel]), len(rows) > 0, goes_to, absorbs)


def moves(plan: TransportPlan) -> list[dict[str, Any]]:
    """Return one row for each channel and target between which mass moves: mass, weight in the applied matrix, and cost."""
    sources, targets = plan.coupling.nonzero(as_tuple=True)
    columns = {
        "channel": sources,
        "target": plan.kept[targets],
        "mass": plan.coupling[sources, targets],
        "weight": plan.matrix[targets, sources],
        "cost": plan.cost[sources, targets],
    }
    return [dict(zip(columns, row, strict=True)) for row in zip(*(c.tolist() for c in columns.values()), strict=True)]


def _heaviest(weights: Tensor, exclude: int | None = None) -> tuple[tuple[int, float], ...]:
    order = weights.argsort(descending=True, stable=True)
    return tuple((int(i), float(weights[i])) for i in order if weights[i] > 0 and int(i) != exclude)


def _listed(pairs: tuple[tuple[int, float], ...], most: int = 4) -> str:
    if not pairs:
        return "nothing"
    words = [f"{channel} (weight {weight:.2f})" for channel, weight in pairs[:most]]
    if len(pairs) > most:
        words.append(f"{len(pairs) - most} more")
    listed = words[0] if len(words) == 1 else ", ".join(words[:-1]) + " and " + words[-1]
    return ("channel " if len(pairs) == 1 else "channels ") + listed
