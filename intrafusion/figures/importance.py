"""Importance of a group's channels, with the cut."""

from collections.abc import Sequence

import numpy as np
import plotly.graph_objects as go

from intrafusion.figures.theme import figure, palette, rgba


def importance_bars(
    scores: Sequence[float],
    kept: Sequence[int],
    criterion: str,
    by_rank: bool = True,
    selected: int | None = None,
    dark: bool = False,
) -> go.Figure:
    """One bar a channel, the kept ones solid, the others hollow, and the line between them.

    scores: (n,). kept: channels that stay. by_rank: most important first, else by channel number. A bar's customdata is
    its channel.
    """
    colours, values = palette(dark), np.asarray(scores, float)
    n, stays = len(values), np.isin(np.arange(len(values)), kept)
    order = np.argsort(-values, kind="stable") if by_rank else np.arange(n)
    gone = n - int(stays.sum())
    title = f"{n - gone} of {n} channels stay" + (f", {gone} go" if gone else ": nothing is pruned at this sparsity")
    fig = figure(title, 360, colours)
    solid = [colours.fusion if stays[c] else rgba(colours.drop, 0.12) for c in order]
    edge = [colours.second if c == selected else colours.fusion if stays[c] else colours.drop for c in order]
    fig.add_bar(
        x=np.arange(n),
        y=values[order],
        customdata=order,
        marker={"color": solid, "line": {"color": edge, "width": [3 if c == selected else 1 for c in order]}},
        hovertemplate="channel %{customdata}<br>score %{y:.4g}<extra></extra>",
        selected={"marker": {"opacity": 1}},
        unselected={"marker": {"opacity": 1}},
    )
    if by_rank and gone:
        _cut_line(fig, values, order, stays, colours.dense)
    labels = np.unique(np.linspace(0, n - 1, min(n, 17)).round().astype(int))
    axis = "channel, most important first" if by_rank else "channel"
    fig.update_xaxes(title=axis, tickvals=labels, ticktext=[str(order[i]) for i in labels])
    fig.update_yaxes(title=f"{criterion} score", rangemode="tozero")
    return fig.update_layout(bargap=0.15)


def _cut_line(fig: go.Figure, values: np.ndarray, order: np.ndarray, stays: np.ndarray, colour: str) -> None:
    """Where kept turns into dropped; blocks of a zero-padded group have a cut each, so then there is no single line."""
    count = int(stays.sum())
    if stays[order[:count]].all():
        fig.add_vline(count - 0.5, line={"color": colour, "dash": "dot", "width": 1.5})
        fig.add_annotation(
            x=count - 0.5, y=1, yref="paper", text="stay | go", showarrow=False, font={"color": colour}, yshift=10
        )
