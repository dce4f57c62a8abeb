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
    fig = make_subplots(
        len(kernels),
        len(inputs),
        horizontal_spacing=0.006,
        vertical_spacing=0.06,
        column_titles=[f"in {i}" for i in inputs],
        row_titles=list(names),
    )
    fig.update_layout(figure(title, 110 + 86 * len(kernels), colours).layout)
    fig.update_layout(
        coloraxis={
            "colorscale": "RdBu_r",
            "cmin": -limit,
            "cmax": limit,
            "colorbar": {"title": "weight", "thickness": 10},
        }
    )
    for row in range(len(kernels)):
        for column, channel in enumerate(inputs):
            fig.add_heatmap(
                z=stack[row, channel],
                coloraxis="coloraxis",
                row=row + 1,
                col=column + 1,
                hovertemplate=f"{names[row]}, input {channel}<br>weight %{{z:.4f}}<extra></extra>",
            )
    fig.update_xaxes(visible=False)
    fig.update_yaxes(visible=False, autorange="reversed")
    fig.update_annotations(font={"size": 11, "color": colours.dense})
    return fig
