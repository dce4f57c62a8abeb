"""Pieces of the Sensitivity page: how a study runs, its heatmaps, what it suggests, and what to compare it with."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from typing import Any

import pandas as pd
import streamlit as st

from intrafusion import IntrafusionError, PruneSpec
from intrafusion.bench import Bench
from intrafusion.budget import Shapes, Suggestion, shapes, suggest
from intrafusion.figures.sensitivity import (
    compare_studies,
    sensitivity_heatmap,
    sensitivity_panels,
    suggestion_bars,
)
from intrafusion.precision import PRECISIONS, has_bf16
from intrafusion.quote import curve_line
from intrafusion.run import Result
from intrafusion.sensitivity import Matrix, difference, matrix
from intrafusion.store import Store
from intrafusion.study import Study
from intrafusion.sweep import origin, sweep
from pages.common import parts, shell, studying
from pages.common.shell import BIND, Here

KEYS = ("study_name", "precision", "decide", "executor", "budget", "share", "suggest_merge")
_TARGETS = {"parameters": "params", "MACs": "macs", "accuracy": "accuracy"}


@dataclass(frozen=True)
class Way:
    """How a study runs. run: None for this machine, else what takes `sweep`'s place."""

    name: str
    precision: str
    decide: bool
    run: Callable[..., Any] | None


def way_to_run(here: Here) -> Way:
    """Draw the controls; what they say."""
    left, middle, right = st.columns(3)
    name = left.text_input(
        "Name of the study", key="study_name", bind=BIND, placeholder=f"{here.spec.model} sensitivity"
    )
    precise = middle.segmented_control(
        "Precision", PRECISIONS, default="exact", key="precision", bind=BIND, disabled=not has_bf16(here.bench.device),
        help="exact: the predictions of fp32. fast: bf16, refused where it moves the dense accuracy by more than 0.2 point.",
    ) or "exact"  # fmt: skip
    decide = middle.toggle(
        "Stop at what is decided", key="decide", bind=BIND,
        help="Looks no further at a cell once fused and dropped differ for sure on the same images (McNemar's 95 % interval, corrected for the number of looks).",
    )  # fmt: skip
    executor = right.segmented_control(
        "Where", ["here", "Ray cluster"], default="here", key="executor", bind=BIND, disabled=find_spec("ray") is None,
        help="A Ray cluster takes the study past one machine; it needs the package ray.",
    )  # fmt: skip
    run = None
    if executor == "Ray cluster" and find_spec("ray") is not None:
        from intrafusion import cluster

        address = right.text_input("Address of the cluster", key="address", placeholder="one on this machine")
        run = partial(cluster.sweep, address=address.strip() or None)
    return Way(name.strip() or f"{here.spec.model} sensitivity", precise, decide, run)


def start(key: tuple, study: Study, specs: list[PruneSpec], bench: Bench, kept: Store | None, way: Way) -> None:
    """Save the study under its name and measure it in the background."""
    if kept:
        kept.save_study(study.name, study.to_toml(), [(spec, origin(spec, bench)) for spec in specs])
    studying.start(key, specs, bench, kept, f"sensitivity of {study.base.model}", way.run or sweep, way.decide)


def matrices(
    results: Sequence[Result], merges: Sequence[str], groups: Sequence[str], sparsities: Sequence[float]
) -> dict[str, Matrix]:
    return {merge: matrix(results, merge, None, groups, sparsities) for merge in merges}


def heatmaps(
    results: Sequence[Result], merges: Sequence[str], groups: Sequence[str], sparsities: Sequence[float], group: str
) -> None:
    """One heatmap a merge and, for two merges, their difference; a click chooses the group."""
    made = matrices(results, merges, groups, sparsities)
    fused = next((merge for merge in merges if merge != "drop"), None)
    place = (group, st.session_state.get("cell", sparsities[0]))
    place = place if place[1] in sparsities else (group, sparsities[0])
    if "drop" in made and fused:
        one, other = made.pop(fused), made.pop("drop")
        _clickable(sensitivity_panels(one, other, difference(one, other), place, shell.is_dark()), "panels")
    for merge, single in made.items():
        _clickable(sensitivity_heatmap(single, place, shell.is_dark()), f"heatmap-{merge}")


def _clickable(figure: Any, key: str) -> None:
    st.plotly_chart(
        figure, key=key, config=parts.config(key), on_select=lambda: _pick(key), selection_mode="points", theme=None
    )


def _pick(key: str) -> None:
    """The sidebar's group follows the click."""
    points = st.session_state[key].selection.points
    if points:
        where = points[0]["customdata"]
        group, sparsity = where if isinstance(where, list | tuple) else (where["0"], where["1"])
        st.session_state.group, st.session_state.cell = str(group), float(sparsity)


@st.cache_resource(max_entries=6, show_spinner=False)
def _shapes(_here: Here, key: tuple) -> Shapes:
    return shapes(_here.bench.model, _here.bench.groups, _here.bench.example)


def suggestion(here: Here, bench: Bench, base: PruneSpec, made: dict[str, Matrix], kept: Store | None) -> None:
    """Sparsities for all groups under a target, from the table; and what the network made with them really reaches."""
    st.markdown(
        "Sparsities for each group that cost the least accuracy by the table above, **as if losses added up**. They do not quite: "
        "really pruning the whole network tells."
    )
    left, middle, right = st.columns([1.4, 3, 1.4])
    target = left.selectbox("Target", list(_TARGETS), index=1, key="budget", bind=BIND)
    words = "At least this accuracy, %" if target == "accuracy" else f"At most this share of the {target}, %"
    value = middle.slider(words, 10, 100, 85 if target == "accuracy" else 70, key="share", bind=BIND) / 100
    merge = right.selectbox("Merge", list(made), index=len(made) - 1, key="suggest_merge", bind=BIND)
    found = suggest(made[merge], _shapes(here, here.key()), _TARGETS[target], value)
    if not found.met:
        st.warning(found.note, icon=":material/warning:")
    parts.chart(suggestion_bars(found, shell.is_dark()), "suggestion")
    _verification(here, bench, base, found, kept)


def _verification(here: Here, bench: Bench, base: PruneSpec, found: Suggestion, kept: Store | None) -> None:
    """The expected accuracy beside the measured one."""
    losing = {group: share for group, share in found.sparsities.items() if share > 0}
    if not losing:
        st.info("Nothing is to be pruned for this target.")
        return
    spec = base.but(groups=tuple(losing), sparsities=tuple(losing.values()), merge=found.merge)
    key = ("verify", here.key(), spec)
    job = shell.jobs().get(key)
    measured = studying.points(kept, [spec], bench, job).get(spec)
    columns = st.columns(4)
    dense, size = found.dense, found.size
    columns[0].metric(
        "Parameters",
        f"{size.params / dense.params:.0%}",
        f"{size.params:,}",
        delta_color="off",
        delta_arrow="off",
        border=True,
    )
    columns[1].metric(
        "MACs",
        f"{size.macs / dense.macs:.0%}",
        f"{size.macs / 1e6:,.1f} million",
        delta_color="off",
        delta_arrow="off",
        border=True,
    )
    columns[2].metric(
        "Expected accuracy",
        f"{found.accuracy:.1%}",
        "if losses added up",
        delta_color="off",
        delta_arrow="off",
        border=True,
    )
    if measured:
        low, high = measured.interval
        about = f"± {50 * (high - low):.1f} on {measured.count:,} images; dense {measured.dense_accuracy:.1%}"
        columns[3].metric(
            "Measured accuracy", f"{measured.accuracy:.1%}", about, delta_color="off", delta_arrow="off", border=True
        )
    else:
        columns[3].metric(
            "Measured accuracy", "not yet", "prune it to know", delta_color="off", delta_arrow="off", border=True
        )
    if job is not None and job.active:
        _wait(job)
    elif not (measured and measured.complete) and st.button(
        "Prune the whole network like this, and measure", icon=":material/content_cut:"
    ):
        studying.start(key, [spec], bench, kept, f"pruned {spec.model}")
        st.rerun()
    if job is not None and job.state in ("failed", "done"):
        studying.failures(job)
    st.code(
        curve_line(spec.but(sparsity=0.0), criterion=[spec.criterion], merge=[spec.merge], sparsity=[0.0]),
        language="bash",
        wrap_lines=True,
    )


@st.fragment(run_every=0.5)
def _wait(job: Any) -> None:
    if not job.active:
        st.rerun()
    st.progress(job.share or 0.0, "Pruning all groups, from output to input, and measuring")


def comparison(study: Study, made: dict[str, Matrix], kept: Store | None) -> None:
    """This study beside a stored one of the same network, on the same images."""
    rows = kept.studies() if kept else []
    others = [
        row.name for row in rows if row.name != study.name and Study.from_toml(row.text).base.model == study.base.model
    ]
    if not others:
        st.caption(
            "Run a second study of this network under another name (say, with another criterion) to compare the two here."
        )
        return
    left, right = st.columns(2)
    other = left.selectbox("Study", others, key="other_study", index=None, placeholder="choose a stored study")
    merge = right.selectbox("Merge to compare", list(made), key="compare_merge", index=len(made) - 1)
    if other is None or kept is None:
        return
    try:
        theirs = [result for result in kept.results(other) if result.spec.merge == merge]
        ours = made[merge]
        both = difference(ours, matrix(theirs, merge, None, ours.groups, ours.sparsities))
        parts.chart(compare_studies(both, (study.name, other), None, shell.is_dark()), "compare")
    except IntrafusionError as error:
        st.warning(str(error), icon=":material/warning:")


def files(study: Study, rows: pd.DataFrame) -> None:
    """The study as a file, which the command line runs again, and its results as Parquet."""
    with st.container(horizontal=True):
        st.download_button(
            "Study file (TOML)", study.to_toml(), "study.toml", "text/plain", icon=":material/description:", on_click="ignore",
            help="`python -m intrafusion sweep --file study.toml` runs it again.",
        )  # fmt: skip
        st.download_button(
            "Results as Parquet", rows.to_parquet(index=False), "study.parquet", "application/octet-stream",
            icon=":material/table_view:", on_click="ignore",
        )  # fmt: skip
