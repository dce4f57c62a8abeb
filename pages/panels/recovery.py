"""Parts of the Recovery page: the controls, the runs so far, the table of results, and the similarity matrices."""

from collections.abc import Sequence
from typing import Any

import pandas as pd
import streamlit as st

from intrafusion import PruneSpec, registry
from intrafusion.reporting.figures.recovery import similarity_panels
from intrafusion.runtime.jobs import Job
from intrafusion.studies.measurement import Result
from intrafusion.studies.recovery_comparison import (
    Alike,
    Row,
    Run,
    compare_image_similarity,
    compare_recoveries,
    known_run,
    layers_to_compare,
)
from intrafusion.studies.relevant_fields import trains
from intrafusion.studies.session import Session
from intrafusion.studies.store.sqlite import Store
from intrafusion.studies.sweeps import Failure
from intrafusion.training.recovery.methods import COSTLIER
from pages.shared import background_jobs, parts, studying
from pages.shared.links import BIND
from pages.shared.open_model import Here

KEYS = (
    "recovery_merge", "criterion", "sparsity", "recovery_scope", "methods", "seeds", "recovery_limit", "equal", "epochs",
    "training", "rate", "patience", "ratio", "gamma", "rank", "against", "looked_at", "alike_layer",
)  # fmt: skip
_DEFAULT = ["none", "bn-reset", "perp", "finetune", "overparam-sp"]
_DEFAULT_PLAIN = ["none", "repair", "perp", "finetune", "overparam-sp"]  # for a network without BatchNorm
_TRAINS = 0.9  # training's share of the work of a point


def controls(here: Here) -> tuple[PruneSpec, int, list[str], bool]:
    """Draw the page's first rows: the pruned network and its recoveries.

    Returns the spec, the number of seeds, the methods, and whether to run at equal compute as well.
    """
    grid = st.grid(4, min_column_width=180)
    entries = registry("merge")
    merge = grid.selectbox(
        "Merge",
        list(entries),
        index=list(entries).index("fusion"),
        key="recovery_merge",
        bind=BIND,
        help=parts.methods_help("merge"),
    )
    names = list(registry("criterion"))
    criterion = grid.selectbox("Importance criterion", names, index=names.index("l1"), key="criterion", bind=BIND)
    scope = grid.segmented_control(
        "Prune", ["all groups", "this group"], default="all groups", required=True, key="recovery_scope", bind=BIND
    )
    percent = grid.slider("Sparsity", 5, 95, 50, 5, format="%d %%", key="sparsity", bind=BIND)
    row = st.container(horizontal=True)
    norms = any(layer.norm for group in here.session.groups for layer in group.layers)
    methods = row.multiselect(
        "Recovery methods",
        list(registry("recovery")),
        default=_DEFAULT if norms else _DEFAULT_PLAIN,
        key="methods",
        bind=BIND,
        width="stretch",
        help=parts.methods_help("recovery"),
    )
    seeds = row.segmented_control(
        "Seeds",
        [1, 2, 3],
        default=1,
        required=True,
        key="seeds",
        bind=BIND,
        help="Every method runs once per seed.",
    )
    limit = row.selectbox(
        "Test images",
        ["500", "2000", "10000", "all"],
        index=1,
        key="recovery_limit",
        bind=BIND,
        width=110,
        help="The results are measured on these images. They are not used for model selection.",
    )
    equal = st.toggle(
        "Also at equal compute",
        value=True,
        key="equal",
        bind=BIND,
        help="Over-parameterization and distillation cost more per step. This also runs them with only as many "
        "multiply-accumulates as plain fine-tuning needs.",
    )
    groups: Any = "all" if (scope or "all groups") == "all groups" else here.spec.groups
    spec = here.spec.but(
        merge=merge,
        criterion=criterion,
        sparsity=percent / 100,
        groups=groups,
        limit=None if limit == "all" else int(limit),
    )
    return spec, int(seeds or 1), methods, equal


def training_controls() -> dict[str, Any]:
    """Draw the settings of training and return the spec's fields that they set."""
    grid = st.grid(4, min_column_width=180)
    epochs = grid.number_input(
        "Epochs", 0.1, 200.0, 5.0, 1.0, format="%g", key="epochs", bind=BIND, help="Passes over the training images."
    )
    training = grid.selectbox(
        "Training images",
        ["1000", "5000", "20000", "all"],
        index=1,
        key="training",
        bind=BIND,
        help="A tenth of them, at most 1,000, is held out to choose the learning rate and the best checkpoint.",
    )
    rate = grid.number_input(
        "Peak learning rate",
        0.0,
        2.0,
        None,
        0.01,
        format="%g",
        key="rate",
        bind=BIND,
        placeholder="automatic",
        help="If empty, short training runs find the best rate for each method.",
    )
    patience = grid.number_input(
        "Patience",
        0,
        25,
        None,
        1,
        key="patience",
        bind=BIND,
        placeholder="no early stopping",
        help="Early stopping: evaluations on held-out images, 25 per run, without a lower loss.",
    )
    ratio = grid.number_input(
        "Over-parameterization",
        1.0,
        8.0,
        2.0,
        1.0,
        format="%g",
        key="ratio",
        bind=BIND,
        help="How many times wider the inner factors are. Reconstructed, because the paper's ratio and schedule are unknown.",
    )
    gamma = grid.number_input(
        "Similarity weight",
        0.0,
        1000.0,
        100.0,
        10.0,
        format="%g",
        key="gamma",
        bind=BIND,
        help="Weight of the loss that compares the similarities between images.",
    )
    rank = grid.number_input("Low-rank update rank", 1, 64, 8, 1, key="rank", bind=BIND)
    return {
        "epochs": float(epochs),
        "training": None if training == "all" else int(training),
        "rate": rate or None,
        "patience": patience,
        "ratio": float(ratio),
        "gamma": float(gamma),
        "rank": int(rank),
    }


def specs(base: PruneSpec, methods: Sequence[str], seeds: int, equal: bool) -> list[PruneSpec]:
    """Return a spec for each method and seed, and another at equal compute for the costlier methods."""
    found = []
    for name in methods:
        spec = base.but(recovery=name)
        for seed in range(seeds):
            found.append(spec.but(seed=seed))
            if equal and name in COSTLIER:
                found.append(spec.but(seed=seed, budget="compute"))
    return found


def lookers(specs: Sequence[PruneSpec]) -> list[PruneSpec]:
    """Return the first spec whose recovery needs images, or the first spec if none does, as a list of at most one."""
    return [spec for spec in specs if registry("recovery")[spec.recovery].needs != "nothing"][:1] or list(specs[:1])


def forecast(specs: Sequence[PruneSpec]) -> str:
    count = sum(map(trains, specs))
    return f"Trains {count} networks in the background." if count else "Computes a few statistics; nothing is trained."


def known_runs(specs: Sequence[PruneSpec], session: Session, job: Job | None) -> list[Run]:
    """Return the known training runs of the specs, running or finished, in the order of the specs."""
    found = {run.spec: run for run in (job.results if job else ()) if isinstance(run, Run)}
    for spec in specs:
        if trains(spec) and spec not in found and (run := known_run(spec, session)) is not None:
            found[spec] = run
    return [found[spec] for spec in specs if spec in found]


def start_recovery(key: tuple, specs: Sequence[PruneSpec], session: Session, kept: Store | None, title: str) -> Job:
    """Recover and measure in the background. Rerun the page afterwards."""

    def part(result: Run | Result | Failure) -> tuple[Any, float]:
        if isinstance(result, Run):
            return ("run", result.spec), _TRAINS * result.share
        return result.spec, studying.share(result) * (1 - _TRAINS if trains(result.spec) else 1.0)

    return background_jobs.start_job(key, len(specs), lambda: compare_recoveries(specs, session, kept), title, part=part)


def answer(rows: Sequence[Row], methods: Sequence[str], session: Session, known: dict[PruneSpec, Result]) -> None:
    """Draw the table of results: accuracy without recovery and with each method, and the cost of each."""
    if not rows:
        st.caption("Accuracy without recovery and with each method, and the costs, appear here.")
        return
    dense = next(iter(known.values())).dense_accuracy
    equal = {row.recovery: row for row in rows if row.budget == "compute"}
    table = [_line(row, equal.get(row.recovery)) for row in rows if row.budget == "epochs"]
    table.sort(key=lambda line: list(methods).index(line["recovery"]))
    columns = pd.DataFrame(table).dropna(axis=1, how="all").astype(object).fillna("–")
    seeds, images = max(row.seeds for row in rows), min(row.count for row in rows)
    spread = f"95 % interval over {seeds} seeds" if seeds > 1 else "95 % interval"
    st.caption(f"Top-1 accuracy on {images:,} test images, {spread}. Dense: {dense:.1%}.")
    st.dataframe(columns.astype(str), hide_index=True, column_config={"recovery": st.column_config.TextColumn(width=120)})
    if any(registry("recovery")[row.recovery].reconstructed for row in rows):
        st.caption("Over-parameterization is :orange-badge[reconstructed], because the paper's ratio and schedule are unknown.")


def _line(row: Row, equal: Row | None) -> dict[str, Any]:
    facts, moments = (row.run.facts, row.run.moments) if row.run else (None, ())
    return {
        "recovery": row.recovery,
        "accuracy": _accuracy(row),
        "at equal compute": _accuracy(equal) if equal else None,
        "trainable parameters": f"{facts.trainable:,}" if facts else None,
        "training memory": f"{facts.memory / 1e6:,.1f} MB" if facts else None,
        "learning rate": f"{facts.rate:.2g}" if facts else None,
        "steps": f"{moments[-1].step:,}" if moments else None,
        "seconds": f"{moments[-1].seconds:.1f}" if moments else None,
        "rate search, s": f"{facts.tuning:.1f}" if facts else None,
        "MACs per step and image": f"{facts.macs:,}" if facts else None,
        "precision, device": facts.where or None if facts else None,
    }


def _accuracy(row: Row) -> str:
    return f"{row.accuracy:.1%} ± {50 * (row.interval[1] - row.interval[0]):.1f}"


def similarities(session: Session, base: PruneSpec, done: Sequence[PruneSpec]) -> None:
    """Draw the similarity matrices of a layer: of the dense network, of the pruned one, and after a recovery."""
    st.markdown(
        "Similarity of each pair of some training images in the features of one layer, sorted by class. Stronger teal means more "
        "similar, stronger amber less. Similarity-preserving distillation fits the student's matrix to the teacher's."
    )
    row = st.container(horizontal=True)
    names = list(dict.fromkeys(spec.recovery for spec in done if spec.recovery != "none" and spec.budget == "epochs"))
    if not names:
        st.caption("Choose a recovery method other than none.")
        return
    name = row.selectbox("Recovery", names, index=len(names) - 1, key="looked_at", bind=BIND, width=220)
    layers = layers_to_compare(session)
    layer = row.selectbox("Layer", layers, index=len(layers) - 1, key="alike_layer", bind=BIND, width=260)
    found = _alike(session, base.but(recovery=name, seed=0), layer)
    parts.chart(similarity_panels(found, name, parts.is_dark()), "alike")


@st.cache_data(max_entries=32, show_spinner="Comparing the images")
def _alike(_session: Session, spec: PruneSpec, layer: str) -> Alike:
    return compare_image_similarity(spec, _session, layer)
