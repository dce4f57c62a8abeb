"""Figures of how far pruning moves a network's logits, over all images and for each class."""

from typing import TYPE_CHECKING

import numpy as np
import plotly.graph_objects as go

from intrafusion.reporting.figures.landscape import network_colour
from intrafusion.reporting.figures.theme import figure, palette, rgba
from intrafusion.runtime.escaping import hover

if TYPE_CHECKING:
    from intrafusion.studies.output_distance import Outputs

HEIGHT = 380
_BINS = 40


def distance_histograms(found: "Outputs", dark: bool = False) -> go.Figure:
    """Draw histograms of the distances of logits in the dropped and the fused network, with a line at each median."""
    colours = palette(dark)
    distances = {name: found.distance(name).numpy() for name in ("dropped", "fused")}
    medians = {name: float(np.median(values)) for name, values in distances.items()}
    fig = figure(_headline(medians), HEIGHT, colours)
    edges = np.linspace(0, max(float(values.max()) for values in distances.values()) or 1.0, _BINS + 1)
    highest = 0
    for name, values in distances.items():
        counts, colour = np.histogram(values, edges)[0], network_colour(name, colours)
        highest = max(highest, int(counts.max()))
        fig.add_bar(
            x=(edges[:-1] + edges[1:]) / 2,
            y=counts,
            width=np.diff(edges),
            name=name,
            customdata=np.stack([edges[:-1], edges[1:]], 1),
            marker={"color": rgba(colour, 0.55), "line": {"color": colour, "width": 1}},
            hovertemplate=f"{name}: %{{y}} images between %{{customdata[0]:.3g}} and %{{customdata[1]:.3g}}<extra></extra>",
        )
    near = min(medians, key=medians.__getitem__)
    for name, value in medians.items():
        colour = network_colour(name, colours)
        fig.add_vline(x=value, line={"color": colour, "width": 2, "dash": "dash"})
        fig.add_annotation(
            x=value,
            y=1.0,
            yref="paper",
            text=f"{name}, median {value:.3g}",
            showarrow=False,
            font={"color": colour},
            xanchor="right" if name == near else "left",
            xshift=-5 if name == near else 5,
            yanchor="top",
            bgcolor=rgba(colours.paper, 0.8),
        )
    fig.update_xaxes(title="L2 distance of the logits from dense")
    fig.update_yaxes(title="images", range=[0, 1.15 * highest])
    return fig.update_layout(barmode="overlay", bargap=0)


def _headline(medians: dict[str, float]) -> str:
    dropped, fused = medians["dropped"], medians["fused"]
    if max(dropped, fused) <= 1.05 * min(dropped, fused):
        return "Fusion and dropping move the logits about equally far"
    further, other = ("Dropping", "fusion") if dropped > fused else ("Fusion", "dropping")
    if not min(dropped, fused):
        return f"{further} changes the logits of most images, {other} does not"
    return f"{further} moves the logits {max(dropped, fused) / min(dropped, fused):.2g} times as far as {other}"


def class_bars(found: "Outputs", dark: bool = False) -> go.Figure:
    """Draw the median distance of each class, dropped beside fused."""
    colours = palette(dark)
    medians = {name: found.medians(name) for name in ("dropped", "fused")}
    gap = {c: medians["dropped"][c] - medians["fused"][c] for c in medians["fused"]}
    title = "Median distance of each class"
    if gap:
        closer = sum(value > 0 for value in gap.values())
        title = f"Fused is closer to dense than dropped in {closer} of {len(gap)} classes"
    fig = figure(title, HEIGHT, colours)
    for name, values in medians.items():
        fig.add_bar(
            x=list(map(hover, values)),
            y=list(values.values()),
            name=name,
            marker={"color": network_colour(name, colours)},
            hovertemplate=f"class %{{x}}, {name}: median %{{y:.3g}}<extra></extra>",
        )
    fig.update_xaxes(title="true class", type="category")
    fig.update_yaxes(title="median L2 distance of logits")
    return fig.update_layout(barmode="group", bargap=0.25)
