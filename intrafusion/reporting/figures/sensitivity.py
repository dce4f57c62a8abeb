"""Figures of the sensitivity of groups: accuracy over groups and sparsities, and differences between merges."""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from intrafusion.reporting.figures._rows import HEAD, SOLID, height, name_rows, signed, subtitle
from intrafusion.reporting.figures.theme import Palette, palette, styled, tint
from intrafusion.runtime.escaping import hover

if TYPE_CHECKING:
    from intrafusion.studies.sensitivity import Cell, Difference, Gap, Grid, Matrix

Place = tuple[str, float]  # a group and a sparsity
_TEXT = 150  # most cells for which each shows its number
_BAR = {"thickness": 10, "len": 0.45}
_FAINT = "bold where the paired 95 % interval excludes 0, else faint"


def sensitivity_heatmap(matrix: "Matrix", selected: Place | None = None, dark: bool = False) -> go.Figure:
    """Draw the accuracy of each group (from input to output) pruned alone at each sparsity.

    Cells in which nothing was pruned are hollow with a dot; unmeasured cells are empty. A marker's customdata is its group
    and sparsity, and so is `selected`.
    """
    colours = palette(dark)
    fig = styled(make_subplots(1, 1), sensitivity_headline(matrix), height(len(matrix.groups)), colours)
    _accuracies(fig, matrix, _top(matrix), 1, colours)
    return _finished(fig, [matrix], "top-1 accuracy, %", selected, colours)


def difference_heatmap(
    difference: "Difference",
    names: tuple[str, str] = ("fusion", "drop"),
    selected: Place | None = None,
    dark: bool = False,
) -> go.Figure:
    """Draw the accuracy of the first minus that of the second in each cell, on the same images; undecided cells are faint."""
    colours = palette(dark)
    fig = styled(make_subplots(1, 1), gain(difference, names), height(len(difference.groups)), colours)
    _differences(fig, difference, names, 1, colours)
    return _finished(fig, [difference], f"{names[0]} − {names[1]}, points", selected, colours, _FAINT)


def compare_studies(
    difference: "Difference", names: tuple[str, str], selected: Place | None = None, dark: bool = False
) -> go.Figure:
    """Draw the difference of two studies of one merge, cell by cell on the same images. names: of the studies."""
    names = hover(names[0]), hover(names[1])
    gaps = [gap for gap in difference.cells.values() if gap.prunes]
    ahead, behind = (sum(gap.decided and sign * gap.difference > 0 for gap in gaps) for sign in (1, -1))
    title = f"{names[0]} and {names[1]} share no cell with removed channels"
    if gaps:
        title = (
            f"{names[0]} is better than {names[1]} in {ahead} of {len(gaps)} cells, worse in {behind}; "
            f"{len(gaps) - ahead - behind} are undecided"
        )
    return difference_heatmap(difference, names, selected, dark).update_layout(title_text=title)


def sensitivity_panels(
    fused: "Matrix", dropped: "Matrix", difference: "Difference", selected: Place | None = None, dark: bool = False
) -> go.Figure:
    """Draw two merges and their difference side by side. difference: `fused` minus `dropped`."""
    colours, names = palette(dark), (fused.merge, dropped.merge)
    both = [replace(m, groups=difference.groups, sparsities=difference.sparsities) for m in (dropped, fused)]
    titles = [names[1], names[0], f"{names[0]} − {names[1]}"]
    fig = make_subplots(1, 3, shared_yaxes=True, horizontal_spacing=0.02, subplot_titles=titles)
    fig.update_annotations(font={"size": 14, "color": colours.dense})
    styled(fig, gain(difference, names), height(len(difference.groups)) + 20, colours)
    for column, matrix in enumerate(both, 1):
        _accuracies(fig, matrix, max(map(_top, both)), column, colours)
    _differences(fig, difference, names, 3, colours)
    for column in (1, 3):  # three axis titles would overlap in a narrow window
        fig.update_xaxes(title="", row=1, col=column)
    words = "top-1 accuracy, %, and its difference, points"
    return _finished(fig, [*both, difference], words, selected, colours, _FAINT).update_layout(margin_t=HEAD + 20)


def sensitivity_headline(matrix: "Matrix") -> str:
    """Return a title that says where pruning one group alone loses most accuracy."""
    pruning = {place: cell for place, cell in matrix.cells.items() if cell.prunes}
    if not pruning:
        return "Nothing was pruned: every channel is kept" if matrix.cells else "Nothing is measured yet"
    place = max(pruning, key=lambda place: pruning[place].loss)
    if pruning[place].loss <= 0:
        return f"With {matrix.merge}, no group alone loses any accuracy"
    return f"With {matrix.merge}, accuracy is lowest for {_where(place)}: {100 * pruning[place].accuracy:.0f} %"


def gain(difference: "Difference", names: tuple[str, str] = ("fusion", "drop")) -> str:
    """Return a title that says where the first of two gains most and loses most.

    Only significant cells count: `Paired.p` times the number of cells (Bonferroni's correction) must be below 5 %.
    """
    first, second = names[0][:1].upper() + names[0][1:], names[1]
    found = {place: gap for place, gap in difference.cells.items() if gap.prunes}
    if not found:
        return "Nothing was pruned: every channel is kept" if difference.cells else "Nothing is measured yet"
    sure = {place: gap.difference for place, gap in found.items() if gap.p * len(found) < 0.05}
    if not sure:
        return f"No clear difference between {names[0]} and {second} on these images"
    best, worst = max(sure, key=sure.__getitem__), min(sure, key=sure.__getitem__)
    won = f"{first} gains most in {_where(best)}: {signed(sure[best])} points"
    won = won if sure[best] > 0 else f"{first} has no significant gain"
    if sure[worst] < 0:
        return f"{won}; it loses most in {_where(worst)}: {signed(sure[worst])}"
    least = min(gap.difference for gap in found.values())
    most = math.ceil(-100 * least - 1e-9)
    return f"{won}; it loses nowhere" + (f" by more than {most} point{'s' * (most > 1)}" if least < 0 else "")


def _accuracies(fig: go.Figure, matrix: "Matrix", top: float, column: int, colours: Palette) -> None:
    """Draw a matrix in a subplot, with numbers if there is room, else with a colour bar."""
    scale = [[0.0, tint(colours.fusion, colours.paper, 0.06)], [1.0, colours.fusion]]
    shown = np.where(matrix.prunes, 100 * matrix.accuracy, np.nan)
    words = _few(matrix, [[f"{value:.0f}" for value in row] for row in shown])
    bar = {"title": "accuracy, %", "y": 0.75, **_BAR} if column == 1 else None
    _cells(fig, shown, words, scale, (0, top), bar, column, colours)
    _marks(fig, matrix, _cell_words, column, colours)


def _differences(fig: go.Figure, difference: "Difference", names: tuple[str, str], column: int, colours: Palette) -> None:
    """Draw differences in a subplot: decided cells in full colour and bold, undecided cells faint."""
    shown = np.where(difference.prunes, 100 * difference.values("difference"), np.nan)
    decided, limit = difference.values("decided") == 1, max(5.0, float(np.nanmax(np.abs(shown), initial=0)))
    words = _few(difference, [[signed(value / 100) for value in row] for row in shown])
    faint = [[at, tint(str(colour), colours.paper, 0.3)] for at, colour in colours.difference()]
    bar = {"title": "points", "y": 0.25, **_BAR}
    for chosen, scale, own_bar, weight in (
        (decided, colours.difference(), bar, "bold"),
        (~decided, faint, None, "normal"),
    ):
        own = np.where(chosen, shown, np.nan)
        _cells(fig, own, words, scale, (-limit, limit), own_bar, column, colours, weight)
    _marks(fig, difference, partial(_gap_words, names=names), column, colours)


def _few(grid: "Grid", words: list[list[str]]) -> np.ndarray | None:
    """Return the numbers in the cells, or None if there are too many cells."""
    return np.array(words, object) if len(grid.groups) * len(grid.sparsities) <= _TEXT else None


def _cells(
    fig: go.Figure,
    shown: np.ndarray,
    words: np.ndarray | None,
    scale: list[list[Any]],
    limits: tuple[float, float],
    bar: dict[str, Any] | None,
    column: int,
    colours: Palette,
    weight: str = "normal",
) -> None:
    """Draw coloured cells; those with dark numbers and those with light numbers are separate traces."""
    if words is None:
        fig.add_heatmap(
            z=shown,
            zmin=limits[0],
            zmax=limits[1],
            colorscale=scale,
            showscale=bar is not None,
            colorbar=bar,
            hoverinfo="skip",
            hoverongaps=False,
            xgap=2,
            ygap=2,
            row=1,
            col=column,
        )
        return
    ink = _reads_in_ink((shown - limits[0]) / (limits[1] - limits[0]), scale, colours)
    for chosen, colour in ((ink, colours.dense), (~ink, colours.paper)):
        own = chosen & ~np.isnan(shown)
        fig.add_heatmap(
            z=np.where(own, shown, np.nan),
            zmin=limits[0],
            zmax=limits[1],
            colorscale=scale,
            showscale=False,
            text=np.where(own, words, ""),
            texttemplate="%{text}",
            hoverinfo="skip",
            hoverongaps=False,
            xgap=2,
            ygap=2,
            textfont={"color": colour, "size": 12, "weight": weight},
            row=1,
            col=column,
        )


def _reads_in_ink(share: np.ndarray, scale: list[list[Any]], colours: Palette) -> np.ndarray:
    """Return where ink has more contrast (WCAG 2) than the background colour. share: positions on the scale, in [0, 1]."""

    def light(rgb: np.ndarray) -> np.ndarray:
        linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
        return linear @ [0.2126, 0.7152, 0.0722] + 0.05

    def parts(colour: str) -> list[float]:
        return [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]

    stops = np.array([parts(colour) for _, colour in scale])
    filled = np.nan_to_num(share).clip(0, 1)
    cell = light(np.stack([np.interp(filled, [at for at, _ in scale], stop) for stop in stops.T], -1))
    ink, ground = (light(np.array(parts(colour))) for colour in (colours.dense, colours.paper))
    return np.abs(np.log(cell / ink)) >= np.abs(np.log(cell / ground))


def _marks(fig: go.Figure, grid: "Grid", words: Callable[[Any], str], column: int, colours: Palette) -> None:
    """Draw hollow squares where nothing was pruned, dots on incomplete cells, and invisible markers on all for hovering."""
    hollow = {"symbol": "square-open-dot", "size": 11, "color": colours.drop, "line": {"width": 1}}
    dot = {"symbol": "circle", "size": 4, "color": colours.second}
    for chosen, (right, up), marker in ((grid.unpruned, (0, 0), hollow), (_partial(grid), (0.38, 0.3), dot)):
        rows, columns = chosen.nonzero()
        fig.add_scatter(
            x=columns + right, y=rows - up, mode="markers", hoverinfo="skip", marker=marker, row=1, col=column, **SOLID
        )
    places = [(group, s) for group in grid.groups for s in grid.sparsities]
    rows, columns = np.indices((len(grid.groups), len(grid.sparsities))).reshape(2, -1)
    fig.add_scatter(
        x=columns,
        y=rows,
        mode="markers",
        customdata=[list(place) for place in places],
        row=1,
        col=column,
        hovertext=[
            f"<b>{hover(group)}</b> at {100 * s:.3g} %<br>"
            + (words(grid.cells[group, s]) if (group, s) in grid.cells else "not measured yet")
            for group, s in places
        ],
        hovertemplate="%{hovertext}<extra></extra>",
        marker={"symbol": "square", "size": 18, "opacity": 0, "color": colours.fusion},
        selected={"marker": {"opacity": 0}},
        unselected={"marker": {"opacity": 0}},
    )
    ticks = list(range(len(grid.sparsities)))
    fig.update_xaxes(
        title="sparsity, %",
        tickvals=ticks,
        ticktext=[f"{100 * s:.3g}" for s in grid.sparsities],
        range=[-0.5, len(ticks) - 0.5],
        row=1,
        col=column,
    )


def _partial(grid: "Grid") -> np.ndarray:
    """Return where channels were removed but not all images are measured: bool (g, s)."""
    return grid.prunes & (grid.values("complete") == 0)


def _finished(
    fig: go.Figure, grids: Sequence["Grid"], numbers: str, selected: Place | None, colours: Palette, note: str = ""
) -> go.Figure:
    """Add the names of the rows, a subtitle of up to two lines, and a frame around the selected cell."""
    grid = grids[-1]
    written = grid.cells and len(grid.groups) * len(grid.sparsities) <= _TEXT
    lines = [[f"numbers: {numbers}"] if written else [], [note] if note and grid.cells else []]
    if any(g.unpruned.any() for g in grids):
        lines[1].append("⊡ nothing was pruned")
    if any(_partial(g).any() for g in grids):
        lines[1].append(f'<span style="color:{colours.second}">•</span> on fewer images so far')
    subtitle(fig, "<br>".join("   ".join(line) for line in lines if line), colours)
    name_rows(fig, grid.groups)
    if selected is not None and selected[0] in grid.groups and selected[1] in grid.sparsities:
        row, column = grid.groups.index(selected[0]), grid.sparsities.index(selected[1])
        fig.add_shape(
            type="rect",
            x0=column - 0.5,
            x1=column + 0.5,
            y0=row - 0.5,
            y1=row + 0.5,
            row="all",
            col="all",
            line={"color": colours.second, "width": 2.5},
        )
    return fig.update_layout(margin_t=HEAD, hoverdistance=-1)  # hovering works anywhere in a wide cell


def _top(matrix: "Matrix") -> float:
    """Return the upper end of the colour scale in percent: the largest of the dense and the measured accuracies."""
    return 100 * max([cell.accuracy for cell in matrix.cells.values()] + [matrix.dense] if matrix.cells else [1.0])


def _cell_words(cell: "Cell") -> str:
    result, (low, high) = cell.least, cell.interval
    if not cell.prunes:
        return f"nothing was pruned: all {result.channels:,} channels are kept"
    seeds = f", from the lowest to the highest end of {cell.seeds} seeds" if cell.seeds > 1 else ""
    so_far = "" if cell.complete else f" of {result.total:,} images so far"
    return (
        f"accuracy {cell.accuracy:.1%} (95 %: {low:.1%} to {high:.1%}{seeds})<br>on {result.count:,}{so_far or ' images'}"
        f"<br>{result.channels:,} of {result.channels_before:,} channels kept"
        f"<br>params {result.params / result.params_before:.1%}, MACs {result.macs / result.macs_before:.1%}"
    )


def _gap_words(gap: "Gap", names: tuple[str, str]) -> str:
    if not gap.prunes:
        return "nothing was pruned"
    low, high = gap.interval
    only = [sum(getattr(pair, side) for pair in gap.pairs) for side in ("only_first", "only_second")]
    seeds = f", from the lowest to the highest end of {len(gap.pairs)} seeds" if len(gap.pairs) > 1 else ", paired"
    where = "" if gap.complete else f" for all {gap.pairs[0].total:,} images"
    return (
        f"{names[0]} − {names[1]}: {signed(gap.difference, 1)} points"
        f"<br>95 %{where}: {signed(low, 1)} to {signed(high, 1)}{seeds}"
        f"<br>only {names[0]} correct on {only[0]:,}, only {names[1]} on {only[1]:,} of {gap.count:,} images"
        + ("" if gap.decided else "<br>undecided: the interval includes 0")
    )


def _where(place: Place) -> str:
    return f"{hover(place[0])} at {100 * place[1]:.3g} %"
