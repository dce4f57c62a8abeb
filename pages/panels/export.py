"""Parts of the Export page: the controls, the network before and after, its speed, and the files with their downloads."""

import shutil
import tempfile
import weakref
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pandas as pd
import streamlit as st
from streamlit.delta_generator import DeltaGenerator

from intrafusion import IntrafusionError, PruneSpec, registry
from intrafusion.evaluation.latency import LatencyComparison
from intrafusion.reporting import FORMATS, TOLERANCE, Made, Report, Written, archive, writing
from intrafusion.reporting.figures import latency as figures
from intrafusion.reporting.report import before_and_after, file_rows, speed_rows, speed_words
from intrafusion.runtime import stale_files
from intrafusion.runtime.progress import Progress
from pages.shared import links, messages, open_model, parts
from pages.shared.links import BIND
from pages.shared.open_model import Here

KEYS = (
    "criterion", "sparsity", "export_merge", "export_recovery", "export_scope", "round_to", "export_limit",
    "export_sparsities",
    "formats", "epochs", "training", "rate", "patience", "ratio", "gamma", "rank",
)  # fmt: skip
_TYPES = {".json": "application/json", ".md": "text/markdown", ".html": "text/html"}


def controls(here: Here) -> PruneSpec:
    """Draw the page's first rows and return their spec. Raise IntrafusionError for invalid sparsities."""
    grid = st.grid(4, min_column_width=180)
    names, merges, recoveries = (list(registry(kind)) for kind in ("criterion", "merge", "recovery"))
    criterion = grid.selectbox("Importance criterion", names, index=names.index("l1"), key="criterion", bind=BIND)
    percent = grid.slider("Sparsity", 5, 95, 30, 5, format="%d %%", key="sparsity", bind=BIND)
    merge = grid.selectbox(
        "Merge", merges, index=merges.index("fusion"), key="export_merge", bind=BIND, help=parts.methods_help("merge")
    )
    recovery = grid.selectbox("Recovery", recoveries, key="export_recovery", bind=BIND, help=parts.methods_help("recovery"))
    scope = grid.segmented_control(
        "Prune", ["all groups", "this group"], default="all groups", required=True, key="export_scope", bind=BIND
    )
    round_to = grid.selectbox(
        "Channels in multiples of",
        [1, 4, 8, 16, 32],
        key="round_to",
        bind=BIND,
        help="A width that is not a multiple of the processor's vector size can be slower than a larger one.",
    )
    limit = grid.selectbox("Test images", ["500", "2000", "10000", "all"], index=1, key="export_limit", bind=BIND)
    own = grid.text_input(
        "Sparsity per group",
        key="export_sparsities",
        bind=BIND,
        placeholder="same for all",
        max_chars=20_000,
        help="For example conv1=0.1 layer2.0.conv1=0.5: only these groups are pruned, instead of the sparsity above. The "
        "Sensitivity page suggests values for a budget.",
    )
    spec = here.spec.but(
        criterion=criterion,
        merge=merge,
        recovery=recovery,
        sparsity=percent / 100,
        round_to=int(round_to),
        groups="all" if (scope or "all groups") == "all groups" else here.spec.groups,
        limit=None if limit == "all" else int(limit),
    )
    shares = shares_of(own)
    unknown = set(shares) - {group.name for group in here.session.groups if group.reason is None}
    if unknown:
        raise IntrafusionError(f"{min(unknown)!r} is not a prunable group of this network; see the groups in the sidebar")
    return spec.but(groups=tuple(shares), sparsities=tuple(shares.values())) if shares else spec


def shares_of(text: str) -> dict[str, float]:
    """Parse sparsities by group from text such as "conv1=0.1 layer1.0.conv1=0.5". Raise IntrafusionError if it is invalid."""
    shares = {}
    for word in text.replace(",", " ").split():
        name, _, share = word.rpartition("=")
        try:
            shares[name] = float(share)
        except ValueError as error:
            raise IntrafusionError(f"{word!r} is not a group with a sparsity; write conv1=0.1") from error
        if not name or not 0 <= shares[name] < 1:
            raise IntrafusionError(f"{word!r} is not a group with a sparsity of at least 0 and less than 1; write conv1=0.1")
    return shares


def query(spec: PruneSpec) -> dict[str, Any]:
    """Return the query parameters for a network with one sparsity per group: the page's settings and the sidebar's."""
    shares = zip(spec.groups, spec.sparsities or (), strict=True)
    told = {
        "criterion": spec.criterion,
        "export_merge": spec.merge,
        "export_sparsities": " ".join(f"{group}={share:g}" for group, share in shares),
    }
    sidebar = {key: st.session_state.get(key) for key in links.SIDEBAR}
    return {key: str(value) for key, value in (sidebar | told).items() if value not in (None, "")}


def later(row: DeltaGenerator, label: str) -> None:
    """Draw a disabled button in place of one that has nothing to work on yet."""
    row.button(label, disabled=True, icon=":material/play_arrow:", width=210, key=f"later {label}")
    row.caption("Available when the network is pruned.")


def _frame(rows: Sequence[Sequence[str]]) -> None:
    st.dataframe(pd.DataFrame(rows[1:], columns=[name or " " for name in rows[0]]), hide_index=True)


def show_network(made: Made | None, merge: str) -> None:
    """Draw accuracy and size before and after, and the widths of all groups."""
    left, right = st.columns(2, gap="medium")
    with right:
        title = "Channels of each group before and after"
        figure = figures.widths(made.widths, merge, parts.is_dark()) if made else figures.empty(title, parts.is_dark())
        parts.chart(figure, "widths")
    with left:
        if made is None:
            st.caption("Accuracy, parameters, multiply-accumulates and channels appear here.")
            return
        _frame(before_and_after(made))
        words = "BatchNorm is folded into the weights of both networks."
        if made.result is not None:
            words += f" Accuracy is top-1 on {made.result.count:,} test images, with 95 % intervals."
        st.caption(words)


def show_speed(found: LatencyComparison | None) -> None:
    """Draw the timing runs, the verdict, and the table of numbers."""
    dark = parts.is_dark()
    if found is None:
        parts.chart(figures.empty("Latency of one forward pass", dark), "speed")
        st.caption(
            "The networks are timed in turns, about 30 times each at batch 1 and at a large batch, so that other load on this "
            "machine affects both. One is called faster only if the 95 % interval of the ratio excludes 1."
        )
        return
    parts.chart(figures.latencies(found, dark), "speed")
    if found.share < 1:
        st.caption("Measuring. The conclusion appears after the last run.")
        return
    if found.sentence().startswith("Smaller but not faster"):
        st.warning(f"{found.sentence()}.", icon=":material/speed:")
    else:
        st.success(f"{found.sentence()}.", icon=":material/speed:")
    _frame(speed_rows(found))
    st.caption(speed_words(found).partition(". ")[2])


def formats_control() -> tuple[str, ...]:
    """Draw the choice of formats and return the chosen ones in the order of FORMATS."""
    told = "\n".join(f"- **{name}**: {kind.summary}" for name, kind in FORMATS.items())
    chosen = st.pills(
        "Formats", list(FORMATS), selection_mode="multi", default=list(FORMATS), key="formats", bind=BIND, help=told
    )
    return tuple(name for name in FORMATS if name in chosen)


class _Shelf:
    """A temporary folder that is removed when the object is garbage collected."""

    def __init__(self) -> None:
        self.path = Path(tempfile.mkdtemp(prefix=f"{stale_files.EXPORT}{stale_files.mark()}-"))
        weakref.finalize(self, shutil.rmtree, self.path, ignore_errors=True)


@dataclass(frozen=True, eq=False)
class Shelved:
    """The files written so far, in a folder that is removed when no reference to it is left."""

    files: tuple[Written, ...]
    shelf: _Shelf


def shelved(made: Made, names: Sequence[str]) -> Iterator[Progress[Shelved]]:
    """Write the formats into a new temporary folder, yielding progress after each step."""
    shelf = _Shelf()
    for told in writing(made, shelf.path, names):
        yield replace(told, result=Shelved(told.result, shelf))


def show_files(report: Report | None, found: Progress[Shelved] | None) -> None:
    """Draw how far each file's outputs differ from the network's, and the download buttons."""
    if report is None or found is None:
        st.caption(
            f"A file can be downloaded if its logits differ from the network's by at most {TOLERANCE:g} of the largest logit, on "
            "random and on real images. The ONNX file is read with onnxruntime."
        )
        return
    files, folder = found.result.files, found.result.shelf.path
    if not files:
        st.caption(f"{found.doing.capitalize()}.")
        return
    _frame(file_rows(files))
    good = [one for one in files if one.reason is None]
    if found.share < 1 or not good:
        return
    base = name_of(report.made.spec)
    with st.container(horizontal=True):
        st.download_button(
            "Download all (ZIP)",
            lambda: archive(report, folder),
            f"{base}.zip",
            "application/zip",
            type="primary",
            icon=":material/folder_zip:",
            on_click="ignore",
            key="archive",
        )
        for file in (file for one in good for file in one.files):
            path = folder / file
            st.download_button(
                file,
                path.read_bytes,
                f"{base}{path.suffix}",
                _TYPES.get(path.suffix, "application/octet-stream"),
                icon=":material/download:",
                on_click="ignore",
                key=f"download {file}",
            )
        st.download_button(
            "report.html",
            report.html,
            f"{base}.html",
            "text/html",
            icon=":material/description:",
            on_click="ignore",
            key="download report",
        )
    with st.expander("Report", icon=":material/description:"):
        st.markdown(report.markdown())


def name_of(spec: PruneSpec) -> str:
    """Return a name for the files of a spec's network."""
    share = "budget" if spec.sparsities else f"{spec.sparsity:.0%}".rstrip("%")
    return f"{spec.model.replace('/', '-')}-{spec.merge}-{share}"


def keep_network_form(made: Made | None) -> None:
    """Draw a form that keeps the network under a name, so that every page can open it."""
    if made is None:
        return
    with st.form("keep", border=False), st.container(horizontal=True, vertical_alignment="bottom"):
        name = st.text_input("Save network as", name_of(made.spec), width=320)
        asked = st.form_submit_button("Save", icon=":material/save:")
    if asked:
        try:
            kept = open_model.keep_network(made.network, name.strip())
        except IntrafusionError as error:
            messages.error(error)
        else:
            st.success(f"Saved. Choose **{kept}** as the model in the sidebar of any page.", icon=":material/check:")
