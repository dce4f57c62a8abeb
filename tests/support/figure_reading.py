"""Helpers that read figures in tests: titles, traces and numbers, and whether a browser could parse them."""

import json
from collections.abc import Callable, Sequence

import numpy as np
import plotly.graph_objects as go

from intrafusion.reporting.figures.theme import DARK, LIGHT


def serialised(fig: go.Figure) -> dict:
    """Return the figure as a browser parses it. Fail on NaN and Infinity, which are not valid JSON."""

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} in a figure")

    return json.loads(fig.to_json(), parse_constant=refuse)


def title(fig: go.Figure) -> str:
    return fig.layout.title.text


def traces(fig: go.Figure, kind: str) -> list:
    return [trace for trace in fig.data if trace.type == kind]


def numbers(values: Sequence) -> np.ndarray:
    return np.asarray(values, float)


def check_both_themes(draw: Callable[[bool], go.Figure]) -> None:
    light, dark = draw(False), draw(True)
    assert serialised(light) != serialised(dark)
    assert light.layout.template.layout.font.color == LIGHT.dense
    assert dark.layout.template.layout.font.color == DARK.dense
    assert title(light) == title(dark)
