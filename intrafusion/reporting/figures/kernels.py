"""Figures of convolution kernels."""

from collections.abc import Sequence

import numpy as np
import plotly.graph_objects as go

from intrafusion.reporting.figures.theme import figure, palette


def kernel_rows(
    kernels: Sequence[np.ndarray], names: Sequence[str], title: str, most: int = 12, dark: bool = False
) -> go.Figure:
    """Draw one row per channel and one tile per input channel, from blue to red around zero, with one scale for all.

    kernels: each (inputs, h, w). At most `most` inputs are drawn: those with the largest weights over all rows. Kernels of a
    single input are drawn side by side. All tiles are one heatmap, because a subplot for each takes half a second to build.
    """
    colours = palette(dark)
    stack = np.stack([np.asarray(kernel, float) for kernel in kernels])
    inputs = np.sort(np.argsort(-np.abs(stack).sum((0, 2, 3)), kind="stable")[:most])
    tiles = stack[:, inputs]  # (channels, inputs, h, w)
    down, across = list(names), [f"in {i}" for i in inputs]
    if len(inputs) == 1:
        tiles, down, across = tiles.swapaxes(0, 1), [""], list(names)
    limit = float(np.abs(tiles).max()) or 1.0
    rows, columns, high, wide = tiles.shape
    fig = figure(title, int(np.clip(90 + 900 * rows * (high + 1) / (columns * (wide + 1)), 200, 520)), colours)
    labels = np.empty((rows, columns, 2), object)
    for row in range(rows):
        for column in range(columns):
            labels[row, column] = down[row], across[column]
    fig.add_heatmap(
        z=_tiled(tiles),
        customdata=np.repeat(np.repeat(labels, high + 1, 0), wide + 1, 1)[:-1, :-1],
        hovertemplate="%{customdata[0]} %{customdata[1]}<br>weight %{z:.4f}<extra></extra>",
        hoverongaps=False,
        colorscale="RdBu_r",
        zmin=-limit,
        zmax=limit,
        colorbar={"title": "weight", "thickness": 10},
    )
    fig.update_xaxes(
        tickvals=[(wide + 1) * i + (wide - 1) / 2 for i in range(columns)],
        ticktext=across,
        side="top",
        ticks="",
        showline=False,
        constrain="domain",
    )
    fig.update_yaxes(
        tickvals=[(high + 1) * i + (high - 1) / 2 for i in range(rows)],
        ticktext=down,
        autorange="reversed",
        showgrid=False,
        scaleanchor="x",
        constrain="domain",
    )
    return fig.update_layout(margin={"l": 90, "t": 84, "b": 10})


def _tiled(tiles: np.ndarray) -> np.ndarray:
    """Arrange tiles (rows, columns, h, w) in one matrix, with a gap of NaN between neighbours."""
    rows, columns, high, wide = tiles.shape
    gaps = np.full((rows, columns, high + 1, wide + 1), np.nan)
    gaps[:, :, :high, :wide] = tiles
    return gaps.transpose(0, 2, 1, 3).reshape(rows * (high + 1), columns * (wide + 1))[:-1, :-1]
