"""Draw matrices; those too large to be drawn cell by cell become images below the markers."""

import base64
import io
from collections.abc import Sequence

import numpy as np
import plotly.graph_objects as go

CELLS = 10_000  # a matrix with more cells is drawn as an image
_MOST = 1000  # most pixels per side


def draw_matrix(
    fig: go.Figure,
    values: np.ndarray,
    scale: Sequence[Sequence[object]],
    limits: tuple[float, float],
    unit: str,
    row: int,
    col: int,
    hover: str = "",
    text: np.ndarray | None = None,
    bar: dict | None = None,
) -> None:
    """Draw `values` (rows, columns) in a subplot, row 0 at the top: cells with hover text, or an image if there are many.

    scale: a Plotly scale of colours #rrggbb. limits: the values at its ends. hover: a template, with the row and column
    names `text` (rows, columns, 2) as customdata. bar: options of the colour bar, None for no bar.
    """
    low, high = limits
    rows, columns = values.shape
    if values.size <= CELLS:
        fig.add_heatmap(
            z=values.astype(np.float32),
            colorscale=scale,
            zmin=low,
            zmax=high,
            row=row,
            col=col,
            showscale=bar is not None,
            colorbar={"title": unit, **(bar or {})},
            xgap=int(columns <= 80),
            ygap=int(columns <= 80),
            customdata=text,
            hovertemplate=f"{hover}<br>{unit} %{{z:.4g}}<extra></extra>",
        )
        return
    axis = fig.get_subplot(row, col)
    fig.add_layout_image(
        source=picture(values, scale, limits),
        xref=axis.xaxis.plotly_name.replace("axis", ""),
        yref=axis.yaxis.plotly_name.replace("axis", ""),
        x=-0.5,
        y=-0.5,
        sizex=columns,
        sizey=rows,
        xanchor="left",
        yanchor="top",
        sizing="stretch",
        layer="below",
    )
    if bar is not None:  # an image has no colour bar
        fig.add_scatter(
            x=[None],
            y=[None],
            mode="markers",
            row=row,
            col=col,
            hoverinfo="skip",
            marker={
                "color": [low],
                "colorscale": scale,
                "cmin": low,
                "cmax": high,
                "showscale": True,
                "colorbar": {"title": unit, **bar},
            },
        )


def picture(values: np.ndarray, scale: Sequence[Sequence[object]], limits: tuple[float, float]) -> str:
    """Return `values` as a PNG in a data URI. NaN is transparent. A pixel shows the cell farthest from zero in it."""
    stops = np.array([float(stop) for stop, _ in scale])  # type: ignore[arg-type]
    colours = np.array([[int(str(colour)[i : i + 2], 16) for i in (1, 3, 5)] for _, colour in scale], float)
    pooled = _pooled(values)
    low, high = limits
    share = np.clip((np.nan_to_num(pooled) - low) / ((high - low) or 1), 0, 1)
    rgb = np.stack([np.interp(share, stops, colours[:, channel]) for channel in range(3)], -1).round()
    alpha = np.where(np.isnan(pooled), 0, 255)[..., None]
    return png(np.concatenate([rgb, alpha], -1).astype(np.uint8))


def png(pixels: np.ndarray) -> str:
    """Return uint8 pixels (H, W), (H, W, 3) or (H, W, 4) as a PNG in a data URI."""
    from PIL import Image

    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


def _pooled(values: np.ndarray) -> np.ndarray:
    """Reduce to at most _MOST rows and columns: each block's value farthest from zero, NaN only if all its values are."""
    for axis in (0, 1):
        size = values.shape[axis]
        if size > _MOST:
            edges = np.linspace(0, size, _MOST + 1).astype(int)[:-1]
            largest = np.maximum.reduceat(np.nan_to_num(values, nan=-np.inf), edges, axis=axis)
            smallest = np.minimum.reduceat(np.nan_to_num(values, nan=np.inf), edges, axis=axis)
            farthest = np.where(np.abs(largest) >= np.abs(smallest), largest, smallest)
            values = np.where(np.isfinite(largest), farthest, np.nan)
    return values
