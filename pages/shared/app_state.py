"""State that all pages share: the sidebar, the loaded models and images, and the process's background jobs."""

import gc
import importlib
import threading
from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass
from typing import Any

import streamlit as st
import torch
from streamlit.delta_generator import DeltaGenerator
from streamlit.runtime import exists, get_instance
from streamlit.runtime.scriptrunner import get_script_run_ctx
from torch import nn

from intrafusion import Group, ImageData, IntrafusionError, PruneSpec, load_data
from intrafusion.data.datasets import KEPT, OWN, kept_data
from intrafusion.models import hub
from intrafusion.models.hub import (
    dataset_of,
    describe,
    is_local,
    kept_names,
    model_names,
    names_weights,
    runs_code,
    stream_weights,
    weight_bytes,
)
from intrafusion.models.state_dict import located
from intrafusion.pruning.importance import needs_images
from intrafusion.runtime import escaping
from intrafusion.runtime.access import (
    GRACE,
    check_computations,
    check_path,
    check_room,
    check_share,
    check_size,
    is_public,
    public,
    roots,
)
from intrafusion.runtime.jobs import Job, Jobs
from intrafusion.runtime.paths import home
from intrafusion.studies.session import Session, open_session
from pages.shared import messages
from pages.shared.navigation import Enough

BIND = "query-params"
_admission = threading.Lock()
_TORCHVISION = "ImageNet (torchvision)"


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
def session(model: str, weights: str | None, device: str) -> Session:
    """Open a model with its groups, without images. Raise IntrafusionError for a model whose name would run code."""
    if runs_code(model):
        raise IntrafusionError(
            f"{model} would run your own code; open it from Python or the command line, or upload it as a program"
        )
    return open_session(model, device, weights)


@st.cache_resource(max_entries=3, show_spinner="Loading the images")
def images(dataset: str, path: str | None, device: str, input_size: tuple[int, int, int], limit: int | None) -> ImageData:
    return load_data(dataset, path=path, device=device, input_size=input_size, limit=limit)


@st.cache_resource(max_entries=6, show_spinner=False)
def measuring_session(_here: Here, key: tuple, path: str | None, limit: int | None) -> Session:
    """Return the open model with its images; the dense accuracy is shared. `key` is `_here.key()` and the data set."""
    size = _here.session.card.input_size
    folder_limit = limit if _here.spec.dataset.startswith(("imagenet", OWN, KEPT)) else None
    return _here.session.on(images(_here.spec.dataset, path, _here.device, size, folder_limit))


@st.cache_resource
def jobs() -> Jobs:
    """Return the process's jobs. They survive a page reload."""
    return Jobs()


def start(key: Hashable, total: int, work: Callable[[], Iterator], title: str, lasts: bool = False, **options: Any) -> Job:
    """Call `Jobs.start` and record which reader started the job, who may then cancel it anywhere. Rerun the page afterwards.

    lasts: whether the job keeps running after this session has left a public server, as a named study does. Raises
    IntrafusionError if a public server already has enough jobs, of this reader or of all readers.
    """
    who = reader()
    with _admission:
        active = [job for job in jobs().queue() if job.key != key and job.state != "stopping"]
        check_computations(sum(job.who == who for job in active), len(active))
        known = jobs().get(key)
        job = jobs().start(key, total, work, title, who=who, **options)
        if lasts:
            job.askers.clear()
        elif job is not known or job.askers:  # a lasting job has no askers
            job.askers.add(_session())
    return job


def reader() -> str:
    """Return the reader's address, as `pages.shared.client_address` determines it."""
    found = st.context.ip_address
    return found if isinstance(found, str) else ""  # no address for this machine, or without a browser


def is_mine(job: Job) -> bool:
    """Return whether this reader started the job, even before a reload."""
    return job.who == reader()


def may_cancel(job: Job) -> bool:
    """Return whether this reader may cancel the job. On a public server only the reader who started it may."""
    return not is_public() or is_mine(job)


def arrive() -> None:
    """Take over the reader's jobs from sessions that have ended, since a reload starts a new session."""
    if not is_public() or st.session_state.get("arrived"):
        return
    st.session_state.arrived = True
    for job in jobs().queue():
        if is_mine(job) and job.askers and not any(map(_is_here, job.askers)):
            job.askers.add(_session())


def tend() -> None:
    """Cancel the jobs of sessions that have ended. Call it every few seconds. It only acts on a public server."""
    if is_public():
        jobs().tend(_is_here, GRACE)


def _session() -> str:
    context = get_script_run_ctx()
    return context.session_id if context is not None else ""


def _is_here(session: str) -> bool:
    return exists() and get_instance().is_active_session(session)


def keep(model: nn.Module, name: str) -> str:
    """Call `hub.keep` within the limits of a public server: do not overwrite a kept network and do not fill the disk."""
    check_room()
    check_share(reader(), sum(value.nbytes for value in model.state_dict().values()))
    if is_public() and f"{KEPT}{name}" in kept_names():
        raise IntrafusionError(f"kept/{name} already exists; choose another name")
    return hub.keep(model, name)


@st.cache_resource
def warm() -> threading.Thread:
    """Import the slow libraries of the other pages in the background, once per server."""
    slow = (
        "ot",
        "sklearn.cluster",
        "scipy.stats",
        "intrafusion.reporting.figures.transport",
        "torch_pruning",
        "captum.attr",
    )

    def load() -> None:
        for name in slow:
            importlib.import_module(name)
        gc.collect()
        gc.freeze()  # Streamlit collects garbage after every script run: scanning all these objects would cost 0.2 s of CPU

    thread = threading.Thread(target=load)
    thread.start()
    return thread


def is_dark() -> bool:
    return st.context.theme.type == "dark"


def choose(controls: DeltaGenerator) -> Here:
    """Draw the sidebar's controls and return the choices. Raise IntrafusionError if the model cannot be opened."""
    with controls:
        name = _model_name()
        dataset = _dataset(name)
        weights, data_path = _files(name)
        devices = ["cpu"] + [f"cuda:{i}" for i in range(torch.cuda.device_count())]
        device = st.selectbox("Device", devices, index=min(1, len(devices) - 1), key="device", bind=BIND)
    try:
        is_here = is_local(name, weights)
    except IntrafusionError:  # no weights of this model are published
        is_here, weights = True, "random"
        controls.caption("This model has no published weights, so they are random. Train it on the Training lab page.")
    if not is_here:
        _offer_download(name)
        raise Enough
    check_size(name, weight_bytes(name))
    opened = session(name, weights, device)
    with controls:
        for line in opened.card.details.get("told", ()) if weights else ():
            messages.info(line)
    group = _choose_group(opened, controls)
    spec = PruneSpec(model=name, dataset=dataset, weights=weights, data_path=data_path, groups=(group.name,))
    return Here(opened, group, spec, device)


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


def download(label: str, key: tuple, work: Callable[[], Iterator[tuple[int, int]]]) -> None:
    """Draw a button that downloads in the background, the progress, and any error. A public server offers no button."""
    if is_public():
        st.caption("The operator of this server can download it from the command line.")
        return
    job = jobs().get(key)
    if st.button(label, icon=":material/download:", disabled=bool(job and job.active)):
        start(key, 1, work, label, part=lambda bytes: ("file", bytes[0] / bytes[1] if bytes[1] else 0.0), computes=False)
        st.rerun()
    if job is not None:
        _watch_download(job)


def _watch_download(job: Job) -> None:
    from pages.shared import job_panel  # here because job_panel imports this module

    def draw() -> None:
        done, total = job.results[-1] if job.results else (0, 0)
        st.progress(done / total if total else 0.0, f"{done / 1e6:,.1f} of {total / 1e6:,.1f} MB")
        if may_cancel(job) and st.button("Cancel download"):
            job.cancel()

    if job.active:
        job_panel.watch_job(job, draw, every=0.5)
    elif job.error:
        messages.error(messages.reason(job))
    elif job.state == "done":
        st.rerun()


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
    from intrafusion.data.datasets import stream_cifar

    title = dataset.upper().replace("CIFAR", "CIFAR-")
    st.info(
        f"The {title} images are not on this machine yet. Download them once, or enter an .npz file or a folder under "
        "*Local files* in the sidebar. Methods that use only weights need no images.",
        icon=":material/image_search:",
    )
    download(f"Download {title} (170 MB)", ("data", dataset), lambda: stream_cifar(dataset))
    if not is_public():
        st.caption(f"Downloads are stored in {home()}.")
