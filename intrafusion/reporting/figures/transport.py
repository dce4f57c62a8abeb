"""Figures of a transport plan: heatmaps with its marginals at the margins, and the weights of one channel."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from intrafusion.reporting.figures._raster import CELLS, draw_matrix
from intrafusion.reporting.figures.theme import Palette, figure, palette, rgba, styled, tint

if TYPE_CHECKING:
    from intrafusion.pruning.transport.planning import TransportPlan

VIEWS = {
    "coupling": "mass moved from each channel to each target",
    "matrix": "weight of each channel in each target, by which the layers are multiplied",
    "cost": "distance between channels: the cost of moving a unit of mass",
}
ORDERS = {
    "index": "in the order of the layer",
    "importance": "most important first",
    "target": "grouped by the target with their largest weight",
}
_UNITS = {"coupling": "mass × n", "cost": "distance", "matrix": "weight"}


def arrange(plan: "TransportPlan", scores: np.ndarray, order: str = "index") -> tuple[np.ndarray, np.ndarray]:
    """Return the order of the source channels (n,) from left to right and of the plan's rows (k,) from the top.

    order: a name of ORDERS. "target" groups the channels of each target, with the target first, then by decreasing weight.
    """
    matrix, kept = plan.matrix.numpy(), plan.kept.numpy()
    k, n = matrix.shape
    if order == "importance":
        return np.argsort(-scores, kind="stable"), np.argsort(-scores[kept], kind="stable")
    if order == "target":
        goes, weight = matrix.argmax(0), matrix.max(0)
        goes = np.where(weight > 0, goes, k)  # channels without a target come last
        itself = np.isin(np.arange(n), kept)
        return np.lexsort((-weight, ~itself, goes)), np.arange(k)
    return np.arange(n), np.arange(k)


def plan_heatmap(
    plan: "TransportPlan",
    scores: Sequence[float],
    view: str = "coupling",
    selected: int | None = None,
    order: str = "index",
    dark: bool = False,
) -> go.Figure:
    """Draw one of the plan's matrices, with targets as rows and source channels as columns, so that all views align.

    view: a name of VIEWS. order: a name of ORDERS. The marginals (column and row sums for the matrix) are drawn above and
    beside it: mass that stays is solid, mass that moves is tinted. Square markers on every non-zero of the plan have the
    channel as customdata, because heatmap cells cannot be clicked.
    """
    colours = palette(dark)
    columns, rows = arrange(plan, np.asarray(scores, float), order)
    kept = plan.kept.numpy()
    n = len(columns)
    cells = {
        "coupling": plan.coupling.numpy().T * n,
        "cost": _finite(plan.cost.numpy().T),
        "matrix": plan.matrix.numpy(),
    }
    values = cells[view][rows[:, None], columns]
    fig = make_subplots(
        2,
        2,
        column_widths=[0.86, 0.14],
        row_heights=[0.16, 0.84],
        shared_xaxes=True,
        shared_yaxes=True,
        horizontal_spacing=0.015,
        vertical_spacing=0.02,
    )
    styled(fig, _title(plan, view), _height(len(rows)), colours)
    names = None
    if values.size <= CELLS:
        names = np.stack(np.broadcast_arrays(columns[None], kept[rows][:, None]), -1)
    draw_matrix(
        fig,
        values,
        colours.cost() if view == "cost" else colours.mass(),
        (0, _top(values)),
        _UNITS[view],
        2,
        1,
        "channel %{customdata[0]} → target %{customdata[1]}",
        names,
        {"thickness": 12, "len": 0.84, "y": 0.42},
    )
    _markers(fig, plan, view, selected, columns, rows, colours)
    _margins(fig, plan, view, columns, rows, colours)
    across, down = _ticks(n, 24), _ticks(len(rows), 24)
    fig.update_xaxes(showgrid=False, zeroline=False)
    fig.update_yaxes(showgrid=False, zeroline=False)
    words = {"index": "", "importance": ", most important first", "target": ", grouped by target"}[order]
    fig.update_xaxes(
        title=f"source channel{words}",
        tickvals=across,
        ticktext=columns[across].tolist(),
        range=[-0.6, n - 0.4],
        row=2,
        col=1,
    )
    fig.update_yaxes(
        title="target (kept channel)",
        tickvals=down,
        ticktext=kept[rows[down]].tolist(),
        range=[len(rows) - 0.4, -0.6],
        row=2,
        col=1,
    )
    return fig


def _title(plan: "TransportPlan", view: str) -> str:
    k, n = plan.matrix.shape
    if view == "cost":
        return f"Distance of {n} channels from the {k} kept ones"
    if k == n:
        return "Nothing is pruned: every channel is kept"
    moved = f"{plan.share_moved:.0%} of the mass moves"
    if float(plan.coupling.sum()) < 0.999:
        return f"{moved}, and {1 - float(plan.coupling.sum()):.0%} is discarded: {n} channels onto {k} targets"
    return f"{moved}: {n - k} channels are fused into the {k} kept ones"


def _height(k: int) -> int:
    return int(np.clip(220 + 14 * k, 420, 720))


def _top(values: np.ndarray) -> float:
    return float(np.nanmax(values)) or 1.0


def _finite(cost: np.ndarray) -> np.ndarray:
    return np.where(np.isfinite(cost), cost, np.nan)


def _ticks(count: int, most: int) -> np.ndarray:
    return np.unique(np.linspace(0, count - 1, min(count, most)).round().astype(int))


def _markers(
    fig: go.Figure,
    plan: "TransportPlan",
    view: str,
    selected: int | None,
    columns: np.ndarray,
    rows: np.ndarray,
    colours: Palette,
) -> None:
    sources, targets = (index.numpy() for index in (plan.coupling > 0).nonzero(as_tuple=True))
    kept, weights = plan.kept.numpy()[targets], plan.matrix.numpy()[targets, sources]
    chosen = (sources == selected) | (kept == selected) if selected is not None else np.zeros(len(kept), bool)
    if len(sources) > CELLS:  # a dense plan: only the heaviest entries can be clicked
        heaviest = np.argsort(-weights, kind="stable")[:CELLS]
        sources, targets, kept, weights, chosen = (a[heaviest] for a in (sources, targets, kept, weights, chosen))
    size = float(np.clip(560 / max(plan.coupling.shape), 4, 15))
    scatter = go.Scattergl if len(sources) > 3000 else go.Scatter
    fig.add_trace(
        scatter(
            x=columns.argsort()[sources],
            y=rows.argsort()[targets],
            mode="markers",
            customdata=np.stack([sources, kept, weights], 1).tolist(),
            hovertemplate="channel %{customdata[0]} → target %{customdata[1]}<br>"
            "weight %{customdata[2]:.3f}<extra>click for details</extra>",
            marker={
                "symbol": "square",
                "size": size,
                "color": rgba(colours.fusion, 0.02 if view != "cost" else 0.25),
                "line": {
                    "width": np.where(chosen, 2.5, 0 if view != "cost" else 0.8),
                    "color": np.where(chosen, colours.second, colours.fusion),
                },
            },
            selected={"marker": {"opacity": 1}},
            unselected={"marker": {"opacity": 1}},
        ),
        row=2,
        col=1,
    )


def _margins(fig: go.Figure, plan: "TransportPlan", view: str, columns: np.ndarray, rows: np.ndarray, colours: Palette) -> None:
    """Draw the sums over rows and columns: mass that stays in place is solid, mass that moves is tinted."""
    k, n = plan.matrix.shape
    own = np.zeros(n)
    if view == "matrix":
        own[plan.kept.numpy()] = plan.matrix[np.arange(k), plan.kept].numpy()
        above, beside, labels = plan.matrix.sum(0).numpy(), plan.matrix.sum(1).numpy(), ("column sum", "row sum")
    else:
        own[plan.kept.numpy()] = plan.stays.numpy() * n
        above, beside, labels = plan.source.numpy() * n, plan.target.numpy() * n, ("source × n", "target × n")
    light = tint(colours.fusion, colours.paper, 0.35)
    stays, moves = own, np.maximum(above - own, 0)
    for values, colour, word in ((stays, colours.fusion, "stays"), (moves, light, "moves or is discarded")):
        hover = f"channel %{{customdata}}<br>{labels[0]}: %{{y:.3f}} {word}<extra></extra>"
        fig.add_bar(
            x=np.arange(n),
            y=values[columns],
            customdata=columns,
            row=1,
            col=1,
            marker_color=colour,
            hovertemplate=hover,
        )
    own_rows = own[plan.kept.numpy()]
    absorbed = np.maximum(beside - own_rows, 0)
    for values, colour, word in ((own_rows, colours.fusion, "its own"), (absorbed, light, "absorbed or missing")):
        hover = f"target %{{customdata}}<br>{labels[1]}: %{{x:.3f}} {word}<extra></extra>"
        fig.add_bar(
            x=values[rows],
            y=np.arange(k),
            customdata=plan.kept.numpy()[rows],
            orientation="h",
            row=2,
            col=2,
            marker_color=colour,
            hovertemplate=hover,
        )
    fig.update_layout(barmode="stack")
    fig.update_yaxes(title=labels[0], nticks=3, rangemode="tozero", row=1, col=1)
    fig.update_xaxes(title=labels[1], nticks=3, rangemode="tozero", row=2, col=2)


def weight_bars(weights: Sequence[tuple[int, float]], channel: int, kept: bool, dark: bool = False) -> go.Figure:
    """Draw one channel's row or column of the applied matrix.

    weights: pairs of the other channel and the weight, heaviest first. kept: True if the channel is kept and the pairs are
    the channels merged into it, including itself; False if the pairs are the targets to which it goes.
    """
    colours = palette(dark)
    others = sum(other != channel for other, _ in weights)
    title = (
        (f"Channel {channel} absorbs {others} other{'s' * (others != 1)}" if others else f"Channel {channel} absorbs no others")
        if kept
        else f"Channel {channel} is merged into {others} target{'s' * (others != 1)}"
    )
    shown, more = list(weights[:20]), len(weights) - 20
    fig = figure(title + (f"; the heaviest 20 of {len(weights)}" if more > 0 else ""), 120 + 30 * max(1, len(shown)), colours)
    fig.add_bar(
        x=[weight for _, weight in shown],
        y=[f"channel {other}" for other, _ in shown],
        orientation="h",
        marker_color=[
            colours.fusion if other == channel or not kept else tint(colours.fusion, colours.paper, 0.35) for other, _ in shown
        ],
        text=[f"{weight:.3f}" for _, weight in shown],
        textposition="auto",
        hoverinfo="skip",
    )
    fig.update_xaxes(title="weight in the applied matrix", rangemode="tozero")
    fig.update_yaxes(autorange="reversed", showgrid=False)
    return fig.update_layout(margin={"l": 100})
