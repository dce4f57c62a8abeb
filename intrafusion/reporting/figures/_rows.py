"""Helpers for figures with a row for each group: names, height, subtitle, and formatted percentage points."""

from collections.abc import Sequence

import plotly.graph_objects as go

from intrafusion.reporting.figures.importance import label_width
from intrafusion.reporting.figures.theme import Palette
from intrafusion.runtime.escaping import hover

HEAD = 84  # pixels above the rows, for the title and two lines of subtitle
SOLID = {"selected": {"marker": {"opacity": 1}}, "unselected": {"marker": {"opacity": 1}}}


def subtitle(fig: go.Figure, words: str, colours: Palette) -> None:
    fig.update_layout(
        title={
            "subtitle": {"text": words, "font": {"size": 13, "color": colours.drop}},
            "y": 1,
            "yanchor": "top",
            "pad": {"t": 12},
        },
        margin={"t": HEAD},
    )


def name_rows(fig: go.Figure, groups: Sequence[str]) -> None:
    """Label one row per group, the first at the top."""
    fig.update_yaxes(
        tickvals=list(range(len(groups))),
        ticktext=list(map(hover, groups)),
        range=[len(groups) - 0.5, -0.5],
        showgrid=False,
        ticks="",
        ticklabelstandoff=5,
    )
    fig.update_layout(margin={"l": label_width(groups or [""])})


def height(rows: int) -> int:
    """Return the figure's height in pixels, with tall rows for few groups and short rows for many."""
    return HEAD + 72 + rows * (28 if rows <= 12 else 22 if rows <= 32 else 16)


def signed(share: float, digits: int = 0) -> str:
    """Format a share as signed percentage points: +21, −3."""
    return as_percent(share, digits) if round(100 * share, digits) <= 0 else "+" + as_percent(share, digits)


def as_percent(share: float, digits: int = 1) -> str:
    return f"{round(100 * share, digits) + 0.0:.{digits}f}".replace("-", "−")
