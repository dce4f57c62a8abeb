"""Figures of images: a row of images to choose from, and an image beside a channel's map and pixel attributions."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import plotly.graph_objects as go

from intrafusion.reporting.figures._raster import png
from intrafusion.reporting.figures.theme import figure, palette

_SIDE = 160  # pixels to which a small image is enlarged, without smoothing
_GAP = 0.12  # between images, in image widths


def gallery(
    images: Sequence[np.ndarray], captions: Sequence[str], title: str, chosen: int = 0, dark: bool = False
) -> go.Figure:
    """Draw images in one row, each above its caption; the chosen one is framed.

    images: each uint8 (H, W, C), C 1 or 3, all of one shape. A marker on each image has its number, from 1, as customdata.
    """
    colours, lefts = palette(dark), np.arange(len(images)) * (1 + _GAP)
    fig = figure(title, 224, colours)
    fig.add_scatter(
        x=lefts + 0.5,
        y=np.full(len(images), 0.5),
        mode="markers",
        customdata=np.arange(1, len(images) + 1),
        hovertext=list(captions),
        hoverinfo="text",
        marker={"symbol": "square", "size": 60, "opacity": 0, "color": colours.fusion},
        selected={"marker": {"opacity": 0}},
        unselected={"marker": {"opacity": 0}},
    )
    edges = [(colours.second, 4) if i == chosen else (colours.grid, 1) for i in range(len(images))]
    fig.update_layout(
        images=[_placed(image, left) for left, image in zip(lefts, images, strict=True)],
        shapes=[_frame(left, *edge) for left, edge in zip(lefts, edges, strict=True)],
        annotations=[
            {"x": left + 0.5, "y": 1.06, "text": caption, "showarrow": False, "yanchor": "top", "font": {"size": 12}}
            for left, caption in zip(lefts, captions, strict=True)
        ],
        margin={"l": 4, "r": 4, "b": 0},
    )
    fig.update_xaxes(visible=False, range=[-0.05, len(images) * (1 + _GAP)], constrain="domain", constraintoward="left")
    fig.update_yaxes(visible=False, range=[1.5, -0.05], scaleanchor="x", constrain="domain", constraintoward="top")
    return fig


def attribution_panels(
    image: np.ndarray, seen: np.ndarray, pixels: np.ndarray, title: str, method: str, dark: bool = False
) -> go.Figure:
    """Draw the image, the channel's activation map, and each pixel's share, aligned.

    image: uint8 (H, W, C). seen: the channel's map (h, w); a map of one row or column is omitted. pixels: (H, W), drawn with
    a scale around zero.
    """
    colours, pictured = palette(dark), min(seen.shape) > 1
    height, width = image.shape[:2]
    panels = ["image", *(["feature map"] if pictured else []), method]
    fig = figure(title, 400, colours).set_subplots(1, len(panels), subplot_titles=panels, horizontal_spacing=0.06)
    if pictured:
        fig.add_trace(_map(seen, (width, height), colours.mass(), (0, float(seen.max()) or 1), "activation"), 1, 2)
    limit = float(np.quantile(np.abs(pixels), 0.995)) or 1.0
    fig.add_trace(_map(pixels, (width, height), colours.difference(), (-limit, limit), "attribution"), 1, len(panels))
    axes = ["", *map(str, range(2, len(panels) + 1))]
    fig.update_layout(
        images=[_placed(image, 0, (width, height))],
        shapes=[_frame(0, colours.grid, 1, (width, height), axis) for axis in axes],
        margin={"l": 4, "r": 4, "t": 84, "b": 4},
    )
    fig.update_annotations(font={"size": 13, "color": colours.dense})
    fig.update_xaxes(visible=False, range=[0, width], constrain="domain")
    for number, axis in enumerate(axes, 1):
        fig.update_yaxes(
            visible=False,
            range=[height, 0],
            scaleanchor=f"x{axis}",
            constrain="domain",
            constraintoward="top",
            row=1,
            col=number,
        )
    return fig


def _placed(image: np.ndarray, left: float, size: tuple[float, float] = (1, 1)) -> dict[str, Any]:
    """Return layout options for an image (H, W, C) on the first axes, with its upper left corner at (left, 0)."""
    return {
        "source": png(_enlarged(image)),
        "xref": "x",
        "yref": "y",
        "x": left,
        "y": 0,
        "sizex": size[0],
        "sizey": size[1],
        "xanchor": "left",
        "yanchor": "top",
        "sizing": "stretch",
        "layer": "below",
    }


def _frame(left: float, colour: str, width: int, size: tuple[float, float] = (1, 1), axis: str = "") -> dict[str, Any]:
    return {
        "type": "rect",
        "x0": left,
        "x1": left + size[0],
        "y0": 0,
        "y1": size[1],
        "xref": f"x{axis}",
        "yref": f"y{axis}",
        "line": {"color": colour, "width": width},
    }


def _enlarged(image: np.ndarray) -> np.ndarray:
    """Repeat the pixels of a small image, so that browsers do not blur them: uint8 (H, W, C), or (H, W) if C is 1."""
    factor = -(-_SIDE // max(image.shape[:2]))
    large = image.repeat(factor, 0).repeat(factor, 1)
    return large[:, :, 0] if large.shape[2] == 1 else large


def _map(
    values: np.ndarray,
    size: tuple[int, int],
    scale: list[list[object]],
    limits: tuple[float, float],
    unit: str,
) -> go.Heatmap:
    """Return a heatmap of any resolution, stretched over an image of `size` (width, height)."""
    across, down = size[0] / values.shape[1], size[1] / values.shape[0]
    return go.Heatmap(
        z=values.astype(np.float32),
        x0=across / 2,
        dx=across,
        y0=down / 2,
        dy=down,
        colorscale=scale,
        zmin=limits[0],
        zmax=limits[1],
        showscale=False,
        hovertemplate=unit + " %{z:.3g}<extra></extra>",
    )
