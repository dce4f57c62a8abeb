"""The open model: the sidebar's choices, the model with its images, and what to do where images are missing."""

from dataclasses import dataclass

import streamlit as st
from torch import nn

from intrafusion import Group, ImageData, IntrafusionError, PruneSpec, load_data
from intrafusion.data.datasets import KEPT, OWN, stream_cifar
from intrafusion.models import hub
from intrafusion.models.hub import kept_names, runs_code
from intrafusion.pruning.importance import needs_images
from intrafusion.runtime.access import check_room, check_share, is_public
from intrafusion.runtime.paths import home
from intrafusion.studies.session import Session, open_session
from pages.shared import background_jobs, messages
from pages.shared.downloads import download


@dataclass(frozen=True)
class Here:
    """The sidebar's choices: the open model, the chosen group, the device, and a spec that holds model, data and group."""

    session: Session
    group: Group
    spec: PruneSpec
    device: str

    def key(self) -> tuple:
        """Return the cache key of this model's results: model, weights, device and data set."""
        return self.spec.model, self.spec.weights, self.device, self.spec.dataset


@st.cache_resource(max_entries=6, show_spinner="Loading the model")
def cached_session(model: str, weights: str | None, device: str) -> Session:
    """Open a model with its groups, without images. Raise IntrafusionError for a model whose name would run code."""
    if runs_code(model):
        raise IntrafusionError(
            f"{model} would run your own code; open it from Python or the command line, or upload it as a program"
        )
    return open_session(model, device, weights)


@st.cache_resource(max_entries=3, show_spinner="Loading the images")
def cached_images(
    dataset: str, path: str | None, device: str, input_size: tuple[int, int, int], limit: int | None
) -> ImageData:
    return load_data(dataset, path=path, device=device, input_size=input_size, limit=limit)


@st.cache_resource(max_entries=6, show_spinner=False)
def measuring_session(_here: Here, key: tuple, path: str | None, limit: int | None) -> Session:
    """Return the open model with its images; the dense accuracy is shared. `key` is `_here.key()` and the data set."""
    size = _here.session.card.input_size
    folder_limit = limit if _here.spec.dataset.startswith(("imagenet", OWN, KEPT)) else None
    return _here.session.on(cached_images(_here.spec.dataset, path, _here.device, size, folder_limit))


def measuring(here: Here, limit: int | None) -> Session | None:
    """Return the model with its images. If they are missing, show how to get them and return None."""
    dataset, path = here.spec.dataset, here.spec.data_path
    try:
        opened = measuring_session(here, (*here.key(), dataset), path, limit)
    except IntrafusionError as error:
        offer_images(here, error)
        return None
    for note in opened.images().notes:
        messages.info(note)
    return opened


def can_see(here: Here, spec: PruneSpec) -> bool:
    """Return whether the calibration images that `spec` needs are available. If they are not, show how to get them."""
    if not needs_images(spec):
        return True
    try:
        with st.spinner("Loading the calibration images"):
            seen = here.session.calibration(spec)
    except IntrafusionError as error:
        offer_images(here, error)
        return False
    if seen.split != "train":
        st.caption(
            f"There is no training split, so calibration images come from the {seen.split} split: measured accuracy is optimistic."
        )
    return True


def offer_images(here: Here, error: IntrafusionError) -> None:
    """Show that the open model's images are missing, and how to get them."""
    dataset = here.spec.dataset
    if dataset == OWN and here.spec.data_path is None:
        st.info(
            "The images of this network are unknown. Upload images on the *Your own* page and choose them in the sidebar.",
            icon=":material/image_search:",
        )
        st.page_link("pages/your_own.py", label="Upload images", icon=":material/upload_file:")
        return
    if here.spec.data_path is not None or dataset not in ("cifar10", "cifar100"):
        messages.warning(error, icon=":material/image_search:")
        return
    title = dataset.upper().replace("CIFAR", "CIFAR-")
    st.info(
        f"The {title} images are not on this machine yet. Download them once, or enter an .npz file or a folder under "
        "*Local files* in the sidebar. Methods that use only weights need no images.",
        icon=":material/image_search:",
    )
    download(f"Download {title} (170 MB)", ("data", dataset), lambda: stream_cifar(dataset))
    if not is_public():
        st.caption(f"Downloads are stored in {home()}.")


def keep_network(model: nn.Module, name: str) -> str:
    """Call `hub.keep` within the limits of a public server: do not overwrite a kept network and do not fill the disk."""
    check_room()
    check_share(background_jobs.reader_address(), sum(value.nbytes for value in model.state_dict().values()))
    if is_public() and f"{KEPT}{name}" in kept_names():
        raise IntrafusionError(f"kept/{name} already exists; choose another name")
    return hub.keep(model, name)
