"""The Overview page: the model's card, its groups, and its dense accuracy."""

import shlex

import pandas as pd
import streamlit as st

from intrafusion.pruning.groups.group import CONSUMER, PAD, coupling
from intrafusion.runtime import escaping
from intrafusion.runtime.access import public
from intrafusion.studies.session import Session
from pages.shared import background_jobs, job_panel, messages, open_model, parts
from pages.shared.navigation import enter_app

enter_app()
here: open_model.Here = st.session_state.here
card, session = here.session.card, here.session

prunable = [group for group in session.groups if group.reason is None]


def group_table(session: Session) -> pd.DataFrame:
    """Return one row per group: its channels, its size and cost, and why its layers are coupled or not prunable."""
    sizes = session.layers
    rows = []
    for group in session.groups:
        writers = [sizes[layer.name] for layer in group.layers if layer.role not in (CONSUMER, PAD) and layer.name in sizes]
        rows.append(
            {
                "group": group.name,
                "channels": group.size,
                "parameters": sum(size.params for size in writers),
                "MACs": sum(size.macs for size in writers),
                "prunable": group.reason is None,
                "why": group.reason or coupling(group),
            }
        )
    return pd.DataFrame(rows)


left_out = "".join(f", not counting {operator}" for operator in session.size.left_out)
st.page_link("pages/learn.py", label="New to this? Learn the method on six neurons", icon=":material/school:")
st.subheader("Channel groups, from input to output")
st.markdown(
    f"**{escaping.markdown(card.name)}** has {session.size.params:,} parameters and needs {session.size.macs / 1e6:,.1f} million multiply-accumulates "
    f"(MACs) per image{left_out}. {len(prunable)} of its {len(session.groups)} groups can be pruned."
)
st.caption(
    "The layers in a row share their channels, so they are pruned together. Sizes count the layers that produce the channels."
)
table = group_table(session)
st.dataframe(
    table,
    hide_index=True,
    height=min(38 + 35 * len(table), 560),
    column_config={
        "group": st.column_config.TextColumn(width="medium"),
        "parameters": st.column_config.NumberColumn(format="localized"),
        "MACs": st.column_config.NumberColumn(format="localized"),
        "why": st.column_config.TextColumn("coupled layers, or why not prunable", width="large"),
    },
)

left, right = st.columns(2)
with left:
    st.subheader("Model card")
    facts = {
        "Trained on": card.dataset,
        "Input": " × ".join(map(str, card.input_size)),
        "Classes": str(card.classes),
        "Normalisation": f"mean {', '.join(f'{m:g}' for m in card.mean)}; std {', '.join(f'{s:g}' for s in card.std)}",
        "Weights": public(card.source),
        "Licence": card.licence or "unknown",
        "Trained with": f"`{card.details['command']}`" if "command" in card.details else "not trained by this project",
    }
    st.markdown("\n".join(f"- **{name}**: {escaping.sentence(value)}" for name, value in facts.items()))
with right:
    st.subheader("Dense accuracy")
    if card.accuracy is not None:
        interval = card.details.get("interval")
        span = f", 95 % interval {interval[0]:.1%} to {interval[1]:.1%}" if interval else ""
        images = f" of {card.details['test_images']:,} test images" if "test_images" in card.details else ""
        st.markdown(f"The model card states **{card.accuracy:.1%}**{images}{span}.")
    key = ("dense", here.key(), here.spec.data_path)
    job = background_jobs.jobs().get(key)
    if job is not None and job.state == "done":
        (dense,) = job.results
        half = 100 * (dense.interval[1] - dense.interval[0]) / 2
        st.metric("Top-1 accuracy", f"{dense.accuracy:.1%} ± {half:.1f}", border=True)
        st.caption(
            f"Measured on {dense.count:,} images of {escaping.markdown(card.dataset)}, 95 % interval {dense.interval[0]:.1%} to {dense.interval[1]:.1%}"
        )
    elif job is not None and job.active:
        job_panel.watch_job(job, lambda: job_panel.progress_row(job, f"Measuring: {job_panel.words(job)}", "cancel_dense"))
    else:
        if job is not None and job.state == "failed":
            messages.error(messages.failure_reason(job))
        pressed = st.button("Measure accuracy", icon=":material/speed:", help="Uses at most 2,000 test images.")
        measured_on = open_model.measuring(here, 2000) if pressed else None
        if measured_on is not None:
            background_jobs.start_job(key, 1, lambda: iter([measured_on.dense(2000)]), f"dense accuracy of {card.name}")
            st.rerun()

given = ["--weights", here.spec.weights] if here.spec.weights else []
command = shlex.join(["python", "-m", "intrafusion", "groups", "--model", card.name, *given])
weights = f", weights={here.spec.weights!r}" if here.spec.weights else ""
snippet = (
    f"import intrafusion as itf\n\nmodel = itf.load_model({card.name!r}{weights})\n"
    "for group in itf.find_groups(model, model.card.example()):\n    print(group.name, group.size, group.reason)"
)
parts.take_away("", table, command, snippet, ())
