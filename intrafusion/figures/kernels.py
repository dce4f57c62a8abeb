"""Convolution kernels as small pictures."""

from collections.abc import Sequence

import numpy as np
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from intrafusion.figures.theme import figure, palette


def kernel_rows(
    kernels: Sequence[np.ndarray], names: Sequence[str], title: str, most: int = 12, dark: bool = False
) -> go.Figure:
    """One row a channel, one tile an input channel; blue to red around zero, one scale for all.

    kernels: each (inputs, h, w). At most `most` inputs are drawn, those with the largest weights over all rows.
    """
    colours = palette(dark)
    stack = np.stack([np.asarray(kernel, float) for kernel in kernels])
    inputs = np.sort(np.argsort(-np.abs(stack).sum((0, 2, 3)), kind="stable")[:most])
    limit = float(np.abs(stack[:, inputs]).max()) or 1.0
    single = len(inputs) == 1  # one picture a channel: side by side
    rows, columns = (1, len(kernels)) if single else (len(kernels), len(inputs))
    fig = make_subplots(
        rows,
        columns,
        horizontal_spacing=0.03 if single else 0.006,
        vertical_spacing=0.06,
        column_titles=list(names) if single else [f"in {i}" for i in inputs],
        row_titles=None if single else list(names),
    )
    fig.update_layout(figure(title, 300 if single else 110 + 86 * rows, colours).layout)
    colour_bar = {"title": "weight", "thickness": 10}
    fig.update_layout(coloraxis={"colorscale": "RdBu_r", "cmin": -limit, "cmax": limit, "colorbar": colour_bar})
    for number, name in enumerate(names):
        for column, channel in enumerate(inputs):
            fig.add_heatmap(
                z=stack[number, channel],
                coloraxis="coloraxis",
                row=1 if single else number + 1,
                col=number + 1 if single else column + 1,
                hovertemplate=f"{name}, input {channel}<br>weight %{{z:.4f}}<extra></extra>",
            )
    fig.update_xaxes(visible=False, constrain="domain")
    fig.update_yaxes(visible=False, autorange="reversed", constrain="domain")
    if single:
        fig.update_yaxes(scaleanchor="x", scaleratio=1)
    fig.update_annotations(font={"size": 11, "color": colours.dense})
    return fig
