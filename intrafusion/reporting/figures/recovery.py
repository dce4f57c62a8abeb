"""Figures of recoveries: learning curves, and the similarities between images before and after."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import plotly.graph_objects as go
from plotly.subplots import make_subplots

from intrafusion.reporting.figures.theme import Palette, palette, styled

if TYPE_CHECKING:
    from intrafusion.studies.recovery_comparison import Alike, Row, Run

AXES = {
    "steps": "optimiser steps",
    "seconds": "seconds of training",
    "compute": "multiply-accumulates of training, 10⁹",
}
_BATCH = 128
_DASHES = ("solid", "dot", "dash")


def training_curves(runs: Sequence["Run"], rows: Sequence["Row"], by: str = "steps", dark: bool = False) -> go.Figure:
    """Draw the loss on training images and the accuracy on held-out images, with a line for each run.

    Runs at equal compute are dashed. by: "steps", "seconds" or "compute". rows: the results so far, for the title.
    """
    colours = palette(dark)
    fig = make_subplots(1, 2, subplot_titles=("loss, training images", "accuracy, held-out images, %"), horizontal_spacing=0.09)
    styled(fig, recovery_headline(rows), 430, colours)
    names = list(dict.fromkeys(run.spec.recovery for run in runs))
    for run in runs:
        x = [_at(run, moment, by) for moment in run.moments]
        colour, dash = _line(run.spec.recovery, names, colours)
        equal = run.spec.budget == "compute"
        line = {"color": colour, "width": 1.5 if equal else 2.5, "dash": "longdash" if equal else dash}
        said = f"{run.spec.recovery}{', equal compute' if equal else ''}, seed {run.spec.seed}"
        for column, values, form in (
            (1, [moment.loss for moment in run.moments], "%{y:.3f}"),
            (2, [None if moment.held is None else 100 * moment.held for moment in run.moments], "%{y:.1f} %"),
        ):
            fig.add_scatter(
                x=x,
                y=values,
                mode="lines",
                line=line,
                name=said,
                row=1,
                col=column,
                hovertemplate=f"{said}<br>{form} after %{{x:,.4~g}} {AXES[by].split(',')[0]}<extra></extra>",
            )
    _name_lines(fig, runs, names, by, colours)
    fig.update_xaxes(title=AXES[by], rangemode="tozero")
    fig.update_yaxes(rangemode="tozero", row=1, col=1)
    fig.update_annotations(font={"size": 14, "color": colours.dense}, selector={"yref": "paper"})
    return fig.update_layout(margin={"t": 84, "r": 110})


def _at(run: "Run", moment, by: str) -> float:
    if by == "seconds":
        return moment.seconds
    return moment.step * (_BATCH * run.facts.macs / 1e9 if by == "compute" else 1)


def _line(name: str, names: Sequence[str], colours: Palette) -> tuple[str, str]:
    """Return a method's colour, and a dash that distinguishes it from others of the same colour."""
    colour = colours.recovery(name)
    same = [other for other in names if colours.recovery(other) == colour]
    return colour, _DASHES[same.index(name) % len(_DASHES)]


def _name_lines(fig: go.Figure, runs: Sequence["Run"], names: Sequence[str], by: str, colours: Palette) -> None:
    """Write names at the ends of the right panel's lines, moved apart where they would overlap."""
    ends = {}
    for run in runs:
        if run.moments and run.moments[-1].held is not None and run.spec.budget == "epochs":
            ends[run.spec.recovery] = _at(run, run.moments[-1], by), 100 * run.moments[-1].held
    if not ends:
        return
    lines = [100 * moment.held for run in runs for moment in run.moments if moment.held is not None]
    gap, last = max((max(lines) - min(lines)) / 18, 0.4), float("inf")
    for name, (x, y) in sorted(ends.items(), key=lambda end: -end[1][1]):
        last = min(y, last - gap)
        fig.add_annotation(
            x=x,
            y=last,
            text=name,
            showarrow=False,
            xanchor="left",
            xshift=6,
            row=1,
            col=2,
            font={"color": _line(name, names, colours)[0], "size": 13},
        )


def recovery_headline(rows: Sequence["Row"]) -> str:
    """Return the effect of the best recovery as a title."""
    plain = next((row for row in rows if row.recovery == "none"), None)
    others = [row for row in rows if row.recovery != "none" and row.budget == "epochs"]
    if plain is None or not others:
        return "Training of each method"
    best = max(others, key=lambda row: row.accuracy)
    verb = "raises" if best.accuracy > plain.accuracy else "takes"
    told = f"{best.recovery} {verb} accuracy from {100 * plain.accuracy:.1f} % to {100 * best.accuracy:.1f} %"
    return told if len(others) == 1 else f"{told}, the best of {len(others)} methods"


def similarity_panels(alike: "Alike", name: str, dark: bool = False) -> go.Figure:
    """Draw the similarities G (images by images) of the dense, the pruned and the recovered network."""
    colours = palette(dark)
    before, after = (alike.loss(which) for which in (alike.before, alike.after))
    verb = "closer" if after < before else "no closer"
    titles = "dense", f"pruned, distance {before:.2g}", f"after {name}, distance {after:.2g}"
    fig = make_subplots(1, 3, subplot_titles=titles, horizontal_spacing=0.03)
    styled(fig, f"{name} moves the similarities in {alike.layer} {verb} to those of the dense network", 420, colours)
    words = [f"an image {f'of class {label}' if label >= 0 else 'without a label'}" for label in alike.labels.tolist()]
    for column, values in enumerate((alike.dense, alike.before, alike.after), start=1):
        fig.add_heatmap(
            z=values.numpy(),
            coloraxis="coloraxis",
            row=1,
            col=column,
            customdata=[[[a, b] for b in words] for a in words],
            hovertemplate="%{customdata[0]} and %{customdata[1]}<br>%{z:.3f}<extra></extra>",
        )
    fig.update_xaxes(showticklabels=False, ticks="", constrain="domain")
    fig.update_yaxes(showticklabels=False, ticks="", showgrid=False, autorange="reversed", scaleanchor="x", constrain="domain")
    for column in (2, 3):
        fig.update_yaxes(scaleanchor=f"x{column}", row=1, col=column)
    fig.update_annotations(font={"size": 14, "color": colours.dense})
    scale = {"colorscale": colours.difference(), "cmid": 0, "colorbar": {"title": "similarity", "thickness": 12, "len": 0.8}}
    return fig.update_layout(coloraxis=scale, margin={"t": 84, "l": 10, "b": 10})
