"""The pieces of the page Your own: an uploader each for programs, weights and images, and what is kept."""

import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pandas as pd
import streamlit as st

from intrafusion import IntrafusionError, text
from intrafusion.access import UPLOADS, check_room, is_public, public, upload_mib
from intrafusion.archives import FILE, MIB, UNPACKED
from intrafusion.arrays import LAYOUTS, Reading
from intrafusion.checkpoints import SUFFIXES
from intrafusion.data import DATASETS, OWN, kept_data
from intrafusion.log import event
from intrafusion.own import remove, safe_name, take_data, take_program, take_weights
from intrafusion.own.images import PICTURES, SIDE, splits
from intrafusion.own.place import IMAGES, NETWORKS
from intrafusion.zoo import describe, kept_names, kept_told, model_names
from pages.common import parts, telling
from pages.common.shell import Here


def _bound() -> str:
    if is_public():
        return f"At most {upload_mib()} MiB, and {UPLOADS} files a minute."
    return f"At most {FILE // MIB} MiB."


def _most() -> int | None:
    """MiB that an uploader takes; None for what the server's configuration says."""
    return upload_mib() if is_public() else None


def program() -> None:
    """Upload a program of torch.export."""
    st.subheader("A program of torch.export")
    st.caption(f"A `.pt2` file of `torch.export.save`, of a classifier of images, exported in eval mode. {_bound()}")
    with st.expander("How to make one", icon=":material/code:"):
        st.code(_EXPORT, language="python")
    file = st.file_uploader(
        "Program", type="pt2", key="own_program", label_visibility="collapsed", max_upload_size=_most()
    )
    row = st.columns(2)
    name = row[0].text_input("Name", _proposed(file), key=f"own_program_name {_proposed(file)}", placeholder="my-net")
    data = row[1].selectbox(
        "Trained on", [*dict.fromkeys([OWN, *kept_data(), *DATASETS])], key="own_program_data",
        help="Decides the normalisation, unless you give one, and the images that the pages measure it on.",
    )  # fmt: skip
    mean, std = (
        place.text_input(
            label, key=f"own_program_{label}", placeholder="usual for the data",
            help="One number a channel, as 0.485, 0.456, 0.406, on pixels from 0 to 1.",
        )
        for place, label in zip(st.columns(2), ("Mean", "Standard deviation"), strict=True)
    )  # fmt: skip

    def take(paths: Sequence[Path]) -> str:
        return take_program(paths[0], name.strip(), data, _numbers("mean", mean), _numbers("standard deviation", std))

    _button("program", [file] if file else [], take, "model")


def weights(here: Here) -> None:
    """Upload weights of an architecture that is known here."""
    st.subheader("Weights of a known architecture")
    st.caption(f"A state dict, perhaps wrapped, in {', '.join(f'`{end}`' for end in SUFFIXES)}. {_bound()}")
    file = st.file_uploader(
        "Weights",
        type=[end[1:] for end in SUFFIXES],
        key="own_weights",
        label_visibility="collapsed",
        max_upload_size=_most(),
    )
    row = st.columns(3)
    name = row[0].text_input(
        "Name", _proposed(file), key=f"own_weights_name {_proposed(file)}", placeholder="my-weights"
    )
    known = [one for one in model_names() if not one.startswith(("kept/", "timm/"))]
    model = row[1].selectbox(
        "Architecture",
        known,
        index=known.index(here.spec.model) if here.spec.model in known else 0,
        key="own_weights_model",
    )
    which = row[2].text_input(
        "Weights key", key="own_weights_key", placeholder="the plain ones",
        help="Which weights of the file, where it has several, as `model_ema` or `model.state_dict`.",
    )  # fmt: skip

    def take(paths: Sequence[Path]) -> str:
        return take_weights(paths[0], model, name.strip(), which.strip() or None)

    _button("weights", [file] if file else [], take, "model")


def images() -> None:
    """Upload labelled images."""
    st.subheader("Labelled images")
    st.caption(
        f"An `.npz` with `images` (N × H × W × channels, at most {SIDE} pixels a side), `labels` and perhaps `classes`; "
        "two of them, `x_train.npz` and `x_test.npz`; or a `.zip` with a folder of pictures a class, perhaps below `train` and "
        f"`test` (at most {PICTURES:,} pictures). {_bound()} Unpacked, at most {UNPACKED // MIB:,} MiB."
    )
    files = st.file_uploader(
        "Images",
        type=["npz", "zip"],
        accept_multiple_files=True,
        key="own_images",
        label_visibility="collapsed",
        max_upload_size=_most(),
    )
    proposed = _proposed(files[0] if files else None)
    name = st.text_input("Name", proposed, key=f"own_images_name {proposed}", placeholder="my-images")

    with st.expander("Arrays that may be read in several ways", icon=":material/tune:"):
        row = st.columns(2)
        layout = row[0].selectbox(
            "Layout", LAYOUTS, index=None, key="own_images_layout", placeholder="as the shape says",
            help="Channels last (nhwc) or first (nchw), where the shape leaves it open.",
        )  # fmt: skip
        span = row[1].text_input(
            "Range", key="own_images_range", placeholder="as the numbers say",
            help="The values of black and of white, as 0, 16, where the numbers leave it open.",
        )  # fmt: skip

    def take(paths: Sequence[Path]) -> str:
        bar, notes = st.progress(0.0, "Reading"), []
        try:
            kept = take_data(
                paths, name.strip(), lambda done, total: _tell(bar, done, total), _reading(layout, span), notes.append
            )
            st.session_state.own_notes = notes
            return kept
        finally:
            bar.empty()

    _button("images", files, take, "data")


def _reading(layout: str | None, span: str) -> Reading:
    values = _numbers("range", span)
    if values is not None and len(values) != 2:
        raise IntrafusionError(f"a range is two numbers, the values of black and of white, not {span[:60]!r}")
    return Reading(layout, None if values is None else (values[0], values[1]))


def _tell(bar: Any, done: int, total: int) -> None:
    if done % 50 == 0 or done == total:
        bar.progress(done / total, f"Reading pictures: {done:,} of {total:,}")


def from_code() -> None:
    """How code, which no page runs, gets its network in: for the person at this machine."""
    if is_public():
        return
    st.subheader("A network made by code")
    st.caption("Code runs from a terminal alone, never from this page.")
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
        raise IntrafusionError(f"{what} must be numbers, as 0.485, 0.456, 0.406, not {text[:60]!r}") from error


@contextmanager
def _on_disk(files: Sequence[Any]) -> Iterator[list[Path]]:
    """Uploaded files in a folder that is gone in the end, under names that are safe."""
    with tempfile.TemporaryDirectory(prefix="intrafusion-upload-") as folder:
        paths = []
        for file in files:
            path = Path(folder) / f"{safe_name(file.name)}{Path(file.name).suffix.lower()[:16]}"
            path.write_bytes(file.getbuffer())
            paths.append(path)
        yield paths


def _button(what: str, files: Sequence[Any], take: Callable[[Sequence[Path]], str], opens: str) -> None:
    """Check and keep what was uploaded; afterwards a button that opens it, or one line of what was wrong."""
    said = st.session_state.setdefault("own_taken", {})
    if st.button(
        "Check and keep", key=f"own_{what}_take", type="primary", disabled=not files, icon=":material/verified_user:"
    ):
        said.pop(what, None)
        try:
            check_room()
            with st.spinner("Checking"), _on_disk(files) as paths:
                said[what] = take(paths)
            event("upload kept", what=what, name=said[what])
        except IntrafusionError as error:
            event("upload refused", what=what, reason=str(error))
            telling.error(error)
    name = said.get(what)
    if name is None or name not in (kept_names() if opens == "model" else kept_data()):
        return
    st.success(f"Kept as **{name}**.", icon=":material/check:")
    told = kept_told(name) if opens == "model" else st.session_state.get("own_notes", ()) if what == "images" else ()
    for line in told:
        telling.info(line)
    if st.session_state.get(opens) != name:
        label = "Open it" if opens == "model" else "Use these images"
        st.button(label, key=f"own_{what}_open", icon=":material/arrow_back:", on_click=_choose, args=(opens, name))
        return
    with st.container(horizontal=True, vertical_alignment="center"):
        st.markdown("It is chosen in the sidebar.", width="content")
        for page, label in (("overview", "Overview"), ("transport", "Transport"), ("curves", "Curves")):
            st.page_link(f"pages/{page}.py", label=label, width="content")


def _choose(key: str, name: str) -> None:
    """Set the sidebar, before it is drawn again."""
    st.session_state[key] = name
    for other in ("weights", "data_path", "group") if key == "model" else ("data_path",):
        st.session_state.pop(other, None)


def kept() -> None:
    """What is kept, and a way to remove it."""
    st.subheader("Kept on this machine")
    found = [(NETWORKS, name, describe(name)["summary"]) for name in kept_names()]
    found += [(IMAGES, name, ", ".join(f"{n:,} {split}" for split, n in splits(name).items())) for name in kept_data()]
    if not found:
        st.caption("Nothing yet. Networks that the Training lab keeps come here, too.")
        return
    for kind, name, about in found:
        with st.container(horizontal=True, vertical_alignment="center"):
            st.markdown(
                f"**{name}**  \n:gray[{'images: ' if kind == IMAGES else ''}{text.markdown(about)}]", width="stretch"
            )
            if is_public():
                continue  # of others
            with st.popover("Remove", icon=":material/delete:"):
                st.write(f"Remove {name} for good?")
                if st.button("Remove it", key=f"own_remove {kind} {name}", type="primary"):
                    _remove(kind, name)
                    st.rerun()


def _remove(kind: str, name: str) -> None:
    try:
        remove(kind, name)
    except IntrafusionError as error:  # somebody else did
        st.toast(text.sentence(public(str(error))))


def take_away() -> None:
    """The same from a terminal and from Python."""
    table = pd.DataFrame([{"kept": name} for name in (*kept_names(), *kept_data())], columns=["kept"])
    line = "python -m intrafusion own program my_net.pt2 --name mine --data own"
    snippet = (
        "from pathlib import Path\nfrom intrafusion.own import take_data, take_program, take_weights\n\n"
        'take_program(Path("my_net.pt2"), "mine")\ntake_data([Path("my.npz")], "mine")\n'
        'take_weights(Path("w.safetensors"), "digits-mlp", "my-mlp")'
    )
    parts.take_away("your_own", table, line, snippet, ())


_EXPORT = """import torch

batch = torch.export.Dim("batch", min=1, max=4096)
program = torch.export.export(model.eval(), (torch.zeros(2, 3, 32, 32),), dynamic_shapes=({0: batch},))
torch.export.save(program, "my_net.pt2")"""
