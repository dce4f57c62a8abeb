"""Parts of the Landscape page: the controls, and the pictures and tables of its four computations."""

from collections.abc import Mapping
from dataclasses import dataclass
from textwrap import shorten
from typing import Any

import pandas as pd
import streamlit as st
from streamlit.delta_generator import DeltaGenerator

from intrafusion import PruneSpec, registry
from intrafusion.models.hub import architecture_of, kept_names, kept_when
from intrafusion.reporting.figures import landscape as figures
from intrafusion.reporting.figures import output_distance as output_figures
from intrafusion.reporting.figures.images import gallery
from intrafusion.runtime import escaping
from intrafusion.studies.output_distance import Outputs
from intrafusion.studies.session import Session
from intrafusion.studies.weight_space import CONTROLS, MERGED, Sharpness, Slice, Solutions
from intrafusion.training.mode_connectivity import POINTS, Path
from pages.shared import parts
from pages.shared.links import BIND
from pages.shared.open_model import Here

KEYS = (
    "criterion", "sparsity", "landscape_scope", "landscape_limit", "landscape_size", "shown", "changed", "path_from",
    "path_to", "path_epochs", "path_training", "path_rate",
)  # fmt: skip
_SHOWN = 8  # most images in the gallery
_KINDS = {
    "fusion keeps": "dense and fused correct, dropped wrong",
    "both lose": "dense correct, dropped and fused wrong",
    "only fusion loses": "dense and dropped correct, fused wrong",
    "only fusion gains": "only fused correct",
    "only dropping gains": "only dropped correct",
    "both gain": "dense wrong, dropped and fused correct",
    "wrong otherwise": "all wrong, with different predictions",
}


def controls(here: Here) -> PruneSpec:
    """Draw the page's first row and return its spec."""
    grid = st.grid(4, min_column_width=180)
    names = list(registry("criterion"))
    criterion = grid.selectbox("Importance criterion", names, index=names.index("l1"), key="criterion", bind=BIND)
    scope = grid.segmented_control(
        "Prune", ["all groups", "this group"], default="all groups", required=True, key="landscape_scope", bind=BIND
    )
    percent = grid.slider("Sparsity", 5, 95, 30, 5, format="%d %%", key="sparsity", bind=BIND)
    limit = grid.selectbox(
        "Test images",
        ["100", "500", "2000", "all"],
        index=1,
        key="landscape_limit",
        bind=BIND,
        help="Every point of the plane and of the path is measured on all these images.",
    )
    groups: Any = "all" if (scope or "all groups") == "all groups" else here.spec.groups
    return here.spec.but(
        criterion=criterion, sparsity=percent / 100, groups=groups, limit=None if limit == "all" else int(limit)
    )


def plane_controls(row: DeltaGenerator) -> tuple[str, int]:
    """Draw the plane's controls into a row. Return the measure, a key of MEASURES, and the grid points per side."""
    what = row.segmented_control(
        "Show",
        list(figures.MEASURES),
        default="accuracy",
        required=True,
        key="shown",
        bind=BIND,
        label_visibility="collapsed",
    )
    size = row.selectbox(
        "Points per side",
        [9, 17, 33],
        index=1,
        key="landscape_size",
        bind=BIND,
        width=160,
    )
    return what or "accuracy", int(size)


@st.cache_resource(max_entries=4, show_spinner=False)
def solutions(_session: Session, key: tuple) -> Solutions:
    """Return the networks of the spec, which is the last item of `key`, made once for all four computations."""
    return Solutions(key[-1], _session)


def show_plane(found: Slice | None, what: str) -> None:
    left, right = st.columns([5, 3], gap="medium")
    with left:
        if found is None:
            figure = figures.empty_plane("The plane through dense, dropped and fused", figures.SLICE_HEIGHT, parts.is_dark())
        else:
            figure = figures.slice_map(found, what, parts.is_dark())
        parts.chart(figure, "plane")
    with right:
        st.markdown(
            "Three points always lie in one plane. Its axes show the true distances between networks. The closer a colour is to "
            "the background, the better the network."
        )
        if found is not None:
            rows = [
                {
                    "network": mark.name,
                    "accuracy": f"{mark.accuracy:.1%} ± {50 * (mark.interval[1] - mark.interval[0]):.1f}",
                    "loss, nats": f"{mark.loss:.3g}",
                    "distance": f"{mark.distance:.3g}",
                }
                for mark in found.marks
            ]
            st.dataframe(pd.DataFrame(rows), hide_index=True)
            st.caption(
                f"The three networks are measured separately on {found.marks[0].count:,} test images, with 95 % intervals; "
                f"{found.share:.0%} of the grid is measured. BatchNorm is folded into the weights, and removed channels are zero."
            )
        with st.popover("How it is computed", icon=":material/help:"):
            st.latex(
                r"u = \frac{w_{drop} - w}{\lVert w_{drop} - w \rVert}, \quad v \propto (w_{fuse} - w) - \langle w_{fuse} - w, u\rangle u"
            )
            st.latex(r"(x, y) \mapsto \mathrm{accuracy}(w + x\,u + y\,v)")
            st.markdown("$w$ contains all weights and biases of the dense network, with BatchNorm folded.")


def show_outputs(found: Outputs | None, made: Solutions) -> None:
    left, right = st.columns(2, gap="medium")
    complete = found is not None and found.share == 1
    dark = parts.is_dark()
    with left:
        title = "Distance of the logits"
        figure = (
            output_figures.distance_histograms(found, dark)
            if complete
            else figures.empty_plane(title, output_figures.HEIGHT, dark)
        )
        parts.chart(figure, "distances")
    with right:
        title = "Distance of the logits by class"
        figure = output_figures.class_bars(found, dark) if complete else figures.empty_plane(title, output_figures.HEIGHT, dark)
        parts.chart(figure, "classes")
    if not complete:
        st.caption("Images whose prediction changes appear here.")
        return
    changed = {kind: rows for kind, rows in found.changed().items() if len(rows)}
    if not changed:
        st.caption("No prediction changes on these images.")
        return
    if st.session_state.get("changed") not in changed:
        st.session_state.pop("changed", None)
    kind = st.segmented_control(
        "Images whose prediction changes",
        list(changed),
        default=next(iter(changed)),
        required=True,
        key="changed",
        bind=BIND,
        wrap=True,
        help="  \n".join(f"**{name}**: {words}." for name, words in _KINDS.items()),
    )
    st.caption("; ".join(f"{name}: {len(rows):,}" for name, rows in changed.items()))
    kind = kind or next(iter(changed))
    rows, data = changed[kind][:_SHOWN].tolist(), made.images
    total = sum(map(len, changed.values()))
    title = f"{len(changed[kind]):,} of {total:,} changed: {_KINDS[kind]}"
    pictures = [data.images[i].permute(1, 2, 0).cpu().numpy() for i in rows]
    parts.chart(gallery(pictures, [_caption(found, i) for i in rows], title, -1, dark), "changed-images")
    if len(changed[kind]) > _SHOWN:
        st.caption(f"The {_SHOWN} images with the highest confidence of the dense network. The CSV below lists all images.")


def _caption(found: Outputs, image: int) -> str:
    """Return a caption with the true class and the classes that the networks predict."""

    def name(label: int) -> str:
        return escaping.hover(shorten(found.classes[label], 14, placeholder="…")) if label >= 0 else "unknown"

    said = {network: name(int(found.predictions(network)[image])) for network in ("dense", "dropped", "fused")}
    true, dense = name(int(found.labels[image])), said["dense"]
    first = f"<b>{true}</b>" if dense == true else f"<b>{true}</b>, dense {dense}"
    return f"{first}<br>dropped {said['dropped']}<br>fused {said['fused']}"


def other_ends(here: Here) -> dict[str, int]:
    """Return the kept networks of this architecture and when each was kept; the times are part of a path's cache key."""
    architecture = architecture_of(here.spec.model)
    return {name: kept_when(name) for name in kept_names(damaged=False) if architecture_of(name) == architecture}


@dataclass(frozen=True)
class PathHow:
    """How a path is trained. rate: learning rate, None to find it by a test. training: number of images, None for all."""

    epochs: float
    rate: float | None
    training: int | None


def path_controls(here: Here) -> tuple[tuple[str, str], PathHow, Mapping[str, int]]:
    """Draw the path's controls. Return the names of the ends, how to train, and the kept networks among the ends."""
    others = other_ends(here)
    names = ["dense", *MERGED, *others]
    grid = st.grid(5, min_column_width=150)
    first = grid.selectbox("From", names, index=0, key="path_from", bind=BIND)
    last = grid.selectbox("To", names, index=names.index("fused"), key="path_to", bind=BIND)
    epochs = grid.number_input("Epochs", 0.5, 100.0, 6.0, 1.0, format="%g", key="path_epochs", bind=BIND)
    rate = grid.number_input(
        "Peak learning rate",
        0.0,
        1.0,
        None,
        0.01,
        format="%g",
        key="path_rate",
        bind=BIND,
        placeholder="automatic",
        help="If empty, short training runs find the best rate.",
    )
    training = grid.selectbox("Training images", ["1000", "2000", "5000", "all"], index=1, key="path_training", bind=BIND)
    kept = {name: others[name] for name in (first, last) if name in others}
    return (first, last), PathHow(float(epochs), rate or None, None if training == "all" else int(training)), kept


def show_path(found: Path | None, ends: tuple[str, str]) -> None:
    dark = parts.is_dark()
    if found is None:
        parts.chart(figures.empty_plane(f"From {ends[0]} to {ends[1]}", figures.PATH_HEIGHT, dark), "path")
    else:
        parts.chart(figures.path_panels(found, ends, dark), "path")
    words = (
        f"{POINTS} networks on the straight line and {POINTS} on a Bezier curve with three bends; only the bends are trained, and "
        "the ends are fixed. Two networks lie in one valley if the loss on some path never exceeds that of its worse end."
    )
    for name, walked in (("straight line", found.line), ("trained path", found.curve)) if found else ():
        if walked.share == 1:
            rises = f"rises {walked.barrier:.2g} nats" if walked.barrier > 0 else "never rises"
            words += f" On the {name}, the loss {rises} above it."
    if found is not None and found.norms:
        words += f" At every point, the statistics of the {found.norms} BatchNorm layers are recomputed on {found.seen:,} training images."
    elif found is not None:
        words += " BatchNorm is folded or absent in these networks, so there are no statistics to recompute."
    st.caption(words)
    if found is not None and found.moments:
        st.caption(f"Training at a peak learning rate of {found.rate:.2g}: {found.moments[-1]}.")
    elif found is not None and found.line.share == 1:
        st.caption("Training starts after short runs have found a learning rate.")


def show_sharp(found: Sharpness | None) -> None:
    dark = parts.is_dark()
    if found is None:
        figure = figures.empty_plane("The sharpest directions around the dense network", figures.SHARP_HEIGHT, dark)
    else:
        figure = figures.sharp_bars(found, dark)
    parts.chart(figure, "sharp")
    words = (
        "The training loss rises steeply along a few directions and hardly changes along most. A displacement outside the steep "
        "directions stays in the valley."
    )
    if found is not None:
        words += (
            f" The directions were computed by the Lanczos method: {found.step} products with the Hessian of the loss on "
            f"{found.images:,} training images, in {found.dimensions:,} dimensions. Random directions, in all weights or only in "
            f"those that pruning changes, also have a share there (means of {CONTROLS} draws)."
        )
    st.caption(words)
    with st.popover("Formula", icon=":material/help:"):
        st.latex(r"\mathrm{share}(d) = \sum_{i=1}^{10} \langle v_i, d \rangle^2 / \lVert d \rVert^2")
        st.markdown(
            "$v_i$: eigenvectors of the Hessian at the dense weights; $d$: the displacement from there to the pruned network."
        )


def slice_table(found: Slice | None) -> pd.DataFrame:
    return pd.DataFrame(found.rows() if found else [])


def part_files(found: Mapping[str, Path | Sharpness | Outputs | None]) -> None:
    """Draw a download button for the numbers of each complete part."""
    for name, part in found.items():
        if part is not None and part.share == 1:
            st.download_button(
                f"{name.capitalize()} as CSV",
                escaping.csv(pd.DataFrame(part.rows())),
                f"intrafusion-{name}.csv",
                "text/csv",
                icon=":material/table_view:",
                on_click="ignore",
            )
