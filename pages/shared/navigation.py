"""The list of pages, and the code that runs a page inside the app."""

import runpy
from pathlib import Path

import streamlit as st
from streamlit.navigation.page import StreamlitPage

_PAGES = (
    ("overview", ":material/home:", "The model: its card, its channel groups, which layers are coupled and why."),
    (
        "learn",
        ":material/school:",
        "The method in six steps, on a network of a few neurons that you can change by hand.",
    ),
    (
        "importance",
        ":material/bar_chart:",
        "Scores of one group's channels by any criteria, how far they agree, and what one channel responds to.",
    ),
    (
        "transport",
        ":material/conversion_path:",
        "The transport plan of one group: cost, coupling, matrix, each channel's story.",
    ),
    ("curves", ":material/show_chart:", "Accuracy against sparsity, fused against dropped, computed live."),
    (
        "sensitivity",
        ":material/grid_on:",
        "Which groups bear pruning and which do not; sparsities for a smaller network, and whether they hold.",
    ),
    (
        "recovery",
        ":material/healing:",
        "What brings the accuracy of a pruned network back: methods side by side, live, and what each costs.",
    ),
    (
        "training_lab",
        ":material/science:",
        "Pruning while a network learns, and subnetworks of one that never does: trained live, compared, kept.",
    ),
    (
        "landscape",
        ":material/landscape:",
        "Where the pruned networks lie in weight space, whether a path leads there, and what becomes of the answers.",
    ),
    (
        "export",
        ":material/archive:",
        "The smaller network to take away: measured before and after, in three formats, each verified, with a report.",
    ),
    (
        "your_own",
        ":material/upload_file:",
        "Your own network and images: upload weights, a program of torch.export, or a data set.",
    ),
    (
        "docs",
        ":material/menu_book:",
        "The documents: methods, results, how to bring a network of your own, limits; with search by heading.",
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
