"""Figures before and after pruning: the widths of the groups, and the time of a forward pass."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import plotly.graph_objects as go
from plotly.subplots import make_subplots

from intrafusion.reporting.figures.theme import figure, palette, rgba, styled
from intrafusion.runtime.escaping import hover

if TYPE_CHECKING:
    from intrafusion.evaluation.latency import LatencyComparison
    from intrafusion.studies.measurement import Width

HEIGHT = 300
_REACH = 1.6  # the axis ends at this multiple of the third quartile
_UNITS = ((1.0, "s"), (1e-3, "ms"), (1e-6, "µs"))


def latencies(found: "LatencyComparison", dark: bool = False) -> go.Figure:
    """Draw each run's time as a dot, dense above pruned, at each batch size; boxes show the median and quartiles."""
    colours = palette(dark)
    ratios = found.ratios
    titles = [f"batch {one.batch:,}: {one.verdict}" for one in ratios]
    fig = make_subplots(1, max(len(titles), 1), subplot_titles=titles, horizontal_spacing=0.12)
    styled(fig, latency_headline(found), HEIGHT, colours)
    networks = ("dense", found.before, colours.dense), ("pruned", found.after, colours.fusion)
    for column in range(1, len(titles) + 1):
        scale, unit = _unit(found.before.latencies[column - 1].median)
        for name, speed, colour in networks:
            seconds = [value / scale for value in speed.latencies[column - 1].seconds]
            fig.add_box(
                x=seconds,
                name=name,
                orientation="h",
                boxpoints="all",
                jitter=0.7,
                pointpos=0,
                row=1,
                col=column,
                line={"color": colour, "width": 2},
                marker={"color": rgba(colour, 0.45), "size": 5},
                fillcolor=rgba(colour, 0.12),
                hoveron="points",
                whiskerwidth=0,
                hovertemplate=f"{name}: %{{x:.3~g}} {unit}<extra></extra>",
            )
        fig.update_xaxes(title=f"one forward pass, {unit}", row=1, col=column)
        _leave_out(fig, found, column, scale)
    fig.update_yaxes(autorange="reversed", showgrid=False)
    fig.update_annotations(font={"size": 14, "color": colours.dense})
    return fig.update_layout(margin={"t": 84, "l": 70})


def _leave_out(fig: go.Figure, found: "LatencyComparison", column: int, scale: float) -> None:
    """Cut the axis so that outliers do not compress the other runs, and annotate how many are beyond it."""
    both = [speed.latencies[column - 1] for speed in (found.before, found.after)]
    end = min(max(max(one.seconds) for one in both), _REACH * max(one.quartiles[1] for one in both))
    beyond = sum(value > end for one in both for value in one.seconds)
    fig.update_xaxes(range=[0, 1.05 * end / scale], row=1, col=column)
    if beyond:
        words = f"{beyond} run{'s' if beyond > 1 else ''} beyond"
        fig.add_annotation(
            text=words,
            x=1,
            y=0.5,
            xref=f"x{column if column > 1 else ''} domain",
            yref="y domain",
            showarrow=False,
            xanchor="right",
        )


def _unit(seconds: float) -> tuple[float, str]:
    return next((pair for pair in _UNITS if seconds >= pair[0]), _UNITS[-1])


def latency_headline(found: "LatencyComparison") -> str:
    """Return the result as a short title."""
    verdicts = [one.verdict for one in found.ratios]
    size = "Smaller" if found.is_smaller else "Not smaller"
    if not verdicts:
        return "Latency of one forward pass"
    if set(verdicts) == {"faster"}:
        return f"{size} and faster" if found.is_smaller else "Faster"
    if "faster" in verdicts:
        where = " and ".join(f"batch {one.batch:,}" for one in found.ratios if one.verdict == "faster")
        return f"{size}, faster at {where} only"
    return f"{size} but not faster" if found.is_smaller else "Not faster"


def widths(groups: Sequence["Width"], merge: str, dark: bool = False) -> go.Figure:
    """Draw the channels of each group: kept ones solid, removed ones hollow."""
    colours = palette(dark)
    before, after = sum(one.before for one in groups), sum(one.after for one in groups)
    fig = figure(f"{after:,} of {before:,} channels are kept", HEIGHT, colours)
    names = [hover(one.group) for one in groups]
    fig.add_bar(
        x=names,
        y=[one.after for one in groups],
        marker={"color": colours.merge(merge), "line": {"width": 0}},
        customdata=[one.before for one in groups],
        hovertemplate="%{x}<br>%{y} of %{customdata} channels kept<extra></extra>",
    )
    fig.add_bar(
        x=names,
        y=[one.before - one.after for one in groups],
        hoverinfo="skip",
        marker={"color": "rgba(0,0,0,0)", "line": {"color": colours.drop, "width": 1}},
    )
    fig.update_xaxes(title="group" if len(names) <= 40 else f"{len(names)} groups, from input to output", tickangle=-40)
    fig.update_xaxes(showticklabels=len(names) <= 40, automargin=True)
    fig.update_yaxes(title="channels")
    return fig.update_layout(barmode="stack", bargap=0.25)


def empty(title: str, dark: bool = False) -> go.Figure:
    """Return an empty figure as a placeholder."""
    fig = figure(title, HEIGHT, palette(dark))
    fig.update_xaxes(visible=False)
    return fig.update_yaxes(visible=False)
