"""Figures of the importance of a group's channels: one criterion's bars with the cut, and criteria side by side."""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import plotly.graph_objects as go

from intrafusion.reporting.figures.theme import Palette, figure, palette, rgba, tint

if TYPE_CHECKING:
    from intrafusion.pruning.agreement import CriteriaComparison

_WIDE = 80  # most columns for which cells have room for gaps and outlines
_THIN = 256  # most bars for which an outline does not cover its bar
_MARKS = 3000  # most cells for which each has its own marker


def importance_bars(
    scores: Sequence[float],
    kept: Sequence[int],
    criterion: str,
    by_rank: bool = True,
    selected: int | None = None,
    dark: bool = False,
    left: int = 60,
) -> go.Figure:
    """Draw one bar per channel, kept ones solid and others hollow, with the line between them.

    scores: (n,). kept: channels that stay. by_rank: True for most important first, False for order of channel number. left:
    the left margin in pixels. A bar's customdata is its channel.
    """
    colours, values = palette(dark), np.asarray(scores, float)
    n, stays = len(values), np.isin(np.arange(len(values)), kept)
    order = np.argsort(-values, kind="stable") if by_rank else np.arange(n)
    gone = n - int(stays.sum())
    title = f"{n - gone:,} of {n:,} channels are kept" + (
        f", {gone:,} removed" if gone else ": nothing is pruned at this sparsity"
    )
    fig = figure(title, 360, colours)
    thin = int(n <= _THIN)
    solid = [colours.fusion if stays[c] else rgba(colours.drop, 0.12) for c in order]
    edge = [colours.second if c == selected else colours.fusion if stays[c] else colours.drop for c in order]
    fig.add_bar(
        x=np.arange(n),
        y=values[order],
        customdata=order,
        marker={"color": solid, "line": {"color": edge, "width": [3 if c == selected else thin for c in order]}},
        hovertemplate="channel %{customdata}<br>score %{y:.4g}<extra></extra>",
        selected={"marker": {"opacity": 1}},
        unselected={"marker": {"opacity": 1}},
    )
    if by_rank and gone:
        _cut_line(fig, values, order, stays, colours.dense)
    _channel_axis(fig, order, by_rank)
    fig.update_yaxes(title=f"{criterion} score", rangemode="tozero", exponentformat="power")
    return fig.update_layout(bargap=0.15, margin={"l": left})


def _channel_axis(fig: go.Figure, order: np.ndarray, by_rank: bool) -> None:
    n = len(order)
    labels = np.unique(np.linspace(0, n - 1, min(n, 17)).round().astype(int))
    fig.update_xaxes(
        title="channel, most important first" if by_rank else "channel",
        tickvals=labels,
        ticktext=[str(order[i]) for i in labels],
        range=[-0.6, n - 0.4],
    )


def _cut_line(fig: go.Figure, values: np.ndarray, order: np.ndarray, stays: np.ndarray, colour: str) -> None:
    """Draw the line between kept and dropped channels.

    Blocks of a zero-padded group have separate cuts; if there is no single cut, no line is drawn.
    """
    count = int(stays.sum())
    if stays[order[:count]].all():
        fig.add_vline(count - 0.5, line={"color": colour, "dash": "dot", "width": 1.5})
        fig.add_annotation(
            x=count - 0.5,
            y=1,
            yref="paper",
            text="kept | removed",
            showarrow=False,
            font={"color": colour},
            yanchor="bottom",
        )


def criteria_side_by_side(
    comparison: "CriteriaComparison",
    notes: Mapping[str, str] | None = None,
    show: str = "ranks",
    by_rank: bool = True,
    selected: int | None = None,
    dark: bool = False,
) -> go.Figure:
    """Draw one row per criterion and one column per channel, in the order of the first criterion's bars.

    A marker's customdata starts with its channel; with many cells there is one marker per column. notes: criteria without
    scores, with the reason, drawn below. show: "ranks", or "scores" as shares of the criterion's largest.
    """
    colours, notes = palette(dark), notes or {}
    names = [*comparison.names, *notes]
    c, n = comparison.scores.shape
    order = np.argsort(-comparison.scores[0], kind="stable") if by_rank else np.arange(n)
    fig = figure(_disputed(comparison), 118 + 30 * len(names), colours)
    share = _shares(comparison, show)[:, order]
    kept = comparison.kept[:, order]
    fig.add_heatmap(
        z=np.where(kept, np.maximum(share, 1e-3), share - 1.001).astype(np.float32),
        colorscale=_kept_and_gone(colours),
        zmin=-1,
        zmax=1,
        showscale=False,
        hoverinfo="skip",
        xgap=int(n <= _WIDE),
        ygap=2,
    )
    if n <= _WIDE:
        _hollow(fig, kept, colours)
    _marks(fig, comparison, order, colours.fusion)
    if selected is not None:
        place = int((order == selected).argmax())
        fig.add_shape(
            type="rect",
            x0=place - 0.5,
            x1=place + 0.5,
            y0=-0.5,
            y1=c - 0.5,
            line={"color": colours.second, "width": 2},
        )
    for row, note in enumerate(notes.values(), c):
        fig.add_annotation(x=-0.4, y=row, text=note, showarrow=False, xanchor="left", font={"color": colours.drop})
    _channel_axis(fig, order, by_rank)
    labels = [f"<b>{names[0]}</b>", *names[1:]]
    fig.update_yaxes(tickvals=list(range(len(names))), ticktext=labels, range=[len(names) - 0.5, -0.5], showgrid=False)
    return fig.update_layout(margin={"l": label_width(names), "t": 48})


def label_width(names: Sequence[str]) -> int:
    """Return the pixels that the names of criteria need to the left of an axis."""
    return max(70, 20 + round(7.4 * max(map(len, names))))


def _disputed(comparison: "CriteriaComparison") -> str:
    """Return a title that says how far the criteria agree."""
    criteria, n = comparison.kept.shape
    by_all, disputed = comparison.kept.all(0), comparison.kept.any(0) & ~comparison.kept.all(0)
    if not comparison.pruned:
        return f"Nothing is pruned at this sparsity: all {n:,} channels are kept"
    if criteria == 1:
        return f"{comparison.names[0]} keeps {comparison.k:,} of {n:,} channels"
    return f"All {criteria} criteria keep {by_all.sum():,} of {n:,} channels; they disagree on {disputed.sum():,}"


def _shares(comparison: "CriteriaComparison", show: str) -> np.ndarray:
    """Return ranks or scores scaled to [0, 1], where 1 is each criterion's most important channel: (c, n)."""
    if show == "ranks":
        return 1 - (comparison.ranks - 1) / max(1, comparison.ranks.shape[1] - 1)
    above = comparison.scores - np.minimum(comparison.scores.min(1, keepdims=True), 0)
    largest = above.max(1, keepdims=True)
    return above / np.where(largest > 0, largest, 1)


def _kept_and_gone(colours: Palette) -> list[list[object]]:
    """Return a scale from faint (-1) to darker grey for removed channels, then from light to full accent (1) for kept ones."""
    grey, teal = (partial(tint, colour, colours.paper) for colour in (colours.drop, colours.fusion))
    return [[0, grey(0.04)], [0.5, grey(0.4)], [0.5, teal(0.22)], [1, colours.fusion]]


def _hollow(fig: go.Figure, kept: np.ndarray, colours: Palette) -> None:
    rows, columns = (~kept).nonzero()
    size = float(np.clip(360 / kept.shape[1], 3, 7))
    fig.add_scatter(
        x=columns,
        y=rows,
        mode="markers",
        hoverinfo="skip",
        marker={"symbol": "square-open", "size": size, "color": colours.drop, "line": {"width": 1}},
    )


def _marks(fig: go.Figure, comparison: "CriteriaComparison", order: np.ndarray, colour: str) -> None:
    """Add invisible markers for the pointer, because heatmap cells cannot be clicked."""
    c, n = comparison.scores.shape
    if c * n <= _MARKS:
        rows, columns = np.indices((c, n)).reshape(2, -1)
        data = [
            [int(channel), name, "is kept" if kept else "is removed", int(rank), float(score)]
            for name, ranks, scores, keeps in zip(
                comparison.names, comparison.ranks, comparison.scores, comparison.kept, strict=True
            )
            for channel, rank, score, kept in zip(order, ranks[order], scores[order], keeps[order], strict=True)
        ]
        hover = (
            "<b>%{customdata[1]}</b>: channel %{customdata[0]} %{customdata[2]}"
            f"<br>rank %{{customdata[3]}} of {n}<br>score %{{customdata[4]:.4g}}"
        )
    else:
        rows, columns, votes = np.full(n, (c - 1) / 2), np.arange(n), comparison.kept.sum(0)
        data = [[int(channel), int(comparison.ranks[0, channel]), int(votes[channel])] for channel in order]
        hover = (
            f"channel %{{customdata[0]}}<br>kept by %{{customdata[2]}} of {c} criteria"
            f"<br>{comparison.names[0]} rank %{{customdata[1]:,}} of {n:,}"
        )
        fig.update_layout(hoverdistance=-1)
    fig.add_scatter(
        x=columns,
        y=rows,
        mode="markers",
        customdata=data,
        hovertemplate=hover + "<extra></extra>",
        marker={"symbol": "square", "size": 12, "opacity": 0, "color": colour},
        selected={"marker": {"opacity": 0}},
        unselected={"marker": {"opacity": 0}},
    )
