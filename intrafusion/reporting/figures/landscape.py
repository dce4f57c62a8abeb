"""Figures of loss landscapes: a slice with three networks, paths between two, and displacements in sharp directions."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from intrafusion.reporting.figures.theme import Palette, figure, palette, rgba, styled, tint

if TYPE_CHECKING:
    from intrafusion.evaluation.loss_landscape import Surface
    from intrafusion.studies.weight_space import Mark, Sharpness, Slice
    from intrafusion.training.mode_connectivity import Path

MEASURES = {"accuracy": "accuracy, %", "loss": "loss, nats"}
SLICE_HEIGHT, PATH_HEIGHT, SHARP_HEIGHT = 560, 400, 360


def network_colour(name: str, colours: Palette) -> str:
    """Return the colour of a network by its name in `Solutions`."""
    merges = {"dropped": "drop", "fused": "fusion"}
    return colours.dense if name == "dense" else colours.merge(merges.get(name, name))


def empty_plane(title: str, height: int, dark: bool = False) -> go.Figure:
    """Return an empty figure as a placeholder."""
    colours = palette(dark)
    fig = figure(title, height, colours)
    box = {"showticklabels": False, "ticks": "", "showgrid": False, "showline": True, "mirror": True, "range": [0, 1]}
    fig.update_yaxes(linecolor=colours.grid)
    return fig.update_xaxes(**box).update_yaxes(**box)


def slice_map(found: "Slice", what: str = "accuracy", dark: bool = False) -> go.Figure:
    """Draw accuracy or loss around the three networks: background colour is good, dark (in dark mode bright) is bad.

    Distances are to scale. what: "accuracy" or "loss". Only the finest complete grid of even spacing is drawn.
    """
    colours = palette(dark)
    fig = figure(landscape_headline(found.marks), SLICE_HEIGHT, colours)
    if (grid := found.surface.finest) is not None:
        fig.add_trace(_contour(grid, what, colours))
    for mark in found.marks:
        value = f"{mark.accuracy:.1%}" if what == "accuracy" else f"{mark.loss:.3g} nats"
        colour = network_colour(mark.name, colours)
        fig.add_scatter(
            x=[mark.x],
            y=[mark.y],
            mode="markers",
            name=mark.name,
            marker={"size": 15, "color": colour, "line": {"color": colours.paper, "width": 3}},
            hovertemplate=f"{mark.name}: {mark.accuracy:.1%}, loss {mark.loss:.3g} nats<br>"
            f"distance to dense {mark.distance:.3g}<extra></extra>",
        )
        fig.add_annotation(
            x=mark.x,
            y=mark.y,
            text=f"<b>{mark.name}</b> {value}",
            showarrow=False,
            yanchor="bottom",
            yshift=11,
            font={"color": colours.dense if mark.name == "dropped" else colour, "size": 14},
            bgcolor=rgba(colours.paper, 0.8),
            borderpad=2,
        )
    ends = found.surface
    fig.update_xaxes(
        title="distance from dense towards dropped (L2 of all weights)",
        range=[ends.x[0], ends.x[-1]],
        constrain="domain",
    )
    fig.update_yaxes(
        title="perpendicular distance, towards fused",
        range=[ends.y[0], ends.y[-1]],
        scaleanchor="x",
        showgrid=False,
        constrain="domain",
    )
    return fig


def _contour(grid: "Surface", what: str, colours: Palette) -> go.Contour:
    ink = tint(colours.dense, colours.paper, 0.62)
    shared: dict[str, Any] = {
        "x": grid.x,
        "y": grid.y,
        "line": {"color": rgba(colours.dense, 0.35), "width": 1},
        "hovertemplate": "%{customdata[0]:.1%}, loss %{customdata[1]:.3g} nats<extra></extra>",
        "customdata": np.stack([grid.accuracy, np.nan_to_num(grid.loss, posinf=1e30, nan=1e30)], -1),
    }
    labels = {"showlabels": True, "labelfont": {"size": 11, "color": colours.dense}, "coloring": "heatmap"}
    if what == "accuracy":
        return go.Contour(
            z=100 * grid.accuracy,
            zmin=0,
            zmax=100,
            colorscale=[[0, ink], [1, colours.paper]],
            contours={"start": 10, "end": 90, "size": 10, **labels},
            showscale=False,
            **shared,
        )
    powers = np.log10(np.clip(np.nan_to_num(grid.loss, posinf=1e3, nan=1e3), 1e-3, 1e3))
    low, high = np.floor(powers.min()), np.ceil(powers.max())
    ticks = np.arange(low, high + 1)
    names = {"tickvals": ticks.tolist(), "ticktext": [f"{10.0**tick:g}" for tick in ticks]}
    return go.Contour(
        z=powers,
        zmin=low,
        zmax=max(high, low + 1),
        colorscale=[[0, colours.paper], [1, ink]],
        contours={"start": low, "end": high, "size": 0.5, **labels, "showlabels": False},
        **shared,
        colorbar={"title": {"text": MEASURES[what]}, "thickness": 12, "len": 0.9, **names},
    )


def landscape_headline(marks: Sequence["Mark"]) -> str:
    """Return the accuracies of the three networks on the same images as a title."""
    by_name = {mark.name: mark for mark in marks}
    fused, dropped, dense = (by_name[name].accuracy for name in ("fused", "dropped", "dense"))
    verb = "keeps" if fused >= dropped else "keeps only"
    return f"Fused {verb} {fused:.1%} where dropped keeps {dropped:.1%}; dense has {dense:.1%}"


def path_panels(found: "Path", names: tuple[str, str], dark: bool = False) -> go.Figure:
    """Draw accuracy and loss from one network to another, straight and along the trained curve. names: of the ends."""
    colours = palette(dark)
    fig = make_subplots(1, 2, subplot_titles=("accuracy, %", "loss, nats"), horizontal_spacing=0.08)
    styled(fig, path_headline(found, names), PATH_HEIGHT, colours)
    ways = (found.line, "straight line", colours.drop, "dot"), (found.curve, "trained path", colours.second, "solid")
    for walk, name, colour, dash in ways:
        known = np.isfinite(walk.accuracy)
        for column, values, form in ((1, 100 * walk.accuracy, "%{y:.1f} %"), (2, walk.loss, "%{y:.3g} nats")):
            shown = known & np.isfinite(values)
            fig.add_scatter(
                x=walk.t[shown],
                y=values[shown],
                mode="lines+markers",
                name=name,
                row=1,
                col=column,
                line={"color": colour, "width": 2.5, "dash": dash},
                marker={"size": 4},
                hovertemplate=f"{name} at %{{x:.2f}}: {form}<extra></extra>",
            )
        if known[1:-1].any():
            place = _clearest(walk.accuracy, found.line.accuracy if walk is found.curve else found.curve.accuracy)
            fig.add_annotation(
                x=walk.t[place],
                y=100 * walk.accuracy[place],
                text=name,
                showarrow=False,
                row=1,
                col=1,
                font={"color": colour},
                yshift=12 if walk is found.curve else -14,
            )
    ticks = {"tickvals": [0, 0.5, 1], "ticktext": [names[0], "halfway", names[1]], "range": [-0.04, 1.04]}
    fig.update_xaxes(**ticks)
    fig.update_yaxes(range=[0, 104], row=1, col=1)
    fig.update_yaxes(rangemode="tozero", row=1, col=2)
    fig.update_annotations(font={"size": 14, "color": colours.dense}, selector={"yref": "paper"})
    return fig.update_layout(margin={"t": 84})


def _clearest(ours: np.ndarray, other: np.ndarray) -> int:
    """Return the index between the ends where two walks differ most, or near the middle if the other is not known."""
    inside = np.arange(1, len(ours) - 1)
    inside = inside[np.isfinite(ours[inside])]
    gaps = np.nan_to_num(np.abs(ours - other)[inside], nan=0.0) - 1e-6 * np.abs(inside - len(ours) / 2)
    return int(inside[gaps.argmax()])


def path_headline(found: "Path", names: tuple[str, str]) -> str:
    """Return the average accuracies along the line and the path as a title."""
    if found.line.share < 1:
        return f"From {names[0]} to {names[1]}"
    line = float(found.line.accuracy.mean())
    if found.curve.share < 1:
        return f"From {names[0]} to {names[1]}: {line:.1%} on average along the straight line"
    curve = float(found.curve.accuracy.mean())
    return f"From {names[0]} to {names[1]}: {curve:.1%} on average along a trained path, {line:.1%} along the line"


def sharp_bars(found: "Sharpness", dark: bool = False) -> go.Figure:
    """Draw the largest eigenvalues of the Hessian and, once they are final, the share of each displacement in their span."""
    colours = palette(dark)
    fig = make_subplots(
        1,
        2,
        horizontal_spacing=0.22,
        column_widths=[0.45, 0.55],
        subplot_titles=("largest eigenvalues of the Hessian, by rank", "share of the displacement in these directions"),
    )
    styled(fig, sharp_headline(found), SHARP_HEIGHT, colours)
    values = found.values.tolist()
    fig.add_bar(
        x=list(range(1, len(values) + 1)),
        y=values,
        marker={"color": colours.dense},
        row=1,
        col=1,
        error_y={"array": found.residuals.tolist(), "color": colours.drop, "thickness": 1.5},
        hovertemplate="eigenvalue %{x}: %{y:.4g} ± %{error_y.array:.2g}<extra></extra>",
    )
    names = list(found.shares)[::-1]
    shades = [
        network_colour(n, colours) if n in ("dropped", "fused") else tint(colours.drop, colours.paper, 0.5) for n in names
    ]
    fig.add_bar(
        x=[found.shares[name] for name in names],
        y=names,
        orientation="h",
        marker={"color": shades},
        row=1,
        col=2,
        text=[percent(found.shares[name]) for name in names],
        textposition="outside",
        cliponaxis=False,
        hovertemplate="%{y}: %{x:.3%}<extra></extra>",
    )
    fig.update_xaxes(dtick=1, row=1, col=1)
    widest = max(found.shares.values(), default=1.0)
    fig.update_xaxes(range=[0, 1.25 * widest], tickformat="~%", nticks=5, showgrid=True, gridcolor=colours.grid, row=1, col=2)
    fig.update_yaxes(title="nats per squared distance", rangemode="tozero", row=1, col=1)
    fig.update_yaxes(showgrid=False, ticks="", showticklabels=bool(names), row=1, col=2)
    fig.update_annotations(font={"size": 14, "color": colours.dense}, selector={"yref": "paper"})
    return fig.update_layout(margin={"t": 84, "r": 50})


def sharp_headline(found: "Sharpness") -> str:
    """Return a title that compares the displacements' shares in the sharp directions with chance."""
    count = len(found.values)
    if not found.shares:
        return f"The {count} sharpest directions so far, step {found.step} of {found.steps}"
    chance = max(found.shares["random, changed weights"], 1e-300)
    times = (found.shares[name] / chance for name in ("dropped", "fused"))
    dropped, fused = (f"{ratio:.2g}" if ratio < 100 else f"{ratio:,.0f}" for ratio in times)
    return f"Share in the {count} sharpest directions: dropping {dropped} times chance, fusion {fused} times"


def percent(share: float) -> str:
    """Format a small share as percent: three significant digits, or scientific notation below 1e-6."""
    return f"{100 * share:.3g} %" if share >= 1e-6 or not share else f"{100 * share:.1e} %"
