"""Figures of the training lab: learning curves, zeros in each layer, distributions of norms or masks, and runs compared."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from intrafusion.reporting.figures.theme import Palette, figure, palette, rgba, styled
from intrafusion.runtime.escaping import hover

if TYPE_CHECKING:
    from intrafusion.training.methods.runs import LabRun
    from intrafusion.training.methods.task import PhaseProgress

_SUBNETWORKS = ("aslp", "supermask", "edge-popup")
_PARTS = ("solid", "dot", "dash", "dashdot")


def timeline(steps: Sequence["PhaseProgress"]) -> list[float]:
    """Return the position of each step on an axis of epochs, where phases follow each other and parts run in parallel.

    The phases of one part also follow each other. A phase outside of all parts begins where the last part ends.
    """
    ends: dict[str, float] = {}  # end of each part so far; "" for phases outside of parts
    latest: dict[str, tuple[str, float]] = {}
    found = []
    for step in steps:
        part = step.phase.partition(":")[0] if step.phase.startswith("part ") else ""
        if part not in latest or latest[part][0] != step.phase:
            begin = ends.get(part, ends.get("", 0.0)) if part else max(ends.values(), default=0.0)
            latest[part] = step.phase, begin
        found.append(latest[part][1] + step.moment.epoch)
        ends[part] = found[-1]
    return found


def learning(steps: Sequence["PhaseProgress"], method: str, dark: bool = False) -> go.Figure:
    """Draw loss and accuracy against epochs for training images, held-out images and, if there are any, drawn masks."""
    colours = palette(dark)
    fig = make_subplots(1, 2, subplot_titles=("loss, nats", "accuracy, %"), horizontal_spacing=0.09)
    styled(fig, learned(steps, method), 400, colours)
    at, phases = timeline(steps), list(dict.fromkeys(step.phase for step in steps))
    parts = list(dict.fromkeys(phase.partition(":")[0] for phase in phases if phase.startswith("part ")))
    held = "decided mask, held out" if method in _SUBNETWORKS else "held out"
    ends: dict[str, tuple[float, float, str]] = {}
    for phase in phases:
        here = [(x, step) for x, step in zip(at, steps, strict=True) if step.phase == phase]
        x = [place for place, _ in here]
        part = phase.partition(":")[0]
        dash = _PARTS[parts.index(part) % len(_PARTS)] if part in parts else "solid"
        lines = (
            ("training", colours.drop, [s.moment.loss for _, s in here], [100 * s.moment.accuracy for _, s in here]),
            (held, colours.fusion, [s.moment.held_loss for _, s in here], [_percent(s.moment.held) for _, s in here]),
            ("drawn masks, held out", colours.second, None, [_percent(s.look.sampled) for _, s in here]),
        )
        for name, colour, losses, right in lines:
            for column, values, form in ((1, losses, "%{y:.3f}"), (2, right, "%{y:.1f} %")):
                if values is None or all(value is None for value in values):
                    continue
                fig.add_scatter(
                    x=x,
                    y=values,
                    row=1,
                    col=column,
                    name=name,
                    mode="lines" if len(x) > 1 else "markers",
                    line={"color": colour, "width": 2.2, "dash": dash},
                    marker={"color": colour, "size": 7},
                    hovertemplate=f"{phase}, {name}<br>{form} after %{{x:.3~g}} epochs<extra></extra>",
                )
                if column == 2:
                    ends[name] = x[-1], float(values[-1] or 0), colour
    _label_ends(fig, ends)
    _divide(fig, steps, at, colours)
    fig.update_xaxes(title="epochs", range=[0, max(at, default=1) * 1.02 or 1])
    losses = [value for step in steps for value in (step.moment.loss, step.moment.held_loss) if value is not None]
    if losses:  # limit the axis, so that a spike does not compress the rest
        fig.update_yaxes(range=[0, max(min(max(losses), 2 * float(np.quantile(losses, 0.9))), 0.1)], row=1, col=1)
    fig.update_yaxes(range=[0, 103], row=1, col=2)
    fig.update_annotations(font={"size": 14, "color": colours.dense}, selector={"yref": "paper", "yanchor": "bottom"})
    return fig.update_layout(margin={"t": 92, "r": 150})


def _percent(share: float | None) -> float | None:
    return None if share is None else 100 * share


def learned(steps: Sequence["PhaseProgress"], method: str) -> str:
    """Return the present accuracy and epoch as a title."""
    if not steps:
        return "Loss and accuracy while it trains"
    last = steps[-1].moment
    right = last.accuracy if last.held is None else last.held
    of = "" if last.held is None else " of the held-out images"
    return f"{method}: {100 * right:.1f} %{of} right after {timeline(steps)[-1]:.3g} epochs"


def _label_ends(fig: go.Figure, ends: dict[str, tuple[float, float, str]]) -> None:
    """Write names at the ends of the right panel's lines, moved apart where they would overlap."""
    last = float("inf")
    for name, (x, y, colour) in sorted(ends.items(), key=lambda end: -end[1][1]):
        last = min(y, last - 6)
        fig.add_annotation(
            x=x,
            y=last,
            text=name,
            showarrow=False,
            xanchor="left",
            xshift=6,
            row=1,
            col=2,
            font={"color": colour, "size": 13},
        )


def _divide(fig: go.Figure, steps: Sequence["PhaseProgress"], at: Sequence[float], colours: Palette) -> None:
    """Draw a line where each phase outside of parts begins, and name the phases that have no training steps."""
    seen: set[str] = set()
    for x, step in zip(at, steps, strict=True):
        if step.phase in seen or step.phase.startswith("part ") or step.phase == "training":
            continue
        seen.add(step.phase)
        begin = x - step.moment.epoch
        for column in (1, 2):
            fig.add_vline(begin, line={"color": colours.grid, "width": 1}, row=1, col=column)
        if not step.moment.steps:
            fig.add_annotation(
                x=begin,
                y=1,
                yref="y domain",
                text=step.phase,
                showarrow=False,
                textangle=-90,
                xanchor="left",
                yanchor="top",
                font={"size": 11, "color": colours.drop},
                row=1,
                col=1,
            )


def zeros_over_time(steps: Sequence["PhaseProgress"], method: str, dark: bool = False) -> go.Figure:
    """Draw the share of each layer that is zero or masked, from the first step to the last."""
    colours = palette(dark)
    rows = [step for step in steps if not step.phase.startswith("part ")] or list(steps)
    last = rows[-1].look.zero if rows else {}
    rows = [step for step in rows if step.look.zero.keys() == last.keys()]
    layers = list(last)
    verb = "masked" if method in _SUBNETWORKS else "zero"
    most = max(last, key=last.__getitem__) if last else ""
    title = f"Most weights are {verb} in {most}: {last[most]:.0%}" if last and last[most] > 0 else f"No weight is {verb} yet"
    fig = figure(title if steps else f"Which weights are {verb}", 400, colours)
    if rows:
        at = timeline(rows)
        fig.add_heatmap(
            x=at,
            y=layers,
            z=[[100 * step.look.zero[layer] for step in rows] for layer in layers],
            zmin=0,
            zmax=100,
            colorscale=[[0, colours.paper], [1, colours.fusion]],
            colorbar={"title": "%", "thickness": 12},
            hovertemplate=f"%{{y}} after %{{x:.3~g}} epochs<br>%{{z:.1f}} % {verb}<extra></extra>",
        )
    fig.update_xaxes(title="epochs")
    fig.update_yaxes(autorange="reversed", showgrid=False, automargin=True)
    return fig


def norms_over_time(steps: Sequence["PhaseProgress"], dark: bool = False) -> go.Figure:
    """Draw the distribution of norms or masks from the first step to the last, and the threshold if there is one."""
    colours = palette(dark)
    of = steps[-1].look.of if steps else ""
    rows = [step for step in steps if step.look.of == of and not step.phase.startswith("part ")] or list(steps)
    fig = figure(_spread_title(rows[-1] if rows else None), 400, colours)
    if rows:
        at, top = timeline(rows), max(max(step.look.edges[-1], step.look.mark or 0.0) for step in rows)
        edges = np.linspace(0, top, len(rows[0].look.edges))
        z = np.array([_rebinned(step.look.edges, step.look.counts, edges) for step in rows]).T
        fig.add_heatmap(
            x=at,
            y=(edges[1:] + edges[:-1]) / 2,
            z=100 * z,
            colorscale=colours.mass(),
            colorbar={"title": "%", "thickness": 12},
            hovertemplate="%{z:.1f} % at %{y:.3~g}<br>after %{x:.3~g} epochs<extra></extra>",
        )
        marks = [(x, step.look.mark) for x, step in zip(at, rows, strict=True) if step.look.mark is not None]
        if marks:
            fig.add_scatter(
                x=[x for x, _ in marks],
                y=[mark for _, mark in marks],
                mode="lines",
                line={"color": colours.second, "width": 2},
                hovertemplate="threshold %{y:.3~g}<extra></extra>",
            )
            fig.add_annotation(
                x=marks[len(marks) // 2][0],
                y=marks[len(marks) // 2][1],
                text="threshold",
                showarrow=False,
                xanchor="left",
                yanchor="top",
                font={"color": colours.second},
            )
        fig.update_yaxes(range=[0, top])
    fig.update_xaxes(title="epochs")
    fig.update_yaxes(title=of.partition(":")[0].partition(",")[0], showgrid=False)
    return fig


def _spread_title(last: "PhaseProgress | None") -> str:
    if last is None:
        return "How norms, or masks, move"
    look = last.look
    if look.mark is None:
        return f"How the {_plural(look.of)} move"
    under = float(np.interp(look.mark, look.edges, np.concatenate([[0], np.cumsum(look.counts)])))
    return f"{under / max(sum(look.counts), 1):.0%} of the channels are under the threshold, and zero"


def _plural(of: str) -> str:
    """Return the plural of what a histogram counts."""
    first, _, rest = of.partition(":")[0].partition(" ")
    return f"{first.removesuffix('y') + 'ies' if first.endswith('y') else first + 's'} {rest}"


def _rebinned(edges: Sequence[float], counts: Sequence[int], onto: np.ndarray) -> np.ndarray:
    """Redistribute counts evenly over other bins; return shares of their sum."""
    below = np.interp(onto, edges, np.concatenate([[0], np.cumsum(counts)]))
    return np.diff(below) / max(sum(counts), 1)


def runs_side_by_side(runs: Sequence["LabRun"], names: Sequence[str], dark: bool = False) -> go.Figure:
    """Draw accuracy against the remaining parameters, with a point for each run."""
    colours = palette(dark)
    names = [hover(name) for name in names]
    fig = figure(compared(runs, names), 420, colours)
    shares = [100 * run.outcome.params / run.outcome.dense_params for run in runs]
    right = [100 * run.outcome.accuracy for run in runs]
    low = [100 * (run.outcome.accuracy - run.outcome.interval[0]) for run in runs]
    high = [100 * (run.outcome.interval[1] - run.outcome.accuracy) for run in runs]
    fig.add_scatter(
        x=shares,
        y=right,
        mode="markers+text",
        text=list(names),
        textposition="top center",
        error_y={"array": high, "arrayminus": low, "color": rgba(colours.dense, 0.4), "thickness": 1},
        marker={"size": 11, "color": [_colour(run.spec.method, colours) for run in runs]},
        customdata=[[run.outcome.zero, sum(run.outcome.seconds.values())] for run in runs],
        hovertemplate="%{text}: %{y:.1f} %<br>%{x:.1f} % of the parameters<br>%{customdata[0]:.0%} of the weights zero"
        "<br>%{customdata[1]:.1f} s of training<extra></extra>",
    )
    fig.update_xaxes(title="parameters that are left, %", range=[0, 108])
    return fig.update_yaxes(title="top-1 accuracy, test images, %")


def _colour(method: str, colours: Palette) -> str:
    kinds = {"sgd": colours.dense, "iterative": colours.dense, "sdprun": colours.fusion, "grda": colours.fusion}
    kinds |= {"group-lasso": colours.fusion, "fap": colours.second, "paf": colours.second}
    return kinds.get(method, colours.fold if method in _SUBNETWORKS else colours.third)


def compared(runs: Sequence["LabRun"], names: Sequence[str]) -> str:
    """Return the result of the comparison as a title."""
    if not runs:
        return "Runs side by side"
    best = max(range(len(runs)), key=lambda i: runs[i].outcome.accuracy)
    least = min(range(len(runs)), key=lambda i: runs[i].outcome.params)
    told = f"{names[best]} is best with {100 * runs[best].outcome.accuracy:.1f} %"
    share = runs[least].outcome.params / runs[least].outcome.dense_params
    if best == least:
        return f"{told}, and smallest: {share:.0%} of the parameters"
    return f"{told}; {names[least]} is smallest: {share:.0%} of the parameters, {100 * runs[least].outcome.accuracy:.1f} %"
