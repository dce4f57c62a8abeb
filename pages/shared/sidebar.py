"""The sidebar: the model, its images, weights and data files, the device and the group."""

import streamlit as st
import torch
from streamlit.delta_generator import DeltaGenerator

from intrafusion import Group, IntrafusionError, PruneSpec
from intrafusion.data.datasets import OWN, kept_data
from intrafusion.models.hub import (
    dataset_of,
    describe,
    is_local,
    model_names,
    names_weights,
    stream_weights,
    weight_bytes,
)
from intrafusion.models.state_dict import located
from intrafusion.runtime import escaping
from intrafusion.runtime.access import check_path, check_weights_size, is_public, public, roots
from intrafusion.runtime.devices import choose_device, device_name, device_names
from intrafusion.studies.session import Session
from pages.shared import messages
from pages.shared.downloads import download
from pages.shared.links import BIND
from pages.shared.navigation import Enough
from pages.shared.open_model import Here, cached_session

_TORCHVISION = "ImageNet (torchvision)"


def choose(controls: DeltaGenerator) -> Here:
    """Draw the sidebar's controls and return the choices. Raise IntrafusionError if the model cannot be opened."""
    with controls:
        name = _model_name()
        dataset = _dataset(name)
        weights, data_path = _files(name)
        devices = device_names()
        fastest = devices.index(str(choose_device()))
        device = st.selectbox("Device", devices, fastest, format_func=_device_label, key="device", bind=BIND)
    try:
        is_here = is_local(name, weights)
    except IntrafusionError:  # no weights of this model are published
        is_here, weights = True, "random"
        controls.caption("This model has no published weights, so they are random. Train it on the Training lab page.")
    if not is_here:
        _offer_download(name)
        raise Enough
    check_weights_size(name, weight_bytes(name))
    opened = cached_session(name, weights, device)
    with controls:
        for line in opened.card.details.get("told", ()) if weights else ():
            messages.info(line)
    group = _choose_group(opened, controls)
    spec = PruneSpec(model=name, dataset=dataset, weights=weights, data_path=data_path, groups=(group.name,))
    return Here(opened, group, spec, device)


def _device_label(name: str) -> str:
    return name if name in ("cpu", "mps") else f"{name} ({device_name(torch.device(name))})"


def _files(model: str) -> tuple[str | None, str | None]:
    """Return the weights and the data path that the reader gives. On a public server paths outside its folders are refused."""
    has_files = not is_public() or bool(roots())
    with st.expander("Local files" if has_files else "Weights", icon=":material/folder_open:"):
        weights = st.text_input(
            "Weights file" if has_files else "Weights by name",
            key="weights",
            bind=BIND,
            placeholder="resnet20.th" if has_files else "random",
            help="Leave empty for the model's own weights. `FILE#KEY` selects one of several in a file, such as "
            "`last.ckpt#model_ema`.",
        )
        data_path = st.query_params.get("data_path", "")  # from a link, on a server that opens no files
        if has_files:
            data_path = st.text_input(
                "Data",
                key="data_path",
                bind=BIND,
                placeholder="cifar10_test.npz or a folder",
                help="An .npz with images and labels, torchvision's CIFAR folder, or a folder of class folders.",
            )
    weights, data_path = weights.strip() or None, data_path.strip() or None
    if weights and not names_weights(model, weights):
        check_path("weights", weights)
        check_path("weights", str(located(weights)[0]))
    check_path("data", data_path)
    return weights, data_path


def _model_name() -> str:
    names = model_names(imagenet=False)
    chosen = st.selectbox(
        "Model",
        [*names, _TORCHVISION],
        key="model",
        bind=BIND,
        index=names.index("digits-resnet"),
        help="Embedded models need no download. The model determines the data set.",
    )
    if chosen != _TORCHVISION:
        about = describe(chosen)
        st.caption(escaping.markdown(public(f"{about['summary']}; weights: {about['weights']}")))
        return chosen
    short = [name.removeprefix("imagenet/") for name in model_names() if name.startswith("imagenet/")]
    return "imagenet/" + st.selectbox("Architecture", short, key="imagenet", bind=BIND, index=short.index("squeezenet1_0"))


def _dataset(name: str) -> str:
    """Choose the images that the model is measured on: its own data set, or a kept one."""
    own, kept = dataset_of(name), kept_data()
    if not kept:
        return own
    places = [own, *(one for one in kept if one != own)]
    chosen = st.selectbox(
        "Images",
        places,
        index=1 if own == OWN else 0,
        key="data",
        bind=BIND,
        help="The model's own images, or images uploaded on the *Your own* page.",
    )
    return chosen if chosen in places else own


def _choose_group(opened: Session, controls: DeltaGenerator) -> Group:
    usable = [group for group in opened.groups if group.reason is None]
    if not usable:
        raise IntrafusionError("no group of this network can be pruned; `python -m intrafusion groups` lists the reasons")
    names = [group.name for group in usable]
    if st.session_state.get("group") not in names:
        st.session_state.pop("group", None)
    default = next((i for i, group in enumerate(usable) if group.size >= 32), 0)
    with controls:
        name = st.selectbox(
            "Group",
            names,
            index=default,
            key="group",
            bind=BIND,
            help="Layers whose channels must be pruned together, named after the first layer that produces them.",
        )
        group = usable[names.index(name) if name in names else default]
        st.caption(f"{group.size} channels")
    return group


def _offer_download(name: str) -> None:
    st.title("These weights are not on this machine")
    st.write(
        f"**{escaping.markdown(name)}** has published weights. Download them, enter a weights file under *Local files* in the "
        "sidebar (or `random` for random weights), or choose an embedded model."
    )
    download(f"Download weights of {escaping.markdown(name)}", ("weights", name), lambda: stream_weights(name))
