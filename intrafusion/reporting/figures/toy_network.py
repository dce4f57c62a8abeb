"""Figures of the toy network: its graph, the neurons in the input plane, matrices with numbers, and decision regions.

Neurons are rows (w1, w2, b, v1, v2), and their numbers are given beside them. A marker's customdata is [neuron], or
[source, target] in a matrix.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import plotly.graph_objects as go

from intrafusion.reporting.figures.theme import Palette, figure, palette, rgba, tint

if TYPE_CHECKING:
    from intrafusion.evaluation.accuracy import Evaluation

_HEIGHT, _REACH = 400, 1.6
_AS_IT_IS = {"selected": {"marker": {"opacity": 1}}, "unselected": {"marker": {"opacity": 1}}}


def network(rows: np.ndarray, names: Sequence[int], merge: str, selected: int, title: str, dark: bool = False) -> go.Figure:
    """Draw inputs, neurons and outputs, with a line for each weight: thicker for larger weights, dotted for negative ones.

    rows: (n, 5). merge: "dense" or "fusion", sets the colour of the discs. The selected neuron's lines show their weights.
    """
    colours, n = palette(dark), len(names)
    fig = figure(title, _HEIGHT, colours)
    heights = ((n - 1) / 2 - np.arange(n)).tolist()
    ends = [(x, y * max(n - 1, 1) / 4) for x in (0, 2) for y in (1, -1)]
    for name, height, row in sorted(zip(names, heights, rows, strict=True), key=lambda part: part[0] == selected):
        for end, value in zip(ends, row[[0, 1, 3, 4]].tolist(), strict=True):
            _weight(fig, end, (1, height), value, name == selected, colours)
    _discs(fig, np.stack([np.ones(n), heights], 1), names, [merge] * n, selected, colours)
    fig.add_scatter(
        x=[end[0] for end in ends],
        y=[end[1] for end in ends],
        mode="text",
        text=["x₁ ", "x₂ ", " outer", " inner"],
        textposition=["middle left", "middle left", "middle right", "middle right"],
        hoverinfo="skip",
    )
    fig.update_xaxes(visible=False, range=[-0.25, 2.35])
    fig.update_yaxes(visible=False, range=[-max(n, 2) / 2, max(n, 2) / 2])
    return fig.update_layout(margin={"l": 10, "r": 10, "b": 10})


def _weight(
    fig: go.Figure, end: tuple[float, float], disc: tuple[float, float], value: float, selected: bool, colours: Palette
) -> None:
    fig.add_scatter(
        x=[end[0], disc[0]],
        y=[end[1], disc[1]],
        mode="lines",
        hoverinfo="skip",
        line={
            "width": 0.4 + 1.8 * abs(value),
            "dash": "dot" if value < 0 else "solid",
            "color": colours.second if selected else rgba(colours.dense, 0.28),
        },
    )
    if selected:
        x, y = 0.42 * np.array(end) + 0.58 * np.array(disc)
        fig.add_annotation(
            x=x,
            y=y,
            text=f"{value:.2f}",
            showarrow=False,
            bgcolor=colours.paper,
            borderpad=1,
            font={"color": colours.second, "size": 13},
        )


def _discs(
    fig: go.Figure, places: np.ndarray, names: Sequence[int], merges: Sequence[str], selected: int, colours: Palette
) -> None:
    """Draw neurons as numbered discs that can be clicked.

    "dense" and "fusion" are solid, "drop" is hollow, and the selected neuron has an amber edge.
    """
    ink = {"dense": colours.dense, "fusion": colours.fusion, "drop": colours.drop}
    solid = [merge != "drop" for merge in merges]
    marked = [name == selected and full for name, full in zip(names, solid, strict=True)]
    fig.add_scatter(
        x=places[:, 0],
        y=places[:, 1],
        mode="markers+text",
        text=[str(name) for name in names],
        customdata=[[name] for name in names],
        textfont={"color": [colours.paper if full else colours.dense for full in solid], "size": 14},
        marker={
            "size": 27,
            "color": [ink[merge] if full else colours.paper for merge, full in zip(merges, solid, strict=True)],
            "line": {
                "color": [colours.second if mark else ink[merge] for mark, merge in zip(marked, merges, strict=True)],
                "width": [4 if mark else 1.5 for mark in marked],
            },
        },
        hovertemplate="neuron %{text}<extra>click to select</extra>",
        cliponaxis=False,
        **_AS_IT_IS,
    )


def neuron_plane(
    cloud: tuple[np.ndarray, np.ndarray],
    rows: np.ndarray,
    names: Sequence[int],
    merges: Sequence[str],
    selected: int,
    title: str,
    star: tuple[float, float] | None = None,
    dark: bool = False,
) -> go.Figure:
    """Draw the points, each neuron's line w·x + b = 0, and its disc on the side where it is active.

    cloud: points (m, 2) and classes (m,); class 1 is solid. merges: one for each neuron, "drop" for neurons that were fused
    into others. The active side of the selected neuron is shaded.
    """
    colours = palette(dark)
    fig = figure(title, _HEIGHT, colours)
    _points(fig, cloud, colours)
    lengths = np.hypot(rows[:, 0], rows[:, 1])
    sighted = (lengths > 1e-9).nonzero()[0]  # without w a neuron is active everywhere or nowhere: no line
    normals = rows[sighted, :2] / lengths[sighted, None]
    feet = -normals * rows[sighted, 2:3] / lengths[sighted, None]
    for i, normal, foot in zip(sighted, normals, feet, strict=True):
        along = 9 * np.array([-normal[1], normal[0]])
        side = np.stack([foot - along, foot + along, foot + along + 9 * normal, foot - along + 9 * normal])
        chosen, gone = names[i] == selected and merges[i] != "drop", merges[i] == "drop"
        if chosen:
            fig.add_scatter(
                x=side[:, 0],
                y=side[:, 1],
                fill="toself",
                fillcolor=rgba(colours.second, 0.13),
                mode="none",
                hoverinfo="skip",
            )
        fig.add_scatter(
            x=side[:2, 0],
            y=side[:2, 1],
            mode="lines",
            hoverinfo="skip",
            line={
                "color": colours.second if chosen else rgba(colours.dense, 0.3),
                "width": 2.5 if chosen else 1,
                "dash": "dot" if gone else "solid",
            },
        )
    if star is not None:
        _star(fig, star, colours)
    _discs(fig, _apart(normals), [names[i] for i in sighted], [merges[i] for i in sighted], selected, colours)
    return _square(fig, colours).update_xaxes(title="x₁").update_yaxes(title="x₂")


def _apart(normals: np.ndarray) -> np.ndarray:
    """Return the places of the discs, in their directions; the later of two that would overlap is nearer to the centre."""
    places: list[np.ndarray] = []
    for normal in normals:
        place = 1.42 * normal
        while any(np.hypot(*(place - other)) < 0.3 for other in places) and np.hypot(*place) > 0.5:
            place = place - 0.1 * normal
        places.append(place)
    return np.array(places).reshape(-1, 2)


def _square(fig: go.Figure, colours: Palette) -> go.Figure:
    """Give both axes the same range and scale, and draw a frame."""
    axis = {"range": [-_REACH, _REACH], "constrain": "domain", "tickvals": [-1, 0, 1], "showgrid": False}
    fig.update_xaxes(**axis, mirror=True)
    return fig.update_yaxes(**axis, mirror=True, linecolor=colours.grid, scaleanchor="x")


def _points(fig: go.Figure, cloud: tuple[np.ndarray, np.ndarray], colours: Palette, wrong: np.ndarray | None = None) -> None:
    """Draw points, hollow for the outer class and solid for the inner one, with a cross where a network is wrong."""
    X, y = cloud
    faint, right = rgba(colours.dense, 0.45), np.ones(len(y), bool) if wrong is None else ~wrong
    kinds = [((y == 0) & right, "circle-open", 4.5, faint, "outer"), ((y == 1) & right, "circle", 4.5, faint, "inner")]
    for mask, symbol, size, colour, word in [*kinds, (~right, "x-thin-open", 6, colours.dense, "wrong")]:
        fig.add_scatter(
            x=X[mask, 0].round(3),
            y=X[mask, 1].round(3),
            mode="markers",
            marker={"symbol": symbol, "size": size, "color": colour},
            hovertemplate=f"{word}<br>(%{{x:.2f}}, %{{y:.2f}})<extra></extra>",
        )


def _star(fig: go.Figure, place: tuple[float, float], colours: Palette) -> None:
    fig.add_scatter(
        x=[place[0]],
        y=[place[1]],
        mode="markers",
        marker={"symbol": "star", "size": 17, "color": colours.second, "line": {"color": colours.paper, "width": 1.5}},
        hovertemplate="the star (%{x}, %{y})<extra></extra>",
    )


def number_matrix(
    cells: np.ndarray,
    words: Sequence[Sequence[str]],
    kept: Sequence[int],
    selected: tuple[int, int],
    title: str,
    sums: tuple[Sequence[str], Sequence[str]] | None = None,
    dark: bool = False,
) -> go.Figure:
    """Draw a matrix with its numbers in the cells: kept neurons as rows, all neurons as columns.

    cells, words: (k, n), colour and text. selected: (source, target), framed. sums: texts of the column sums (n) below and
    of the row sums (k) at the right; a matrix with sums holds masses, one without holds costs.
    """
    colours = palette(dark)
    k, n = cells.shape
    bottom = k - 0.05 if sums else k - 0.5
    fig = figure(title, round(118 + 46 * (bottom + 0.5)), colours)
    fig.add_heatmap(
        z=cells,
        zmin=0,
        zmax=float(cells.max()) or 1.0,
        colorscale=colours.mass() if sums else colours.cost(),
        showscale=False,
        xgap=2,
        ygap=2,
        text=words,
        texttemplate="%{text}",
        textfont={"size": 15},
        hoverinfo="skip",
    )
    x, y = np.tile(np.arange(n), k), np.repeat(np.arange(k), n)
    fig.add_scatter(
        x=x,
        y=y,
        mode="markers",
        marker={"symbol": "square", "size": 36, "color": "rgba(0,0,0,0)"},
        customdata=np.stack([x, np.asarray(kept)[y]], 1).tolist(),
        hovertemplate="neurons %{customdata[0]} and %{customdata[1]}<extra>click to select</extra>",
    )
    column, row, half = selected[0], list(kept).index(selected[1]), 0.48
    frame = {"x0": column - half, "x1": column + half, "y0": row - half, "y1": row + half}
    fig.add_shape(type="rect", **frame, line={"color": colours.second, "width": 3})
    if sums:
        fig.add_scatter(
            x=[*range(n), *[n - 0.45] * k],
            y=[*[k - 0.25] * n, *range(k)],
            mode="text",
            text=[*sums[0], *(f"= {word}" for word in sums[1])],
            textposition=["middle center"] * n + ["middle right"] * k,
            textfont={"color": colours.drop},
            hoverinfo="skip",
        )
    fig.update_xaxes(title={"text": "neuron", "standoff": 4}, side="top", range=[-0.5, n + 0.5], tickvals=x[:n])
    fig.update_yaxes(title="kept neuron", range=[bottom, -0.5], tickvals=y[::n], ticktext=[str(j) for j in kept])
    fig.update_xaxes(showline=False, ticks="")
    fig.update_yaxes(showgrid=False, ticks="")
    return fig.update_layout(margin={"t": 86, "b": 20, "r": 10}, title={"yref": "container", "y": 0.98, "yanchor": "top"})


def region(
    grid: tuple[np.ndarray, np.ndarray],
    result: "Evaluation",
    name: str,
    merge: str,
    cloud: tuple[np.ndarray, np.ndarray],
    star: tuple[float, float],
    dark: bool = False,
) -> go.Figure:
    """Shade the region that a network classifies as "inner", in its merge's colour, and mark misclassified points.

    grid: coordinates (side,) and the margin of inner over outer (side, side).
    """
    colours, (low, high) = palette(dark), result.interval
    ink = {"dense": colours.dense, "drop": colours.drop, "fusion": colours.fusion}[merge]
    interval = f"<br><span style='font-size:13px'>95 % interval {100 * low:.1f} to {100 * high:.1f}</span>"
    fig = figure(f"<b>{name}</b>: {100 * result.accuracy:.1f} % correct{interval}", 390, colours)
    axis, gap = grid
    fig.add_contour(
        x=axis,
        y=axis,
        z=gap.round(3),
        hoverinfo="skip",
        showscale=False,
        contours={"type": "constraint", "operation": "<", "value": 0},  # plotly fills where this does not hold
        line={"color": ink, "width": 2.5},
        fillcolor=rgba(ink, 0.2),
    )
    _points(fig, cloud, colours, ~result.correct.numpy())
    _star(fig, star, colours)
    return _square(fig, colours).update_layout(margin={"l": 30, "r": 10, "t": 70, "b": 30})


def fortunes(pairs: Sequence[tuple[int, float, float]], selected: int, dark: bool = False) -> go.Figure:
    """Draw fused against dropped accuracy, with a marker for each training seed. pairs: (seed, dropped, fused), fractions."""
    colours = palette(dark)
    better, worse = sum(f > d for _, d, f in pairs), sum(f < d for _, d, f in pairs)
    fig = figure(f"Fusion is better for {better} of {len(pairs)} networks, worse for {worse}", _HEIGHT, colours)
    ends = [100 * min(min(d, f) for _, d, f in pairs) - 3, 101.5]
    fig.add_scatter(x=ends, y=ends, mode="lines", line={"color": colours.drop, "dash": "dot"}, hoverinfo="skip")
    for x, side, y, word in ((0.01, "left", 1, "fusion is better"), (0.99, "right", 0, "dropping is better")):
        fig.add_annotation(
            x=x, xanchor=side, xref="paper", y=y, yref="paper", text=word, showarrow=False, font={"color": colours.drop}
        )
    usual = tint(colours.fusion, colours.paper, 0.75)
    fig.add_scatter(
        x=[100 * d for _, d, _ in pairs],
        y=[100 * f for _, _, f in pairs],
        mode="markers",
        customdata=[[seed] for seed, _, _ in pairs],
        marker={
            "size": 13,
            "color": [colours.second if seed == selected else usual for seed, _, _ in pairs],
            "line": {"color": colours.paper, "width": 1},
        },
        hovertemplate="seed %{customdata[0]}<br>dropped %{x:.1f} %, fused %{y:.1f} %<extra>click to open</extra>",
        **_AS_IT_IS,
    )
    fig.update_xaxes(title="dropped, % correct", range=ends)
    fig.update_yaxes(title="fused, % correct", range=ends)
    return fig
