"""The list of pages, and the code that runs a page inside the app."""

import runpy
from pathlib import Path

import streamlit as st
from streamlit.navigation.page import StreamlitPage

_PAGES = (
    ("overview", ":material/home:", "The model: its card, its channel groups, and which layers are coupled and why."),
    (
        "learn",
        ":material/school:",
        "The method in six steps, on a network of a few neurons that you can edit.",
    ),
    (
        "importance",
        ":material/bar_chart:",
        "Scores of one group's channels by several criteria, their agreement, and the images that activate a channel.",
    ),
    (
        "transport",
        ":material/conversion_path:",
        "The transport plan of one group: cost, coupling, applied matrix, and what happens to each channel.",
    ),
    ("curves", ":material/show_chart:", "Accuracy against sparsity for fused and dropped networks, computed live."),
    (
        "sensitivity",
        ":material/grid_on:",
        "Which groups tolerate pruning, and a suggested sparsity for each group with its measured accuracy.",
    ),
    (
        "recovery",
        ":material/healing:",
        "Methods that recover the accuracy of a pruned network, compared live, with their costs.",
    ),
    (
        "training_lab",
        ":material/science:",
        "Pruning during training, and subnetworks of untrained networks: train live, compare and save.",
    ),
    (
        "landscape",
        ":material/landscape:",
        "The pruned networks in weight space, paths between networks, and how the outputs change.",
    ),
    (
        "export",
        ":material/archive:",
        "Export of the smaller network: measured before and after, in three verified formats, with a report.",
    ),
    (
        "your_own",
        ":material/upload_file:",
        "Your own network and images: upload weights, a torch.export program, or a data set.",
    ),
    (
        "docs",
        ":material/menu_book:",
        "The documentation: methods, results, how to use your own network, limits; headings can be searched.",
    ),
)


class Enough(Exception):
    """Ends a page early. Unlike Streamlit's st.stop, it lets the app go on, for example to report on the page's link."""


def navigate() -> StreamlitPage:
    """Declare the pages and return the open one."""
    return st.navigation(
        [
            st.Page(f"pages/{name}.py", title=name.replace("_", " ").capitalize(), icon=icon, help=about)
            for name, icon, about in _PAGES
        ]
    )


def run(page: StreamlitPage) -> None:
    """Run the page, with a mark in the session state that it runs inside the app."""
    st.session_state.inside_app = True
    try:
        page.run()
    finally:
        st.session_state.inside_app = False


def enter_app() -> None:
    """Run app.py around this page if Streamlit runs the page by itself.

    If the app has a folder named pages, Streamlit starts in its old mode: a page opened by its own address runs without
    app.py, until the pages have been declared once.
    """
    if not st.session_state.get("inside_app"):
        runpy.run_path(str(Path(__file__).parents[2] / "app.py"), run_name="__main__")
        st.stop()
