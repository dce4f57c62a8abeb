"""Parts of the page Your own: an uploader each for programs, weights and images, and the list of what is kept."""

import secrets
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import streamlit as st
from streamlit.runtime.scriptrunner import get_script_run_ctx

from intrafusion import IntrafusionError
from intrafusion.data.arrays import LAYOUTS, Reading
from intrafusion.data.datasets import DATASETS, OWN, kept_data
from intrafusion.data.upload import PICTURES, SIDE, about, data_steps
from intrafusion.models.hub import describe, kept_names, kept_told, model_names
from intrafusion.models.weights_file import SUFFIXES
from intrafusion.runtime import escaping as text
from intrafusion.runtime.access import UPLOADS, check_room, check_share, is_public, public, takes_programs, upload_mib
from intrafusion.runtime.jobs import Job
from intrafusion.runtime.log import event
from intrafusion.runtime.safe_zip import FILE, MIB, UNPACKED
from intrafusion.runtime.sandbox import Step
from intrafusion.runtime.staging import IMAGES, NETWORKS, RUNS, Workshop, free_path
from intrafusion.studies.uploads import remove, safe_name
from intrafusion.studies.uploads.networks import program_steps, weights_steps
from intrafusion.training.methods.runs import damaged
from pages.shared import background_jobs, job_panel, messages, parts
from pages.shared.background_jobs import reader_address
from pages.shared.open_model import Here

_KINDS = {NETWORKS: "", IMAGES: "images: ", RUNS: "training lab run: "}
Begin = Callable[[Workshop, Callable[[str], None]], Generator[Step, None, str]]  # starts a check of files


@dataclass(frozen=True)
class Kept:
    """The outcome of a successful check: the kept name, and notes for the reader."""

    name: str
    notes: tuple[str, ...]


def _bound() -> str:
    if is_public():
        return f"At most {upload_mib()} MiB, and {UPLOADS} files per minute."
    return f"At most {FILE // MIB} MiB."


def _most() -> int | None:
    """Return the upload limit in MiB, or None for the limit in the server's configuration."""
    return upload_mib() if is_public() else None


def program() -> None:
    """Draw the uploader for a torch.export program."""
    st.subheader("Exported program")
    st.caption(f"A `.pt2` file from `torch.export.save`: an image classifier, exported in eval mode. {_bound()}")
    with st.expander("How to export one", icon=":material/code:"):
        st.code(_EXPORT, language="python")
    if not takes_programs():
        st.caption("This server does not accept programs. Its operator can enable them with `INTRAFUSION_PROGRAMS=1`.")
        return
    file = st.file_uploader(
        "Program", type="pt2", key=_uploader("program"), label_visibility="collapsed", max_upload_size=_most()
    )
    row = st.columns(2)
    name = row[0].text_input("Name", _proposed(file), key=f"own_program_name {_proposed(file)}", placeholder="my-net")
    data = row[1].selectbox(
        "Trained on",
        [*dict.fromkeys([OWN, *kept_data(), *DATASETS])],
        key="own_program_data",
        help="Sets the images on which the pages measure it, and the normalisation unless you enter one.",
    )
    mean, std = (
        place.text_input(
            label,
            key=f"own_program_{label}",
            placeholder="default for the data",
            help="One number per channel, for example 0.485, 0.456, 0.406, for pixels from 0 to 1.",
        )
        for place, label in zip(st.columns(2), ("Mean", "Standard deviation"), strict=True)
    )

    def ask() -> Begin:
        own = {"mean": _numbers("mean", mean), "std": _numbers("standard deviation", std)}
        free_path(NETWORKS, name.strip())
        return lambda workshop, tell: program_steps(workshop, name.strip(), data, **own, tell=tell)

    _button("program", [file] if file else [], ask, "model")


def weights(here: Here) -> None:
    """Draw the uploader for weights of a known architecture."""
    st.subheader("Weights file")
    st.caption(f"A state dict, possibly nested, in {', '.join(f'`{end}`' for end in SUFFIXES)}. {_bound()}")
    file = st.file_uploader(
        "Weights",
        type=[end[1:] for end in SUFFIXES],
        key=_uploader("weights"),
        label_visibility="collapsed",
        max_upload_size=_most(),
    )
    row = st.columns([3, 4, 3])
    name = row[0].text_input("Name", _proposed(file), key=f"own_weights_name {_proposed(file)}", placeholder="my-weights")
    known = [one for one in model_names() if not one.startswith(("kept/", "timm/"))]
    model = row[1].selectbox(
        "Architecture",
        known,
        index=known.index(here.spec.model) if here.spec.model in known else 0,
        key="own_weights_model",
    )
    which = row[2].text_input(
        "Weights key",
        key="own_weights_key",
        placeholder="default",
        help="Selects one of several sets of weights in the file, for example `model_ema` or `model.state_dict`.",
    )

    def ask() -> Begin:
        free_path(NETWORKS, name.strip())
        return lambda workshop, tell: weights_steps(workshop, model, name.strip(), which.strip() or None, tell)

    _button("weights", [file] if file else [], ask, "model")


def images() -> None:
    """Draw the uploader for labelled images."""
    st.subheader("Labelled images")
    st.caption(
        f"An `.npz` with `images` (N × H × W × channels, at most {SIDE} pixels per side), `labels` and optionally `classes`; two "
        "such files, `x_train.npz` and `x_test.npz`; or a `.zip` with one folder of images per class, optionally below `train` and "
        f"`test` (at most {PICTURES:,} images). {_bound()} At most {UNPACKED // MIB:,} MiB unpacked."
    )
    files = st.file_uploader(
        "Images",
        type=["npz", "zip"],
        accept_multiple_files=True,
        key=_uploader("images"),
        label_visibility="collapsed",
        max_upload_size=_most(),
    )
    proposed = _proposed(files[0] if files else None)
    name = st.text_input("Name", proposed, key=f"own_images_name {proposed}", placeholder="my-images")

    with st.expander("Array layout and range", icon=":material/tune:"):
        row = st.columns(2)
        layout = row[0].selectbox(
            "Layout",
            LAYOUTS,
            index=None,
            key="own_images_layout",
            placeholder="from the shape",
            help="Channels last (nhwc) or first (nchw), if the shape is ambiguous.",
        )
        span = row[1].text_input(
            "Range",
            key="own_images_range",
            placeholder="from the values",
            help="The values of black and of white, for example 0, 16, if the values are ambiguous.",
        )

    def ask() -> Begin:
        reading = _reading(layout, span)
        free_path(IMAGES, name.strip())
        return lambda workshop, tell: data_steps(workshop, name.strip(), reading, tell)

    _button("images", files, ask, "data")


def _reading(layout: str | None, span: str) -> Reading:
    values = _numbers("range", span)
    if values is not None and len(values) != 2:
        raise IntrafusionError(f"the range must be two numbers, the values of black and of white, not {span[:60]!r}")
    return Reading(layout, None if values is None else (values[0], values[1]))


def from_code() -> None:
    """Show how to use a network made by code, which no page runs. Draw nothing on a public server."""
    if is_public():
        return
    st.subheader("A network defined in code")
    st.caption("Code runs only from the command line, never from this page.")
    st.code(
        "python -m intrafusion curve --model my_net:make --data own --data-path my.npz",
        language="bash",
        wrap_lines=True,
    )


def _proposed(file: Any) -> str:
    return safe_name(file.name) if file is not None else ""


def _numbers(what: str, text: str) -> list[float] | None:
    if not text.strip():
        return None
    try:
        return [float(word) for word in text.replace(",", " ").split()]
    except ValueError as error:
        raise IntrafusionError(f"the {what} must be numbers, such as 0.485, 0.456, 0.406, not {text[:60]!r}") from error


def _uploader(what: str) -> str:
    """Return the key of an uploader. It changes after each check, so that the uploader is empty again."""
    return f"own_{what} {st.session_state.get(f'own_{what}_checks', 0)}"


def _button(what: str, files: Sequence[Any], ask: Callable[[], Begin], opens: str) -> None:
    """Draw the button that checks and keeps the uploaded files in a job, its progress, and then its outcome.

    The outcome is a button that opens what was kept, or one line on what was wrong.
    """
    job = _job(what)
    if st.button(
        "Check and save",
        key=f"own_{what}_take",
        type="primary",
        icon=":material/verified_user:",
        disabled=not files or (job is not None and job.active),
    ):
        try:
            check_room()
            check_share(reader_address(), sum(file.size for file in files))
            _start(what, files, ask())
            st.rerun()
        except IntrafusionError as error:
            event("upload refused", what=what, reason=str(error))
            messages.error(error)
    elif job is not None and job.active:
        _watch(what, job)
    elif job is not None and job.state == "failed":
        messages.error(messages.failure_reason(job))
    elif job is not None and job.state == "cancelled":
        st.caption("Cancelled. Nothing was saved.")
    elif job is not None:
        _done(what, job.results[-1], opens)


def _job(what: str) -> Job | None:
    """Return the reader's last check of a kind, even after a reload: the address contains its unguessable mark."""
    name = f"check_{what}"
    mark = st.session_state.get(f"own_{name}") or st.query_params.get(name)
    if not mark:
        return None
    st.session_state[f"own_{name}"] = st.query_params[name] = mark
    if "link" in st.session_state:
        st.session_state.link.asked.pop(name, None)  # not a setting, so not a part of the link to report
    return background_jobs.jobs().get(("own", what, mark))


def _start(what: str, files: Sequence[Any], begin: Begin) -> None:
    """Pass the files to a job. The job waits for no turn: it computes in another process, and few of these run at a time."""
    workshop, mark = Workshop(), secrets.token_hex(16)
    try:
        for file in files:
            workshop.give(f"{safe_name(file.name)}{Path(file.name).suffix.lower()[:16]}", file.getbuffer())
        title = f"check of {', '.join(path.name for path in workshop.given)}"
        background_jobs.start_job(
            ("own", what, mark), 1, lambda: _check(what, workshop, begin), title, part=_share, computes=False
        )
    except IntrafusionError:
        workshop.close()
        raise
    st.session_state[f"own_check_{what}"] = mark
    _free(what, files)


def _free(what: str, files: Sequence[Any]) -> None:
    """Remove uploaded files from the server's memory and from their uploader."""
    st.session_state[f"own_{what}_checks"] = st.session_state.get(f"own_{what}_checks", 0) + 1
    if context := get_script_run_ctx():
        for file in files:
            context.uploaded_file_mgr.remove_file(context.session_id, file.file_id)


def _check(what: str, workshop: Workshop, begin: Begin) -> Iterator[Step | Kept]:
    """Run the check as a job: yield its steps, and finally what was kept."""
    notes: list[str] = []
    try:
        with workshop:
            name = yield from begin(workshop, notes.append)
    except IntrafusionError as error:
        event("upload refused", what=what, reason=str(error))
        raise
    event("upload kept", what=what, name=name)
    yield Kept(name, tuple(notes))


def _share(result: Step | Kept) -> tuple[str, float]:
    """Return one part key for all results, since only the last is needed, and the fraction of the work done."""
    return "", 1.0 if isinstance(result, Kept) else 0.9 * result[0] / max(1, result[1])


def _watch(what: str, job: Job) -> None:
    def draw() -> None:
        with st.container(horizontal=True, vertical_alignment="center", gap="small"):
            st.progress(job.share or 0.0, f"Checking  \n:gray[{job_panel.words(job)}]", width="stretch")
            job_panel.cancel_button(job, f"own_{what}_cancel", icon=":material/stop:")

    job_panel.watch_job(job, draw)


def _done(what: str, kept: Kept, opens: str) -> None:
    """Show that something is kept, and offer to open it."""
    name = kept.name
    if name not in (kept_names() if opens == "model" else kept_data()):
        return
    st.success(f"Saved as **{name}**.", icon=":material/check:")
    for line in kept_told(name) if opens == "model" else kept.notes:
        messages.info(line)
    if st.session_state.get(opens) != name:
        label = "Open this network" if opens == "model" else "Use these images"
        st.button(label, key=f"own_{what}_open", icon=":material/arrow_back:", on_click=_choose, args=(opens, name))
        return
    with st.container(horizontal=True, vertical_alignment="center"):
        st.markdown("It is selected in the sidebar.", width="content")
        for page, label in (("overview", "Overview"), ("transport", "Transport"), ("curves", "Curves")):
            st.page_link(f"pages/{page}.py", label=label, width="content")


def _choose(key: str, name: str) -> None:
    """Set the sidebar's choice before the next draw."""
    st.session_state[key] = name
    for other in ("weights", "data_path", "group") if key == "model" else ("data_path",):
        st.session_state.pop(other, None)


def kept() -> None:
    """List what is kept, with buttons to remove it."""
    st.subheader("Saved on this machine")
    found = [(NETWORKS, name, public(describe(name)["summary"])) for name in kept_names()]
    found += [(IMAGES, name, public(about(name))) for name in kept_data()]
    found += [(RUNS, name, public(why)) for name, why in damaged().items()]
    if not found:
        st.caption("Nothing is saved yet. Networks saved on other pages appear here, too.")
        return
    for kind, name, words in found:
        with st.container(horizontal=True, vertical_alignment="center"):
            st.markdown(f"**{name}**  \n:gray[{_KINDS[kind]}{text.markdown(words)}]", width="stretch")
            if is_public():
                continue  # it may belong to others
            with st.popover("Remove", icon=":material/delete:"):
                st.write(f"Remove {name} permanently?")
                if st.button("Remove permanently", key=f"own_remove {kind} {name}", type="primary"):
                    _remove(kind, name)
                    st.rerun()


def _remove(kind: str, name: str) -> None:
    try:
        remove(kind, name)
    except IntrafusionError as error:  # someone else has removed it
        st.toast(text.sentence(public(str(error))))


def same_steps() -> None:
    """Draw the same steps as a command line and as Python code."""
    table = pd.DataFrame([{"kept": name} for name in (*kept_names(), *kept_data())], columns=["kept"])
    line = "python -m intrafusion own program my_net.pt2 --name mine --data own"
    snippet = (
        "from pathlib import Path\nfrom intrafusion.studies.uploads import take_data, take_program, take_weights\n\n"
        'take_program(Path("my_net.pt2"), "mine")\ntake_data([Path("my.npz")], "mine")\n'
        'take_weights(Path("w.safetensors"), "digits-mlp", "my-mlp")'
    )
    parts.take_away("your_own", table, line, snippet, ())


_EXPORT = """import torch

batch = torch.export.Dim("batch", min=1, max=4096)
program = torch.export.export(model.eval(), (torch.zeros(2, 3, 32, 32),), dynamic_shapes=({0: batch},))
torch.export.save(program, "my_net.pt2")"""
