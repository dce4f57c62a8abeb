"""Parts of the Sensitivity page: how a study runs, its heatmaps, the chosen cell, and the comparison with another study."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pandas as pd
import streamlit as st

from intrafusion import IntrafusionError, PruneSpec
from intrafusion.models.precision import PRECISIONS, has_bf16
from intrafusion.reporting.figures.sensitivity import Place, compare_studies, sensitivity_heatmap, sensitivity_panels
from intrafusion.runtime import escaping
from intrafusion.runtime.access import is_public
from intrafusion.spec import MERGE_FIELDS, PLAN_FIELDS
from intrafusion.studies.measurement import Result
from intrafusion.studies.paired_comparison import Paired, paired
from intrafusion.studies.sensitivity import Matrix, difference, sensitivity_matrix
from intrafusion.studies.store.sqlite import Store, StudyRow
from intrafusion.studies.study_file import Study
from intrafusion.studies.sweeps import sweep
from pages.shared import messages, parts
from pages.shared.links import BIND
from pages.shared.open_model import Here

KEYS = (
    "study_name", "precision", "decide", "executor", "address", "first_merge", "second_merge", "cell", "other_study",
    "compared_merge",
)  # fmt: skip
_DEFAULT = {field.name: field.default for field in fields(PruneSpec)}


@dataclass(frozen=True)
class Way:
    """How a study runs.

    named: whether the reader chose the name. run: the function that measures the points. flags: the matching options of
    the command line.
    """

    name: str
    named: bool
    precision: str
    decide: bool
    run: Callable[..., Any]
    flags: dict[str, str]


def way_to_run(here: Here, base: PruneSpec, merges: Sequence[str]) -> Way:
    """Draw the controls and return how the study runs."""
    grid = st.grid(3, min_column_width=210)
    left, middle, right = (grid.container() for _ in range(3))
    fast, several, ray = has_bf16(here.session.device), len(merges) > 1, find_spec("ray") is not None and not is_public()
    precision = middle.segmented_control(
        "Precision",
        PRECISIONS,
        default="exact",
        required=True,
        key="precision",
        bind=BIND,
        disabled=not fast,
        help="exact: the predictions of fp32. fast: bf16, rejected if it changes the dense accuracy by more than 0.2 points.",
    )
    precision = precision if fast and precision else "exact"
    if not fast:
        middle.caption("Fast needs a device with bfloat16.")
    decide = middle.toggle(
        "Stop when decided",
        key="decide",
        bind=BIND,
        disabled=not several,
        help="Stops measuring a cell once it is decided which merge is better on all images (95 % confidence sequence of the paired "
        "difference, by betting, Waudby-Smith and Ramdas).",
    )
    if not several:
        middle.caption("This option needs at least two merges.")
    automatic = automatic_name(base.but(precision=precision))
    name = left.text_input(
        "Study name",
        key="study_name",
        bind=BIND,
        placeholder=automatic,
        help="The name in the store and on the command line. If empty, the study is named after its settings.",
    ).strip()
    executor = right.segmented_control(
        "Run on",
        ["here", "Ray cluster"],
        default="here",
        required=True,
        key="executor",
        bind=BIND,
        disabled=not ray,
        help="A Ray cluster runs the study on several machines.",
    )
    run, flags = sweep, {}
    if not ray:
        right.caption("A public server has no cluster." if is_public() else "A Ray cluster needs the package ray.")
    elif executor == "Ray cluster":
        from intrafusion.studies.cluster import driver

        address = right.text_input("Cluster address", key="address", bind=BIND, placeholder="a cluster on this machine").strip()
        run, flags = partial(driver.sweep_on_cluster, address=address or None), {"executor": "ray"}
        flags |= {"address": address} if address else {}
    return Way(name or automatic, bool(name), precision, decide and several, run, flags)


def automatic_name(base: PruneSpec) -> str:
    """Return a study's name from what its points share: model, weights, criterion, and every setting that is not a default."""
    model = f"{base.model} ({Path(base.weights).stem})" if base.weights else base.model
    unusual = [n for n in (*PLAN_FIELDS, *MERGE_FIELDS, "precision") if getattr(base, n) != _DEFAULT[n]]
    return ", ".join([f"{model} {base.criterion}", *(f"{n} {getattr(base, n)}" for n in unusual)])


def pair(merges: Sequence[str]) -> tuple[str, str] | None:
    """Return the two merges whose difference is shown. The reader chooses among three or more. None for fewer than two."""
    if len(merges) < 2:
        return None
    second = "drop" if "drop" in merges else merges[0]
    first = next(merge for merge in merges if merge != second)
    if len(merges) == 2:
        return first, second
    left, right, _ = st.columns([1, 1, 2])
    first = left.selectbox("First merge", merges, merges.index(first), key="first_merge", bind=BIND)
    others = [merge for merge in merges if merge != first]
    if st.session_state.get("second_merge") not in others:
        st.session_state.pop("second_merge", None)
    default = others.index(second) if second in others else 0
    return first, right.selectbox("Second merge", others, default, key="second_merge", bind=BIND)


def matrices(
    results: Sequence[Result], merges: Sequence[str], groups: Sequence[str], sparsities: Sequence[float]
) -> dict[str, Matrix]:
    return {merge: sensitivity_matrix(results, merge, None, groups, sparsities) for merge in merges}


def heatmaps(made: Mapping[str, Matrix], both: tuple[str, str] | None, place: Place) -> None:
    """Draw one heatmap per merge and the difference of two. A click on a cell chooses it."""
    if both:
        first, second = (made[merge] for merge in both)
        clickable(sensitivity_panels(first, second, difference(first, second), place, parts.is_dark()), "panels")
    for merge, single in made.items():
        if not both or merge not in both:
            clickable(sensitivity_heatmap(single, place, parts.is_dark()), f"heatmap-{merge}")


def clickable(figure: Any, key: str) -> None:
    """Draw a figure. A click on a mark chooses the group, or the group and the sparsity, in its customdata."""
    st.plotly_chart(
        figure, key=key, config=parts.config(key), on_select=lambda: _pick(key), selection_mode="points", theme=None
    )


def _pick(key: str) -> None:
    """Set the sidebar's group and the sparsity control from the click."""
    points = st.session_state[key].selection.points
    if not points:
        return
    where = points[0]["customdata"]
    group, *cell = [where] if isinstance(where, str) else where
    st.session_state.group = group
    if cell:
        st.session_state.cell = round(100 * cell[0])


def cell_control(percents: Sequence[int]) -> float:
    """Return the chosen cell's sparsity, by default the largest. Clicks also set it, so it is part of the permalink."""
    if st.session_state.get("cell") not in percents:
        st.session_state.pop("cell", None)
    percent = st.segmented_control("Sparsity, %", sorted(percents), default=max(percents), required=True, key="cell", bind=BIND)
    return (percent or max(percents)) / 100


def cell_in_words(made: Mapping[str, Matrix], both: tuple[str, str] | None, place: Place) -> None:
    """Describe the chosen cell's results as text, and whether the difference of the merges is significant."""
    cells = {merge: single.cells[place] for merge, single in made.items() if place in single.cells}
    if not cells:
        st.caption("This cell is not measured yet.")
        return
    least = next(iter(cells.values())).least
    if not least.prunes:
        st.markdown(
            f"**Nothing was pruned**: all {least.channels:,} channels are kept, so this cell says nothing about the group."
        )
        return
    st.markdown(
        f"{least.channels:,} of {least.channels_before:,} channels are kept, with {least.params / least.params_before:.1%} of the "
        f"network's parameters and {least.macs / least.macs_before:.1%} of its MACs."
    )
    lines = [f"- **{merge}**: {with_interval(cell.accuracy, cell.interval)}" for merge, cell in cells.items()]
    count = min(cell.least.count for cell in cells.values())
    so_far = "" if all(cell.complete for cell in cells.values()) else f" of {least.total:,} so far"
    st.markdown("\n".join([*lines, f"- dense: {least.dense_accuracy:.1%}, all on {count:,} images{so_far}"]))
    if both and all(merge in cells for merge in both):
        first, second = (cells[merge].results[0] for merge in both)
        st.markdown(pair_in_words(paired(first, second), both))


def with_interval(accuracy: float, interval: tuple[float, float]) -> str:
    """Format an accuracy with its interval as text: "83.3% ± 0.7"."""
    return f"{accuracy:.1%} ± {50 * (interval[1] - interval[0]):.1f}"


def pair_in_words(found: Paired, names: tuple[str, str]) -> str:
    """Describe the difference of two merges on the same images as text, and whether it may be chance.

    On the first images only, the interval and the verdict are about all images of the study, see `Paired`.
    """
    low, high = (f"{100 * end:+.1f}".replace("-", "−") for end in found.interval)
    said = f"{100 * found.difference:+.1f}".replace("-", "−")
    where = "" if found.complete else f" for all {found.total:,} images"
    words = (
        f"**{names[0]} − {names[1]}: {said} points** (95 %{where}: {low} to {high}). Only {names[0]} is correct on "
        f"{found.only_first:,} images, only {names[1]} on {found.only_second:,}"
    )
    if found.complete:
        return words + (": a significant difference." if found.decided else ", which may be chance.")
    better = names[0] if found.difference > 0 else names[1]
    return words + (f": {better} is better on all images." if found.decided else ", which does not decide yet which is better.")


def comparison(
    study: Study, made: Mapping[str, Matrix], place: Place, kept: Store | None, rows: Mapping[str, StudyRow]
) -> None:
    """Draw this study beside a stored one of the same network, on the same images."""
    others = [name for name, row in rows.items() if name != study.name and _model(row) == study.base.model]
    if not others or kept is None:
        st.caption("Change a setting, such as the criterion, and run the study again to compare the two here.")
        return
    left, right = st.columns(2)
    if st.session_state.get("other_study") not in others:
        st.session_state.pop("other_study", None)
    other = left.selectbox("Stored study", others, key="other_study", bind=BIND, index=None, placeholder="choose a study")
    if other is None:
        return
    merge = right.selectbox("Merge", list(made), key="compared_merge", bind=BIND, index=len(made) - 1)
    try:
        theirs = newest(result for result in kept.results(other) if result.spec.merge == merge)
        ours = made[merge]
        both = difference(ours, sensitivity_matrix(theirs, merge, None, ours.groups, ours.sparsities))
        if any(result.older_code for result in theirs):
            st.caption(
                f"Some results of “{escaping.markdown(other)}” come from another code version. Run it again to compare like with like."
            )
        clickable(compare_studies(both, (study.name, other), place, parts.is_dark()), "compare")
    except IntrafusionError as error:
        messages.warning(error)


def newest(results: Iterable[Result]) -> list[Result]:
    """Return one result per point, from the current version of the code if available."""
    found: dict[PruneSpec, Result] = {}
    for result in results:
        if result.spec not in found or found[result.spec].older_code:
            found[result.spec] = result
    return list(found.values())


def _model(row: StudyRow) -> str | None:
    """Return the model of a stored study, or None if its text cannot be parsed."""
    try:
        return Study.from_toml(row.text).base.model
    except IntrafusionError:
        return None


def study_files(study: Study, rows: pd.DataFrame) -> None:
    """Draw downloads of the study as a file, which the command line can run again, and of its results as Parquet."""
    st.download_button(
        "Study file (TOML)",
        study.to_toml(),
        "study.toml",
        "text/plain",
        icon=":material/description:",
        on_click="ignore",
        help="`python -m intrafusion sweep --file study.toml` runs it again.",
    )
    st.download_button(
        "Data as Parquet",
        rows.to_parquet(index=False),
        "study.parquet",
        "application/octet-stream",
        icon=":material/table_view:",
        on_click="ignore",
    )
