"""The greeting on the first page: the embedded model's card, read from its file before torch is imported."""

import json
from pathlib import Path

import streamlit as st

_CARDS = Path(__file__).parents[2] / "assets"


def greet() -> None:
    """Draw what the project does, and the chosen model's card if the model is embedded."""
    st.markdown(
        "Structured pruning makes a network smaller by removing channels. **Dropping** deletes the less important channels; "
        "**fusion** merges their weights into the kept ones by an Optimal Transport plan, without any data."
    )
    name = st.query_params.get("model", "digits-resnet")  # bound to the sidebar; absent for the default
    if name not in {file.stem for file in _CARDS.glob("*.json")} or st.query_params.get("weights"):
        return
    card = json.loads((_CARDS / f"{name}.json").read_text())
    low, high = card["details"]["interval"]
    columns = st.columns([1.3, 1, 1.3, 0.7])  # names and intervals are long
    columns[0].metric("Model", name, border=True)
    columns[1].metric("Parameters", f"{card['details']['parameters']:,}", border=True)
    columns[2].metric("Top-1 accuracy", f"{card['accuracy']:.1%} ± {50 * (high - low):.1f}", border=True)
    columns[3].metric("Test images", f"{card['details']['test_images']:,}", border=True)
