"""Figures of transport plans: channels on a plane with arrows, a plan at every sparsity, and plans side by side."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from intrafusion.reporting.figures._raster import draw_matrix
from intrafusion.reporting.figures.theme import Palette, figure, palette, rgba, styled, tint
from intrafusion.reporting.figures.transport import arrange

if TYPE_CHECKING:
    from intrafusion.pruning.merge import ChannelMap
    from intrafusion.pruning.transport.planning import TransportPlan


def channel_map(
    plan: "TransportPlan", places: np.ndarray, words: str, selected: int | None = None, dark: bool = False
) -> go.Figure:
    """Draw the channels at `places` (n, 2): kept ones solid, dropped ones hollow, with an arrow for each moved weight.

    words: title of the horizontal axis, which says what the plane shows. A marker's customdata is its channel.
    """
    colours = palette(dark)
    kept = np.isin(np.arange(len(places)), plan.kept.numpy())
    gone = int((~kept).sum())
    title = f"{gone} channels move to the {len(plan.kept)} kept ones" if gone else "Nothing is pruned: no channel moves"
    fig = figure(title, 560, colours)
    arrows = _arrows(plan)
    ours = [pair for pair in arrows if selected in pair[:2]]
    for part, colour, width in (
        ([a for a in arrows if a[2] < 0.5], rgba(colours.fusion, 0.25), 1.0),
        ([a for a in arrows if a[2] >= 0.5], rgba(colours.fusion, 0.7), 1.6),
        (ours, colours.second, 2.6),
    ):
        _add_arrows(fig, places, part, colour, width)
    size = float(np.clip(160 / np.sqrt(len(places)), 6, 15))
    for chosen, fill, edge, word in (
        (~kept, colours.paper, colours.drop, "removed"),
        (kept, colours.fusion, colours.fusion, "kept"),
    ):
        _add_channels(fig, places, np.flatnonzero(chosen), size, fill, edge, word)
    if selected is not None:
        fig.add_scatter(
            x=places[[selected], 0],
            y=places[[selected], 1],
            mode="markers+text",
            text=[f"<b>{selected}</b>"],
            textposition="top center",
            textfont={"color": colours.second, "size": 15},
            hoverinfo="skip",
            marker={"size": size + 7, "color": "rgba(0,0,0,0)", "line": {"color": colours.second, "width": 3}},
        )
    fig.update_xaxes(title=words, showticklabels=False, ticks="")
    fig.update_yaxes(showticklabels=False, showgrid=False, scaleanchor="x")
    return fig


def _arrows(plan: "TransportPlan", most: int = 4000) -> list[tuple[int, int, float]]:
    """Return (from, to, weight) for the `most` heaviest weights of the applied matrix between different channels."""
    rows, sources = (index.numpy() for index in (plan.matrix > 0).nonzero(as_tuple=True))
    weights, targets = plan.matrix.numpy()[rows, sources], plan.kept.numpy()[rows]
    order = [i for i in np.argsort(-weights, kind="stable") if targets[i] != sources[i]][:most]
    return [(int(sources[i]), int(targets[i]), float(weights[i])) for i in order]


def _add_arrows(
    fig: go.Figure, places: np.ndarray, arrows: Sequence[tuple[int, int, float]], colour: str, width: float
) -> None:
    if not arrows:
        return
    x, y = ([value for a, b, _ in arrows for value in (places[a, axis], places[b, axis], None)] for axis in (0, 1))
    heads = [0, 6 + 2 * width, 0] * len(arrows)
    fig.add_scatter(
        x=x,
        y=y,
        mode="lines+markers",
        line={"color": colour, "width": width},
        hoverinfo="skip",
        marker={"symbol": "arrow", "angleref": "previous", "size": heads, "color": colour, "standoff": 7, "opacity": 1},
    )


def _add_channels(
    fig: go.Figure, places: np.ndarray, channels: np.ndarray, size: float, fill: str, edge: str, word: str
) -> None:
    fig.add_scatter(
        x=places[channels, 0],
        y=places[channels, 1],
        mode="markers",
        customdata=channels.tolist(),
        hovertemplate=f"channel %{{customdata}}: {word}<extra>click for details</extra>",
        marker={"size": size, "color": fill, "line": {"color": edge, "width": 2}},
        selected={"marker": {"opacity": 1}},
        unselected={"marker": {"opacity": 1}},
    )


def sparsity_player(
    plans: Sequence[tuple[float, "TransportPlan"]],
    scores: Sequence[float],
    start: float = 0,
    selected: int | None = None,
    dark: bool = False,
) -> go.Figure:
    """Draw the plan at every sparsity as an animation; both axes have all channels, the most important first.

    plans: (sparsity, plan), ascending. start: the sparsity to show first.
    """
    colours = palette(dark)
    order = np.argsort(-np.asarray(scores, float), kind="stable")
    n, place = len(order), order.argsort()
    fig = figure("", 640, colours)
    frames = []
    for sparsity, plan in plans:
        title = f"At {sparsity:.0%}: {n - len(plan.kept)} of {n} channels are fused into {len(plan.kept)}"
        frames.append(
            go.Frame(data=[_marks(plan, place, selected, colours)], name=f"{sparsity:.0%}", layout={"title": {"text": title}})
        )
    first = int(np.argmin([abs(sparsity - start) for sparsity, _ in plans]))
    fig.add_trace(frames[first].data[0])
    fig.frames = frames
    timing = {"frame": {"duration": 500, "redraw": True}, "transition": {"duration": 0}, "fromcurrent": True}
    still = {"mode": "immediate", "frame": {"duration": 0, "redraw": True}, "transition": {"duration": 0}}
    fig.update_layout(
        title={"text": frames[first].layout.title.text},
        margin={"b": 130},
        sliders=[
            {
                "active": first,
                "steps": [{"label": f.name, "method": "animate", "args": [[f.name], still]} for f in frames],
                "currentvalue": {"prefix": "sparsity "},
                "x": 0.12,
                "len": 0.88,
                "y": -0.12,
                "bgcolor": colours.grid,
            }
        ],
        updatemenus=[
            {
                "type": "buttons",
                "direction": "left",
                "x": 0,
                "y": -0.14,
                "xanchor": "left",
                "yanchor": "top",
                "pad": {"t": 12},
                "bgcolor": colours.paper,
                "bordercolor": colours.grid,
                "buttons": [
                    {"label": "▶", "method": "animate", "args": [None, timing]},
                    {"label": "❚❚", "method": "animate", "args": [[None], still]},
                ],
            }
        ],
    )
    ticks = np.unique(np.linspace(0, n - 1, min(n, 24)).round().astype(int))
    labels = order[ticks].tolist()
    fig.update_xaxes(title="source channel, most important first", tickvals=ticks, ticktext=labels, range=[-0.7, n - 0.3])
    fig.update_yaxes(
        title="target channel",
        tickvals=ticks,
        ticktext=labels,
        range=[n - 0.3, -0.7],
        showgrid=False,
        scaleanchor="x",
        constrain="domain",
    )
    return fig.update_xaxes(constrain="domain")


def _marks(plan: "TransportPlan", place: np.ndarray, selected: int | None, colours: Palette) -> go.Scatter:
    rows, sources = (index.numpy() for index in (plan.matrix > 1e-3).nonzero(as_tuple=True))
    targets, weights = plan.kept.numpy()[rows], plan.matrix.numpy()[rows, sources]
    heavy = np.argsort(-weights, kind="stable")[: 3 * len(place)]
    sources, targets, weights = sources[heavy], targets[heavy], weights[heavy]
    side = float(np.clip(440 / len(place), 3, 18))
    chosen = (sources == selected) | (targets == selected)
    colour = np.where(
        chosen, colours.second, np.where(sources == targets, tint(colours.fusion, colours.paper, 0.45), colours.fusion)
    )
    return go.Scatter(
        x=place[sources],
        y=place[targets],
        mode="markers",
        customdata=np.stack([sources, targets, weights], 1).tolist(),
        hovertemplate="channel %{customdata[0]} → %{customdata[1]}, weight %{customdata[2]:.2f}<extra></extra>",
        marker={"symbol": "square", "size": side * np.sqrt(weights.clip(0.1, 1)), "color": colour, "line": {"width": 0}},
    )


def learned_beside(
    plan: "TransportPlan",
    learned: "ChannelMap",
    scores: Sequence[float],
    selected: int | None = None,
    order: str = "index",
    dark: bool = False,
) -> go.Figure:
    """Draw the applied matrix T beside the learned map M of the same kept channels.

    Rows are targets, columns are source channels. order: as in `plan_heatmap`. Weights beyond [-1, 1] have the colour of the
    nearer end.
    """
    colours = palette(dark)
    columns, rows = arrange(plan, np.asarray(scores, float), order)
    kept, n = plan.kept.numpy(), len(columns)
    gone = np.setdiff1d(np.arange(n), kept)
    fig = make_subplots(
        1,
        2,
        subplot_titles=["T: transport, from weights", f"M: learned at the input of {learned.consumer}"],
        horizontal_spacing=0.03,
        shared_yaxes=True,
    )
    share = float(learned.explained.numpy()[gone].mean()) if len(gone) else 1.0
    styled(fig, f"M explains {share:.0%} of the {len(gone)} removed channels", 470, colours)
    names = np.stack(np.broadcast_arrays(columns[None], kept[rows][:, None]), -1)
    for column, matrix in enumerate((plan.matrix.numpy(), learned.matrix.numpy().T), start=1):
        values = matrix[rows[:, None], columns]
        bar = {"thickness": 12, "len": 0.9} if column == 2 else None
        draw_matrix(
            fig,
            values,
            colours.difference(),
            (-1, 1),
            "weight",
            1,
            column,
            "channel %{customdata[0]} in target %{customdata[1]}",
            names,
            bar,
        )
    if selected is not None:
        place = int(columns.argsort()[selected])
        for column in (1, 2):
            fig.add_vrect(
                place - 0.5,
                place + 0.5,
                row=1,
                col=column,
                line={"color": colours.second, "width": 2},
                fillcolor="rgba(0,0,0,0)",
            )
    across, down = (np.unique(np.linspace(0, c - 1, min(c, 16)).round().astype(int)) for c in (n, len(rows)))
    fig.update_xaxes(
        title="source channel",
        tickvals=across,
        ticktext=columns[across].tolist(),
        range=[-0.6, n - 0.4],
        showgrid=False,
    )
    fig.update_yaxes(tickvals=down, ticktext=kept[rows[down]].tolist(), range=[len(rows) - 0.4, -0.6], showgrid=False)
    fig.update_yaxes(title="target (kept channel)", col=1)
    fig.update_annotations(font={"size": 13, "color": colours.dense})
    return fig.update_layout(margin={"t": 92})


def two_plans(
    first: "TransportPlan", second: "TransportPlan", names: tuple[str, str], shared: float, dark: bool = False
) -> go.Figure:
    """Draw the applied matrices of two settings and their difference, with all channels on both axes.

    names: of the settings. shared: the share of the mass that both plans put in the same places.
    """
    colours = palette(dark)
    maps = [plan.spread().numpy() for plan in (first, second)]
    n = len(maps[0])
    fig = make_subplots(
        1, 3, subplot_titles=[f"A: {names[0]}", f"B: {names[1]}", "B − A"], horizontal_spacing=0.05, shared_yaxes=True
    )
    styled(fig, f"Both plans move {shared:.0%} of the mass to the same targets", 480, colours)
    top = max(float(part.max()) for part in maps) or 1.0
    names_of = np.stack(np.broadcast_arrays(np.arange(n)[None], np.arange(n)[:, None]), -1) if n * n <= 10_000 else None
    hover = "channel %{customdata[0]} → target %{customdata[1]}"
    for column, part in enumerate(maps, start=1):
        bar = {"thickness": 10, "x": 1.0, "len": 0.45, "y": 0.78} if column == 1 else None
        draw_matrix(fig, part, colours.mass(), (0, top), "weight", 1, column, hover, names_of, bar)
    difference = maps[1] - maps[0]
    limit = float(np.abs(difference).max()) or 1.0
    bar = {"thickness": 10, "x": 1.0, "len": 0.45, "y": 0.25}
    draw_matrix(fig, difference, colours.difference(), (-limit, limit), "B − A", 1, 3, hover, names_of, bar)
    fig.update_xaxes(title="source channel", range=[-0.6, n - 0.4], constrain="domain", showgrid=False)
    fig.update_yaxes(range=[n - 0.4, -0.6], showgrid=False, constrain="domain")
    fig.update_yaxes(title="target channel", col=1)
    for column in (1, 2, 3):
        fig.update_yaxes(scaleanchor=f"x{column if column > 1 else ''}", row=1, col=column)
    fig.update_annotations(font={"size": 13, "color": colours.dense})
    return fig.update_layout(margin={"t": 92, "r": 80})
