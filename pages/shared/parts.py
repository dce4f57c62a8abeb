"""Elements that several pages draw: charts, controls, the story of one channel, and the downloads and snippets of a page."""

import math
from collections.abc import Callable
from typing import Any

import pandas as pd
import plotly.graph_objects as go
import streamlit as st
from torch import Tensor

from intrafusion import PruneSpec, TransportPlan, registry
from intrafusion.pruning.groups.channel_vectors import channel_vectors
from intrafusion.pruning.groups.group import PRODUCER
from intrafusion.pruning.importance import needs_images
from intrafusion.pruning.transport.provenance import story
from intrafusion.reporting.figures.kernels import kernel_rows
from intrafusion.reporting.snippets import curve_line
from intrafusion.runtime import escaping
from pages.shared import links
from pages.shared.links import BIND
from pages.shared.open_model import Here


def is_dark() -> bool:
    """Return whether the reader's theme is dark."""
    return st.context.theme.type == "dark"


def chart(figure: go.Figure, key: str, on_channel: bool = False) -> None:
    """Draw a figure. With `on_channel`, a click on a mark selects the channel in its customdata."""
    if on_channel:
        st.plotly_chart(figure, key=key, config=config(key), on_select=lambda: _pick(key), selection_mode="points", theme=None)
    else:
        st.plotly_chart(figure, key=key, config=config(key), theme=None)


def config(key: str) -> dict[str, Any]:
    """Return Plotly's options for a chart, whose camera button saves an SVG named after `key`."""
    return {"displaylogo": False, "toImageButtonOptions": {"format": "svg", "filename": f"intrafusion-{key}"}}


def _pick(key: str) -> None:
    points = st.session_state[key].selection.points
    if points:
        channel = points[0]["customdata"]
        st.session_state.channel = int(channel[0] if isinstance(channel, list | tuple) else channel)


def methods_help(kind: str) -> str:
    """Return a help text with one line per method of a registry."""
    return "\n".join(f"- **{entry.name}**: {entry.told}" for entry in registry(kind).values())


def criterion_control() -> str:
    entries = registry("criterion")
    name = st.selectbox("Importance criterion", list(entries), index=list(entries).index("l1"), key="criterion", bind=BIND)
    st.caption(entries[name].told)
    return name


def sparsity_control() -> float:
    percent = st.slider(
        "Sparsity", 0, 95, 30, format="%d %%", key="sparsity", bind=BIND, help="Share of the group's channels that is removed."
    )
    return percent / 100


def channel_control(group_size: int, default: int) -> int:
    """Draw the channel control and return the chosen channel. Charts also set it, so it is part of the permalink."""
    if not 0 <= st.session_state.get("channel", 0) < group_size:
        st.session_state.pop("channel", None)
    return int(
        st.number_input(
            "Channel",
            0,
            group_size - 1,
            value=default,
            key="channel",
            bind=BIND,
            help="You can also click a channel in a figure.",
        )
    )


def scored_plan(here: Here, spec: PruneSpec) -> tuple[Tensor, TransportPlan]:
    """Return the scores (n,) and the plan of the sidebar's group. The session computes each once."""
    needs = "images" if needs_images(spec) else "weights"
    with st.spinner(f"Comparing {here.group.size:,} channels by their {needs}", show_time=True):
        return here.session.scores(spec, here.group).values, here.session.plan(spec, here.group)


def group_curve_line(spec: PruneSpec) -> str:
    """Return the command line that measures this group, pruned with this spec, with and without fusion."""
    return curve_line(spec, criterion=[spec.criterion], merge=["drop", "fusion"], sparsity=[spec.sparsity])


def channel_story(here: Here, made: TransportPlan, scores: Tensor, channel: int) -> None:
    """Draw one channel's story as text, with the kernels of the channel, of its partners, and of their fusion."""
    told = story(made, scores, channel)
    fused, dropped = st.columns(2)
    fused.markdown(f"**With fusion.** {told.sentence()}")
    dropped.markdown(f"**With dropping.** {told.sentence('drop')}")
    writers = (pair for pair in channel_vectors(here.session.model, here.group) if pair[0].role == PRODUCER)
    layer, vectors = next(pair for pair in writers if pair[0].present()[channel])
    shape = _picture_shape(here, layer.name)
    if shape is None:
        st.caption(f"{escaping.markdown(layer.name)} is a linear layer on features: no kernel images to show.")
        return
    partners = [c for c, _ in (told.absorbs if told.kept else told.goes_to) if c != channel][:2]
    rows = {f"channel {c}": vectors[c] for c in (channel, *partners)}
    if told.absorbs or told.goes_to:
        target = channel if told.kept else told.goes_to[0][0]
        rows[f"fused {target}"] = made.matrix[(made.kept == target).nonzero()[0, 0]] @ vectors.cpu()
    kernels = [vector.reshape(-1, *shape)[0].cpu().numpy() for vector in rows.values()]
    title = f"Incoming weights of these channels in layer {escaping.hover(layer.name)}" + (
        ", BatchNorm folded" if layer.norm else ""
    )
    chart(kernel_rows(kernels, list(rows), title, dark=is_dark()), "kernels")


def _picture_shape(here: Here, layer: str) -> tuple[int, ...] | None:
    """Return the shape (inputs, h, w) that shows one output's weights as pictures.

    That is the kernel of a convolution, or the image if a linear layer reads pixels. Return None for other linear layers.
    """
    weight, pixels = here.session.model.get_submodule(layer).weight, here.session.card.input_size
    if weight.ndim == 4:
        return tuple(weight.shape[1:])
    return pixels if weight.shape[1] == math.prod(pixels) else None


def take_away(
    page: str,
    table: pd.DataFrame,
    command: str,
    snippet: str,
    keys: tuple[str, ...],
    more: Callable[[], None] | None = None,
) -> None:
    """Draw the permalink, the data as CSV, and the command line and Python code for the page. more: draws further files."""
    st.divider()
    st.subheader("Share and reproduce")
    st.caption("The camera icon of a figure saves it as SVG.")
    left, right = st.columns(2)
    with left:
        st.markdown("**Permalink** to this page with its current settings")
        st.code(links.permalink(page, keys), language=None, wrap_lines=True)
        with st.container(horizontal=True):
            st.download_button(
                "Data as CSV",
                escaping.csv(table),
                f"intrafusion-{page or 'overview'}.csv",
                "text/csv",
                icon=":material/table_view:",
                on_click="ignore",
            )
            if more:
                more()
    with right:
        st.markdown("**Command line**")
        st.code(command, language="bash", wrap_lines=True)
        st.markdown("**Python**")
        st.code(snippet, language="python", wrap_lines=True)
