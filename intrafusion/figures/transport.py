"""A transport plan as heatmaps, with its marginals on the margins, and one channel's share in it."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from intrafusion.figures.theme import Palette, figure, palette, rgba

if TYPE_CHECKING:
    from intrafusion.transport import TransportPlan

VIEWS = {
    "coupling": "mass moved from each channel to each target",
    "cost": "distance between channel vectors",
    "matrix": "weight of each channel in each target: what multiplies the layers",
}


def plan_heatmap(
    plan: "TransportPlan", view: str = "coupling", selected: int | None = None, dark: bool = False
) -> go.Figure:
    """One of the plan's matrices, targets as rows and source channels as columns, so all three views line up.

    view: "coupling", "cost" or "matrix". Above and beside it the marginals (column and row sums for the matrix). Square
    markers on every non-zero of the plan carry the channel as customdata, as heatmap cells cannot be clicked.
    """
    colours = palette(dark)
    coupling, kept = plan.coupling.numpy().T, plan.kept.numpy()
    k, n = coupling.shape
    cells = {"coupling": coupling * n, "cost": _finite(plan.cost.numpy().T), "matrix": plan.matrix.numpy()}[view]
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
    fig.update_layout(figure(_title(plan, view), _height(k), colours).layout)
    target = "%{customdata}" if n * k <= 10_000 else "row %{y}"
    unit = {"coupling": "mass × n", "cost": "distance", "matrix": "weight"}[view]
    fig.add_heatmap(
        z=cells.astype(np.float32),
        row=2,
        col=1,
        colorscale=colours.cost() if view == "cost" else colours.mass(),
        zmin=0,
        colorbar={"title": unit, "thickness": 12, "len": 0.84, "y": 0.42},
        xgap=int(n <= 80),
        ygap=int(n <= 80),
        customdata=np.broadcast_to(kept[:, None], cells.shape) if n * k <= 10_000 else None,
        hovertemplate=f"channel %{{x}} → target {target}<br>{unit} %{{z:.4g}}<extra></extra>",
    )
    _markers(fig, plan, view, selected, colours)
    _margins(fig, plan, view, colours)
    rows, columns = _ticks(k, 24), _ticks(n, 24)
    fig.update_xaxes(showgrid=False, zeroline=False)
    fig.update_yaxes(showgrid=False, zeroline=False)
    fig.update_xaxes(title="source channel", tickvals=columns, range=[-0.6, n - 0.4], row=2, col=1)
    fig.update_yaxes(
        title="target (kept channel)",
        tickvals=rows,
        ticktext=[str(kept[i]) for i in rows],
        range=[k - 0.4, -0.6],
        row=2,
        col=1,
    )
    return fig


def _title(plan: "TransportPlan", view: str) -> str:
    k, n = plan.matrix.shape
    if view == "cost":
        return f"How different {n} channels are from the {k} that stay"
    if k == n:
        return "Nothing is pruned: every channel stays where it is"
    if plan.reduced:
        return f"{n - k} channels are fused into the {k} that stay"
    return f"The mass of {n} channels moves onto {k} targets"


def _height(k: int) -> int:
    return int(np.clip(220 + 14 * k, 420, 720))


def _finite(cost: np.ndarray) -> np.ndarray:
    return np.where(np.isfinite(cost), cost, np.nan)


def _ticks(count: int, most: int) -> np.ndarray:
    return np.unique(np.linspace(0, count - 1, min(count, most)).round().astype(int))


def _markers(fig: go.Figure, plan: "TransportPlan", view: str, selected: int | None, colours: Palette) -> None:
    sources, targets = (plan.coupling > 0).nonzero(as_tuple=True)
    x, y = sources.numpy(), targets.numpy()
    chosen = (x == selected) | (plan.kept.numpy()[y] == selected) if selected is not None else np.zeros(len(x), bool)
    size = float(np.clip(560 / max(plan.coupling.shape), 4, 15))
    weights = plan.matrix.numpy()[y, x]
    fig.add_scatter(
        x=x,
        y=y,
        mode="markers",
        row=2,
        col=1,
        customdata=np.stack([x, plan.kept.numpy()[y], weights], 1).tolist(),
        hovertemplate="channel %{customdata[0]} → target %{customdata[1]}<br>"
        "weight %{customdata[2]:.3f}<extra>click for its story</extra>",
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
    )


def _margins(fig: go.Figure, plan: "TransportPlan", view: str, colours: Palette) -> None:
    k, n = plan.matrix.shape
    if view == "matrix":
        above, beside = plan.matrix.sum(0).numpy(), plan.matrix.sum(1).numpy()
        labels = "column sum", "row sum"
    else:
        above, beside = plan.source.numpy() * n, plan.target.numpy() * n
        labels = "source × n", "target × n"
    hover = f"channel %{{x}}<br>{labels[0]} %{{y:.3f}}<extra></extra>"
    fig.add_bar(x=np.arange(n), y=above, row=1, col=1, marker_color=colours.drop, hovertemplate=hover)
    hover = f"{labels[1]} %{{x:.3f}}<extra></extra>"
    fig.add_bar(
        x=beside, y=np.arange(k), orientation="h", row=2, col=2, marker_color=colours.fusion, hovertemplate=hover
    )
    fig.update_yaxes(title=labels[0], nticks=3, rangemode="tozero", row=1, col=1)
    fig.update_xaxes(title=labels[1], nticks=3, rangemode="tozero", row=2, col=2)


def destinations(weights: Sequence[tuple[int, float]], channel: int, dark: bool = False) -> go.Figure:
    """Where one channel's weight goes: pairs of kept channel and weight, heaviest first."""
    colours = palette(dark)
    title = f"Channel {channel} goes to {len(weights)} target{'s' if len(weights) != 1 else ''}"
    fig = figure(title, 120 + 30 * max(1, len(weights)), colours)
    fig.add_bar(
        x=[weight for _, weight in weights],
        y=[f"channel {target}" for target, _ in weights],
        orientation="h",
        marker_color=[colours.dense if target == channel else colours.fusion for target, _ in weights],
        text=[f"{weight:.3f}" for _, weight in weights],
        textposition="auto",
        hoverinfo="skip",
    )
    fig.update_xaxes(title="weight in the applied matrix", rangemode="tozero")
    fig.update_yaxes(autorange="reversed", showgrid=False)
    return fig.update_layout(margin={"l": 100})
