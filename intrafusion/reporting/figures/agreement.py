"""A figure of the agreement between importance criteria, as a square matrix."""

from collections.abc import Sequence
from itertools import combinations
from typing import TYPE_CHECKING

import numpy as np
import plotly.graph_objects as go

from intrafusion.reporting.figures.importance import label_width
from intrafusion.reporting.figures.theme import figure, palette

if TYPE_CHECKING:
    from intrafusion.pruning.agreement import CriteriaComparison

_FEW = 8  # most criteria whose names fit above the square without being vertical


def agreement_matrix(comparison: "CriteriaComparison", height: int = 540, dark: bool = False) -> go.Figure:
    """Draw rank correlations above the diagonal, and shared kept channels in percent below it.

    In both halves the background colour is the agreement expected by chance; the accent is more, amber is less.
    """
    colours, names, chance = palette(dark), comparison.names, comparison.chance.overlap
    c = len(names)
    fig = figure(agreement_headline(comparison), height, colours)
    upper = np.triu(np.ones((c, c), bool), 1)
    rho = comparison.spearman
    _half(fig, names, upper, np.nan_to_num(rho), _written(rho, "{:.2f}"), "rank correlation")
    if comparison.pruned:
        beyond = (comparison.overlap - chance) / (1 - chance)
        words = _written(comparison.overlap, "{:.0%}")
        _half(fig, names, upper.T, beyond, words, f"in common among the {comparison.k} kept channels")
    fig.update_traces(
        zmin=-1,
        zmax=1,
        colorscale=colours.difference(),
        showscale=False,
        hoverinfo="text",
        hoverongaps=False,
        texttemplate="%{text}",
        xgap=2,
        ygap=2,
    )
    axis = {
        "tickvals": list(range(c)),
        "ticktext": [f"<b>{names[0]}</b>", *names[1:]],
        "ticks": "",
        "showgrid": False,
        "constrain": "domain",
    }
    angle, top = (-35, 120) if c <= _FEW else (-90, 50 + label_width(names))
    fig.update_xaxes(**axis, side="top", tickangle=angle, range=[-0.5, c - 0.5], constraintoward="left")
    fig.update_yaxes(**axis, scaleanchor="x", range=[c - 0.5, -0.5], constraintoward="top")
    return fig.update_layout(margin={"l": label_width(names), "t": top, "b": 10}, title={"y": 0.98, "yanchor": "top"})


def _half(fig: go.Figure, names: Sequence[str], where: np.ndarray, values: np.ndarray, words: np.ndarray, meaning: str) -> None:
    """Draw one triangle of the square, coloured by `values` and labelled with `words`."""
    hover = [[f"{a} and {b}<br>{meaning}: {words[i, j]}" for j, b in enumerate(names)] for i, a in enumerate(names)]
    fig.add_heatmap(z=np.where(where, values, np.nan), text=np.where(where, words, ""), hovertext=hover)


def _written(values: np.ndarray, form: str) -> np.ndarray:
    return np.array([["–" if np.isnan(v) else form.format(round(v, 2) + 0.0).replace("-", "−") for v in row] for row in values])


def agreement_headline(comparison: "CriteriaComparison") -> str:
    """Return a sentence on the two criteria that agree least and on chance agreement, ignoring the random control."""
    if not comparison.pruned:
        return "Nothing is pruned at this sparsity, so every criterion keeps the same channels"
    names = comparison.names
    told = [i for i, name in enumerate(names) if name != "random"]
    pairs = list(combinations(told if len(told) > 1 else range(len(names)), 2))
    a, b = min(pairs, key=lambda pair: (comparison.overlap[pair], np.nan_to_num(comparison.spearman[pair])))
    return (
        f"{names[a]} and {names[b]} {'agree least' if len(pairs) > 1 else 'agree'}: {comparison.shared(a, b):,} of "
        f"{comparison.k:,} in common, {comparison.chance.overlap * comparison.k:,.0f} by chance"
    )
