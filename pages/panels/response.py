"""Responses of one channel on the Importance page: the images that activate it most, and their pixels by Captum."""

from collections.abc import Sequence
from textwrap import shorten

import numpy as np
import streamlit as st
import torch
from torch import Tensor

from intrafusion import ImageData, IntrafusionError
from intrafusion.evaluation.attribution import METHODS, STEPS, Attribution, activations_of_channels, channel_attribution
from intrafusion.models.batching import batches_for
from intrafusion.reporting.figures.images import attribution_panels, gallery
from intrafusion.runtime import escaping
from pages.panels.importance import image_count
from pages.shared import job_panel, links, messages, parts
from pages.shared.open_model import Here


def channel_activations(here: Here, data: ImageData) -> Tensor | None:
    """Return the activation (N, n) of every channel on every calibration image.

    If the computation is expensive, return None until the reader has started it and it is done.
    """
    batches = job_panel.results(
        ("activations", here.key(), here.spec.data_path, here.group.name),
        here.session.size.macs * len(data),
        "Compute activations",
        sum(1 for _ in batches_for(here.session.model, data)),
        lambda: activations_of_channels(here.session.model, here.group, data),
        f"Activations of the group's channels on {len(data):,} images",
    )
    return batches and torch.cat(batches)


def attribution(here: Here, data: ImageData, channel: int, image: int, method: str) -> Attribution | None:
    """Return Captum's attribution of a channel on one image.

    If the computation is expensive, return None until the reader has started it and it is done.
    """
    passes = 3 * (STEPS if method == "integrated-gradients" else 1)
    found = job_panel.results(
        ("attribution", here.key(), here.spec.data_path, here.group.name, channel, image, method),
        here.session.size.macs * passes,
        f"Compute {method}",
        1,
        lambda: iter([channel_attribution(here.session.model, here.group, channel, data.images[image], method)]),
        f"About {passes} passes through the network",
    )
    return found and found[0]


def describe_activation(activation: Tensor, channel: int, data: ImageData, layer: str) -> str:
    """Describe a channel's activation as text. activation: (N, n), per image of `data` and channel, as `layer` reads it."""
    values, dead = activation[:, channel], int((~activation.any(0)).sum())
    images = image_count(data)
    if not values.any():
        return f"At the input of {escaping.code(layer)}, this channel is zero on all {images}. It is dead, so removing it loses nothing."
    active = float((values != 0).float().mean())
    words = (
        f"At the input of {escaping.code(layer)}, the channel is active on {active:.0%} of {images}; its mean activation is "
        f"{values.mean():.3g}."
    )
    labels = data.labels.cpu()
    means = {label: float(values[labels == label].mean()) for label in labels.unique().tolist() if label >= 0}
    if 1 < len(means) <= len(values) / 5:  # at least five images per class on average, so that a mean is meaningful
        most, least = max(means, key=means.__getitem__), min(means, key=means.__getitem__)
        words += (
            f" The class mean is highest for **{escaping.markdown(data.classes[most])}** ({means[most]:.3g}) and lowest for "
            f"**{escaping.markdown(data.classes[least])}** ({means[least]:.3g})."
        )
    if dead:
        words += f" {dead:,} of the group's {activation.shape[1]:,} channels are dead: zero on every image."
    return words


def image_control(count: int) -> tuple[int, str]:
    """Draw the controls of the attribution. Return which of the top images to explain, from 1, and the method."""
    row = st.container(horizontal=True)
    number = (
        row.segmented_control(
            "Image to explain",
            list(range(1, count + 1)),
            default=1,
            required=True,
            key="image",
            bind=links.BIND,
            help="Image 1 has the highest activation. You can also click an image.",
        )
        or 1
    )
    method = (
        row.segmented_control(
            "Attribution method",
            list(METHODS),
            default="integrated-gradients",
            required=True,
            key="attribution",
            bind=links.BIND,
            wrap=True,
            help="  \n".join(f"**{name}**: {method.summary} ({method.paper})." for name, method in METHODS.items()),
        )
        or "integrated-gradients"
    )
    return number, method


def show_images(data: ImageData, top: Sequence[int], values: Tensor, number: int) -> None:
    """Draw the images that activate a channel most. A click chooses one. values: the channel's activation (N,) on `data`."""
    captions = [f"{escaping.hover(shorten(_class_name(data, i), 16, placeholder='…'))}<br>{values[i]:#.3g}" for i in top]
    title = f"The {len(top)} of {len(data):,} images with the highest activation"
    figure = gallery([_picture(data, i) for i in top], captions, title, number - 1, parts.is_dark())

    def pick() -> None:
        if points := st.session_state.images.selection.points:
            st.session_state.image = int(points[0]["customdata"])

    st.plotly_chart(figure, key="images", on_select=pick, selection_mode="points", theme=None, config={"displayModeBar": False})


def show_attribution(here: Here, data: ImageData, channel: int, image: int, method: str) -> None:
    """Draw which parts of one image activate the channel, as pictures with a caption."""
    try:
        found = attribution(here, data, channel, image, method)
    except IntrafusionError as error:
        messages.info(error)
        return
    if found is None:
        return
    title = f"Channel {channel} on “{escaping.hover(_class_name(data, image))}”: activation {found.activation:.3g}"
    pixels = found.pixels.sum(0).numpy()
    parts.chart(attribution_panels(_picture(data, image), found.map.numpy(), pixels, title, method, parts.is_dark()), "pixels")
    words = f"**{method}** shows {METHODS[method].summary} ({METHODS[method].paper}). Teal pixels raise the activation; amber pixels lower it."
    if method == "integrated-gradients":
        words += (
            f" The pixels sum to {found.pixels.sum():.3g}. The exact sum is the activation, {found.activation:.3g}, minus that of an "
            f"image of mean pixels, {found.baseline:.3g}."
        )
    st.caption(words)


def _picture(data: ImageData, image: int) -> np.ndarray:
    return data.images[image].permute(1, 2, 0).cpu().numpy()


def _class_name(data: ImageData, image: int) -> str:
    label = int(data.labels[image])
    return data.classes[label] if label >= 0 else "unknown class"
