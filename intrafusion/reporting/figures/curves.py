"""A figure of accuracy against sparsity, with a line and a 95 % band for each criterion and merge."""

from collections import defaultdict
from collections.abc import Sequence
from typing import TYPE_CHECKING

import plotly.graph_objects as go

from intrafusion.reporting.figures.theme import figure, palette, rgba

if TYPE_CHECKING:
    from intrafusion.studies.measurement import Result

_DASHES = ("solid", "dash", "dot", "dashdot")


def curves(
    results: Sequence["Result"],
    sparsities: Sequence[float],
    dense: tuple[float, tuple[float, float]] | None,
    dark: bool = False,
) -> go.Figure:
    """Draw accuracy against sparsity, with labelled lines: colour shows the merge, dash the criterion.

    Hollow points prune nothing. sparsities: all requested ones, so that the axis is fixed while points arrive. dense: the
    dense accuracy and its interval, as fractions; None if unknown.
    """
    colours = palette(dark)
    fig = figure(curves_headline(results), 460, colours)
    lines: dict[tuple[str, str], list[Result]] = defaultdict(list)
    for result in results:
        lines[result.spec.criterion, result.spec.merge].append(result)
    criteria = list(dict.fromkeys(criterion for criterion, _ in lines))
    right = max(sparsities) * 100
    if dense is not None:
        low, high = dense[1]
        fig.add_hrect(100 * low, 100 * high, fillcolor=rgba(colours.dense, 0.08), line_width=0)
        fig.add_hline(100 * dense[0], line={"color": colours.dense, "width": 1.5, "dash": "dash"})
        _label(fig, 0, 100 * dense[0], f"dense {dense[0]:.1%}", colours.dense)
    for (criterion, merge), points in lines.items():
        points = sorted(points, key=lambda result: result.spec.sparsity)
        colour, x = colours.merge(merge), [100 * point.spec.sparsity for point in points]
        low_y, high_y = ([100 * point.interval[i] for point in points] for i in (0, 1))
        fig.add_scatter(
            x=x + x[::-1],
            y=high_y + low_y[::-1],
            fill="toself",
            fillcolor=rgba(colour, 0.18),
            line={"width": 0},
            hoverinfo="skip",
            mode="lines",
        )
        fig.add_scatter(
            x=x,
            y=[100 * point.accuracy for point in points],
            mode="lines+markers",
            name=f"{merge}, {criterion}",
            line={"color": colour, "width": 2.5, "dash": _DASHES[criteria.index(criterion) % len(_DASHES)]},
            marker={"size": 7, "symbol": ["circle" if p.prunes else "circle-open" for p in points]},
            customdata=[
                [*p.interval, p.params / p.params_before, p.macs / p.macs_before, p.channels, p.channels_before] for p in points
            ],
            hovertext=["" if p.prunes else "<br>nothing was pruned" for p in points],
            hovertemplate=f"{merge} ({criterion}) at %{{x:.0f}} %: %{{y:.1f}} %"
            "<br>95 %: %{customdata[0]:.1%} to %{customdata[1]:.1%}<br>%{customdata[4]} of %{customdata[5]} channels"
            "<br>params %{customdata[2]:.0%}, MACs %{customdata[3]:.0%}%{hovertext}<extra></extra>",
        )
        name = merge if len(criteria) == 1 else f"{merge} ({criterion})"
        others = [result for line, line_points in lines.items() if line != (criterion, merge) for result in line_points]
        spot, above = _clearest(points, others)
        _label(fig, 100 * spot.spec.sparsity, 100 * spot.accuracy, name, colour, above)
    fig.update_xaxes(title="sparsity, %", range=[0, right * 1.14 + 2])
    fig.update_yaxes(title="top-1 accuracy, %", range=[0, 103])
    return fig.update_layout(margin={"r": 40})


def _clearest(points: Sequence["Result"], others: Sequence["Result"]) -> tuple["Result", bool]:
    """Return the point of a line that is farthest from the other lines, and whether it is above the nearest of them."""

    def gap(point: "Result") -> float:
        """Return the signed distance in accuracy to the nearest other line at this sparsity, or 1 if there is none."""
        gaps = [point.accuracy - o.accuracy for o in others if o.spec.sparsity == point.spec.sparsity]
        return min(gaps, key=abs, default=1.0)

    spot = max(points, key=lambda point: abs(gap(point)))
    return spot, gap(spot) >= 0


def _label(fig: go.Figure, x: float, y: float, text: str, colour: str, above: bool = True) -> None:
    fig.add_annotation(
        x=x,
        y=y,
        text=text,
        showarrow=False,
        xanchor="left" if above else "right",
        yanchor="bottom" if above else "top",
        xshift=6 if above else -6,
        font={"color": colour},
    )


def curves_headline(results: Sequence["Result"]) -> str:
    """Return a title with the widest gap between fused and dropped at one sparsity and criterion."""
    by_point: dict[tuple[str, float], dict[str, Result]] = defaultdict(dict)
    for result in results:
        by_point[result.spec.criterion, result.spec.sparsity][result.spec.merge] = result
    pairs = [(point["fusion"], point["drop"]) for point in by_point.values() if {"fusion", "drop"} <= set(point)]
    pruning = [(fused, dropped) for fused, dropped in pairs if fused.channels < fused.channels_before]
    if pairs and not pruning:
        return "Nothing was pruned: these groups are too small for this sparsity"
    if not pruning:
        return "Accuracy against sparsity"
    fused, dropped = max(pruning, key=lambda pair: abs(pair[0].accuracy - pair[1].accuracy))
    verb = "keeps" if fused.accuracy >= dropped.accuracy else "keeps only"
    return (
        f"At {fused.spec.sparsity:.0%}, fusion {verb} {100 * fused.accuracy:.0f} % where dropping keeps "
        f"{100 * dropped.accuracy:.0f} %"
    )
