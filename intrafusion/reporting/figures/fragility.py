"""Figures of the fragility of groups, and of the sparsities suggested for a budget."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
import plotly.graph_objects as go

from intrafusion.reporting.figures._rows import SOLID, as_percent, height, name_rows, subtitle
from intrafusion.reporting.figures.theme import Palette, figure, palette
from intrafusion.runtime.escaping import hover

if TYPE_CHECKING:
    from intrafusion.studies.allocation import Suggestion
    from intrafusion.studies.sensitivity import Fragility


def fragility_bars(ranked: Mapping[str, Sequence["Fragility"]], dark: bool = False) -> go.Figure:
    """Draw the mean accuracy that each group loses when it is pruned alone, the most fragile at the top.

    ranked: results of `fragility` by merge, at least one; the first merge orders the rows. A bar's customdata is its group.
    """
    colours, first = palette(dark), next(iter(ranked.values()))
    groups = [found.group for found in first]
    fig = figure(_most_fragile(ranked), height(len(groups)), colours)
    for merge, own in ranked.items():
        _loss_bars(fig, merge, {groups.index(f.group): f for f in own if f.over and f.group in groups}, colours)
    for row, found in enumerate(first):
        if found.note:
            ends = (100 * f.interval[1] for own in ranked.values() for f in own if f.group == found.group and f.over)
            fig.add_annotation(
                x=max(ends, default=0),
                y=row,
                text=found.note,
                showarrow=False,
                xanchor="left",
                xshift=4,
                font={"color": colours.drop, "size": 12},
            )
    subtitle(fig, " ".join(f'<span style="color:{colours.merge(m)}">■</span> {m}' for m in ranked), colours)
    words = "mean accuracy loss over the sparsities, points"
    fig.update_xaxes(title=words, rangemode="tozero", gridcolor=colours.grid)
    name_rows(fig, groups)
    return fig.update_layout(barmode="group", bargap=0.25)


def _loss_bars(fig: go.Figure, merge: str, rows: Mapping[int, "Fragility"], colours: Palette) -> None:
    """Draw the bars of one merge, each in its row, with intervals."""
    ends = np.array([(f.loss, *f.interval) for f in rows.values()]).reshape(-1, 3)
    loss, low, high = 100 * ends.T
    fig.add_bar(
        x=loss,
        y=list(rows),
        orientation="h",
        name=merge,
        marker={"color": colours.merge(merge), "line": {"width": 0}},
        error_x={"array": high - loss, "arrayminus": loss - low, "thickness": 1, "width": 0, "color": colours.dense},
        customdata=[found.group for found in rows.values()],
        hovertext=[_fragility_words(merge, found) for found in rows.values()],
        hovertemplate="%{hovertext}<extra></extra>",
        **SOLID,
    )


def suggestion_bars(suggestion: "Suggestion", dark: bool = False) -> go.Figure:
    """Draw the share of channels removed from each group, from input to output. A bar's customdata is its group."""
    colours, groups = palette(dark), list(suggestion.sparsities)
    shares = [100 * share for share in suggestion.sparsities.values()]
    fig = figure(_offer(suggestion), height(len(groups)), colours)
    fig.add_bar(
        x=shares,
        y=list(range(len(groups))),
        orientation="h",
        customdata=groups,
        width=0.7,
        hoverinfo="skip",
        marker={"color": colours.merge(suggestion.merge), "line": {"width": 0}},
        textposition="outside",
        cliponaxis=False,
        text=[
            f"{share:.0f} %: {stay:,} of {n:,} kept" if share else f"all {n:,} kept"
            for share, (stay, n) in zip(shares, suggestion.channels.values(), strict=True)
        ],
        textfont={"color": [colours.dense if share else colours.drop for share in shares], "size": 12},
        **SOLID,
    )
    subtitle(fig, suggestion.note or "expected if the losses of the groups add up; measure to confirm", colours)
    fig.update_xaxes(title="sparsity of the group, %", range=[0, 100])
    name_rows(fig, groups)
    return fig.update_layout(margin_r=110)


def _offer(suggestion: "Suggestion") -> str:
    size, dense = suggestion.size, suggestion.dense
    return (
        f"{100 * suggestion.accuracy:.1f} % expected with {100 * size.params / dense.params:.0f} % of the parameters and "
        f"{100 * size.macs / dense.macs:.0f} % of the MACs"
    )


def _most_fragile(ranked: Mapping[str, Sequence["Fragility"]]) -> str:
    (merge, first), *others = ranked.items()
    if not first or not first[0].over:
        return "Nothing was pruned, so no group can be called robust" if first else "Nothing is measured yet"
    group, also = first[0].group, ""
    for other, own in others:
        also += "".join(f", {as_percent(found.loss)} with {other}" for found in own if found.group == group and found.over)
    return f"{hover(group)} is the most fragile group: it loses {as_percent(first[0].loss)} points with {merge}{also}"


def _fragility_words(merge: str, found: "Fragility") -> str:
    (low, high), most = found.interval, f"{100 * found.tolerance:.3g} point{'s' * (found.tolerance != 0.01)}"
    return (
        f"<b>{hover(found.group)}</b>, {merge}<br>{as_percent(found.loss)} points lost "
        f"({as_percent(low)} to {as_percent(high)}), mean from {100 * found.over[0]:.3g} % to {100 * found.over[-1]:.3g} %<br>"
        + (
            f"loses at most {most} up to {100 * found.safe:.3g} % sparsity"
            if found.safe
            else f"loses more than {most} at the smallest sparsity"
        )
    )
