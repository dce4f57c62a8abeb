"""Colours and layout of all figures; a colour means the same on every page."""

from dataclasses import dataclass
from functools import cache

import plotly.graph_objects as go


@dataclass(frozen=True)
class Palette:
    """The colours of figures, each #rrggbb.

    dense: ink. drop: grey. fusion: the accent. fold: violet. second: amber, for calibrated merges and the selected channel.
    third: rust, for refitted merges. grid, paper: the background.
    """

    dense: str
    drop: str
    fusion: str
    second: str
    third: str
    fold: str
    grid: str
    paper: str

    def merge(self, name: str) -> str:
        """Return the colour of a merge."""
        named = {"drop": self.drop, "fusion": self.fusion, "fold": self.fold, "refit": self.third}
        return named.get(name.partition("-")[0], self.second)

    def recovery(self, name: str) -> str:
        """Return the colour of a recovery: perp amber, finetune ink, overparam the accent, distill violet, others rust."""
        named = {"perp": self.second, "overparam": self.fusion, "finetune": self.dense, "distill": self.fold}
        return named.get(name.partition("-")[0], self.third)

    def mass(self) -> list[list[object]]:
        """Return a sequential scale for mass, with the background colour at zero, so that sparse plans look sparse."""
        return [[0.0, self.paper], [1e-6, tint(self.fusion, self.paper, 0.25)], [1.0, self.fusion]]

    def cost(self) -> list[list[object]]:
        """Return a sequential scale for cost, with the background colour at zero distance."""
        return [[0.0, self.paper], [0.5, tint(self.dense, self.paper, 0.35)], [1.0, self.dense]]

    def difference(self) -> list[list[object]]:
        """Return a diverging scale for differences: amber below zero, the background at zero, the accent above."""
        return [[0.0, self.second], [0.5, self.paper], [1.0, self.fusion]]


LIGHT = Palette("#1f2933", "#8a94a0", "#0f766e", "#c2700a", "#8c2f1b", "#6d4fc4", "#e3e7eb", "#ffffff")
DARK = Palette("#e6eaef", "#8b96a5", "#2dd4bf", "#f5a742", "#ff8a70", "#b3a1ff", "#303846", "#0f151d")


def palette(dark: bool) -> Palette:
    return DARK if dark else LIGHT


def tint(colour: str, ground: str, share: float) -> str:
    """Mix `share` of `colour` into `ground`, both #rrggbb."""
    mixed = (round(share * int(colour[i : i + 2], 16) + (1 - share) * int(ground[i : i + 2], 16)) for i in (1, 3, 5))
    return "#" + "".join(f"{channel:02x}" for channel in mixed)


def rgba(colour: str, alpha: float) -> str:
    red, green, blue = (int(colour[i : i + 2], 16) for i in (1, 3, 5))
    return f"rgba({red},{green},{blue},{alpha})"


@cache
def template(colours: Palette) -> go.layout.Template:
    """Return the template of all figures; without one, Plotly or Streamlit would add a larger default template."""
    grid, none = colours.grid, "rgba(0,0,0,0)"
    return go.layout.Template(
        layout={
            "title": {"x": 0, "xanchor": "left", "font": {"size": 17, "color": colours.dense}},
            "margin": {"l": 60, "r": 20, "t": 56, "b": 52},
            "paper_bgcolor": none,
            "plot_bgcolor": none,
            "font": {"color": colours.dense, "family": '"Source Sans", "Source Sans Pro", sans-serif', "size": 14},
            "showlegend": False,
            "hoverlabel": {"align": "left"},
            "xaxis": {"showgrid": False, "zeroline": False, "linecolor": grid, "ticks": "outside", "tickcolor": grid},
            "yaxis": {"gridcolor": grid, "zeroline": False},
        },
        data_scatter=[{"marker": {"line": {"width": 0}}}],
    )


def figure(title: str, height: int, colours: Palette) -> go.Figure:
    """Return an empty figure with the common layout."""
    return go.Figure(layout=_layout(title, height, colours))


def styled(fig: go.Figure, title: str, height: int, colours: Palette) -> go.Figure:
    """Apply the common layout to a figure, which may have subplots, and return it."""
    return fig.update_layout(_layout(title, height, colours))


def _layout(title: str, height: int, colours: Palette) -> dict[str, object]:
    """Return the common layout; `uirevision` keeps zoom and selection when data change."""
    return {"template": template(colours), "title": {"text": title}, "height": height, "uirevision": "keep"}
