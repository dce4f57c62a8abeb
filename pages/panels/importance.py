"""Parts of the Importance page: criteria with their formulas and scores, and their agreement."""

from collections.abc import Iterable, Iterator, Sequence
from functools import partial

import numpy as np
import pandas as pd
import streamlit as st

from intrafusion import Group, ImageData, IntrafusionError, PruneSpec, registry
from intrafusion.pruning.agreement import CriteriaComparison
from intrafusion.pruning.groups.feature_maps import consumers
from intrafusion.studies.session import Scores, Session
from pages.shared import job_panel
from pages.shared.open_model import Here

NEEDS = {"nothing": "weights only", "images": "images", "labels": "labelled images"}
FORMULAS = {
    "random": r"s_j \sim U(0, 1)",
    "l1": r"s_j \propto \frac{1}{|\Lambda|} \sum_{\ell \in \Lambda} \sum_{w \in W_{\ell j}} |w|",
    "l2": r"s_j \propto \frac{1}{|\Lambda|} \sum_{\ell \in \Lambda} \sum_{w \in W_{\ell j}} w^2",
    "filter": r"s_j = \frac{1}{|\Lambda_\mathrm{w}|} \sum_{\ell \in \Lambda_\mathrm{w}} \lVert (W_{\ell j}, b_{\ell j}) \rVert_2",
    "lamp": r"s_j = \frac{q_j}{\sum_{m:\, q_m \ge q_j} q_m} \qquad q_j = \frac{1}{|\Lambda|} \sum_{\ell \in \Lambda} \sum_{w \in W_{\ell j}} w^2",
    "fpgm": r"s_j = \frac{1}{|\Lambda|} \sum_{\ell \in \Lambda} \sum_m \lVert W_{\ell j} - W_{\ell m} \rVert_2",
    "bn_scale": r"s_j = |\gamma_j|",
    "taylor": r"s_j = \frac{1}{|\Lambda|} \sum_{\ell \in \Lambda} \sum_{w \in W_{\ell j}} \left| w \frac{\partial L}{\partial w} \right|",
    "taylor_sum": r"s_j = \frac{1}{|\Lambda|} \sum_{\ell \in \Lambda} \left| \sum_{w \in W_{\ell j}} w \frac{\partial L}{\partial w} \right|",
    "obd": r"s_j = \frac{1}{|\Lambda|} \sum_{\ell \in \Lambda} \sum_{w \in W_{\ell j}} w^2 \, \mathbb E \Big[ \Big( \frac{\partial L_x}{\partial w} \Big)^2 \Big]",
    "chip": r"s_j = \mathbb E \big[ \lVert A \rVert_* - \lVert A_{\setminus j} \rVert_* \big]",
    "hrank": r"s_j = \mathbb E \big[ \operatorname{rank} A_j \big]",
    "relative": r"s_j = \mathbb E \Big[ \sum_{o} \sum_{i \in j} \frac{|w_{oi}\, x_i|}{\sum_m |w_{om}\, x_m|} \Big]",
    "conductance": r"s_j = \mathbb E \Big[ \operatorname{mean}_p \Big| \int_0^1 \frac{\partial y}{\partial A_{jp}} \frac{\mathrm d A_{jp}(\alpha x)}{\mathrm d \alpha} \mathrm d \alpha \Big| \Big]",
    "activation-gradient": r"s_j = \mathbb E \Big[ \operatorname{mean}_p \Big| A_{jp} \frac{\partial y}{\partial A_{jp}} \Big| \Big]",
    "deep-lift": r"s_j = \mathbb E \big[ \operatorname{mean}_p \big| m_{jp} \big( A_{jp}(x) - A_{jp}(0) \big) \big| \big]",
    "greedy": r"j^\ast = \arg\max_j \frac{\lVert E_j W^\top \rVert^2}{E_{jj}}, \quad E \leftarrow E - \frac{E_{j^\ast} E_{j^\ast}^\top}{E_{j^\ast j^\ast}}, \quad E_0 = \operatorname{Cov}(A)",
}  # fmt: skip
_SYMBOLS = (
    r"$\Lambda$: the layers of the group; $\Lambda_\mathrm{w}$: its producers; $W_{\ell j}$: the incoming or outgoing weights of channel $j$ in layer $\ell$, with BatchNorm folded; "
    r"$\gamma_j$: BatchNorm's scale; $L$: the loss; $y$: the logit of the true class; $A_j$: the feature map of channel $j$ at "
    r"the input of the next layers; $p$: a position in it; $w_{oi}$: the weight from their input $x_i$ to their output $o$; "
    r"$m$: DeepLIFT's multiplier; $E_j$: row $j$ of the covariance that the channels chosen so far do not explain; $W$: the "
    r"weights of the consumers; $\mathbb E$: the mean over calibration images $x$; $0$: an image of mean pixels."
)
PASSES = {  # cost of a criterion in forward passes: once per group, and per layer that reads the group
    "taylor": (3, 0), "taylor_sum": (3, 0), "obd": (8, 4), "chip": (0, 20), "hrank": (1, 3), "relative": (2, 1),
    "conductance": (0, 64), "activation-gradient": (0, 4), "deep-lift": (0, 10), "greedy": (1, 1),
}  # fmt: skip


def default_criteria(dataset: str) -> list[str]:
    """Return the criteria compared by default: those that use weights alone, and for embedded images two that use images."""
    return ["l1", "l2", "fpgm", "bn_scale", *(["taylor", "relative"] if dataset == "digits" else []), "random"]


def criterion_about(criterion: str) -> None:
    """Draw what a criterion needs and its source, with its formula in a popover."""
    entry = registry("criterion")[criterion]
    rebuilt = " :orange-badge[reconstructed]" if entry.reconstructed else ""
    with st.container(horizontal=True, vertical_alignment="center"):
        st.caption(f"Needs {NEEDS[entry.needs]}. {entry.paper}{rebuilt}", width="stretch")
        with st.popover("Formula", icon=":material/function:"):
            formulas([criterion])


def formulas(criteria: Iterable[str]) -> None:
    """Draw the formula of each criterion, and the symbols."""
    for name in criteria:
        st.markdown(f"**{name}**: {registry('criterion')[name].told}")
        st.latex(FORMULAS[name])
    st.caption(_SYMBOLS)


def image_count(data: ImageData) -> str:
    """Return the number of images and their split as text."""
    return f"{len(data):,} {'training' if data.split == 'train' else 'test'} images"


@st.cache_resource(max_entries=64, show_spinner=False)
def _outcomes(key: tuple) -> dict[str, Scores | str]:
    """Return the cached outcomes of one group by criterion: scores, or the reason why there are none."""
    return {}


def score_each(session: Session, specs: Iterable[PruneSpec], group: Group, known: dict[str, Scores | str]) -> Iterator[str]:
    """Score the group by each spec's criterion, store the outcome in `known`, and yield the criterion's name."""
    for spec in specs:
        try:
            scores = session.scores(spec, group)
            finite = bool(scores.values.isfinite().all())
            known[spec.criterion] = scores if finite else "its scores are not finite"
        except IntrafusionError as error:
            known[spec.criterion] = str(error)
        yield spec.criterion


def scored(
    here: Here, spec: PruneSpec, criteria: Sequence[str], sees: bool
) -> tuple[dict[str, Scores], dict[str, str], dict[str, str]]:
    """Return the available scores, the reasons why criteria failed, and the reasons why others are pending, by criterion.

    Cheap criteria are computed at once, the others by a job when the reader starts it. sees: whether the calibration
    images are available.
    """
    session, group = here.session, here.group
    key = ("scores", here.key(), spec.data_path, group.name)
    known = _outcomes(key)
    possible = [name for name in criteria if sees or registry("criterion")[name].needs == "nothing"]
    missing = [name for name in possible if name not in known]
    now = [name for name in _cheap(here, spec, possible) if name in missing]
    later = [spec.but(criterion=name) for name in missing if name not in now]
    if now:
        with st.spinner(f"Scoring {group.size:,} channels by {', '.join(now)}", show_time=True):
            list(score_each(session, [spec.but(criterion=name) for name in now], group, known))
    if later:
        names = ", ".join(late.criterion for late in later)
        label = f"Compute {len(later)} more criteria" if len(later) > 1 else f"Compute {names}"
        work = partial(score_each, session, later, group, known)
        job_panel.ask(key, label, len(later), work, f"Not computed yet: {names}", redraw=True)
    elif looked := [name for name in possible if registry("criterion")[name].needs != "nothing"]:
        st.caption(f"{', '.join(looked)}: scored on {image_count(session.calibration(spec))}.")
    else:
        st.caption("Scored on weights only.")
    waiting = {name: "needs images, which are not available" for name in criteria if name not in possible}
    waiting |= {late.criterion: "not computed yet" for late in later}
    failed = {name: why for name in possible if isinstance(why := known.get(name), str)}
    return {name: found for name in possible if isinstance(found := known.get(name), Scores)}, failed, waiting


def _cheap(here: Here, spec: PruneSpec, criteria: Sequence[str]) -> list[str]:
    """Return the criteria that are computed automatically: those whose total cost stays below CHEAP.

    The first criterion is considered first, then the others in order of increasing cost.
    """
    images = here.session.size.macs * (spec.calibration or 50_000)
    costs = {}
    for name in criteria:
        once, each = (0, 0) if registry("criterion")[name].needs == "nothing" else PASSES.get(name, (0, 16))
        costs[name] = images * (once + each * len(consumers(here.group)))
    cheap: list[str] = []
    for name in sorted(criteria, key=lambda name: (name != criteria[0], costs[name])):
        if costs[name] + sum(costs[other] for other in cheap) < job_panel.CHEAP:
            cheap.append(name)
    return cheap


def rank_row(comparison: CriteriaComparison, channel: int) -> None:
    """Draw the channel's rank by each criterion as badges."""
    badges = [
        f":{'primary' if kept else 'gray'}-badge[{name} **{rank}**]"
        for name, rank, kept in zip(comparison.names, comparison.ranks[:, channel], comparison.kept[:, channel], strict=True)
    ]
    count = int(comparison.kept[:, channel].sum())
    st.markdown(
        f"Rank among {comparison.ranks.shape[1]:,} channels: {' '.join(badges)} "
        f":small[{count} of {len(badges)} criteria keep it (coloured)]"
    )


def how_to_read(comparison: CriteriaComparison) -> None:
    """Explain the agreement matrix as text, with the agreement expected by chance."""
    chance, k, n = comparison.chance, comparison.k, comparison.scores.shape[1]
    bound = (
        ""
        if np.isnan(chance.correlation)
        else f" With {n:,} channels, unrelated rankings stay within ±{chance.correlation:.2f}."
    )
    st.markdown(f"**Above the diagonal**: Spearman's rank correlation (1: same order, 0: unrelated, −1: reverse order).{bound}")
    if comparison.pruned:
        st.markdown(
            f"**Below the diagonal**: the share of the {k:,} kept channels that two criteria have in common. Random choices share "
            f"{chance.overlap:.0%} on average, between {chance.low:.0%} and {chance.high:.0%}."
        )
    st.markdown(
        "No colour: as expected by chance; :primary[teal]: more agreement; :orange[amber]: less. Ranges by chance hold in 95 % of "
        "cases."
    )
    if np.isnan(comparison.spearman).any():
        st.markdown("A dash means that a criterion gives every channel the same score, so there is no ranking.")


def agreement_table(comparison: CriteriaComparison, scores: dict[str, Scores]) -> pd.DataFrame:
    """Return one row per criterion: what it needs, its time, and its agreement with the first."""
    rows, main = [], comparison.names[0]
    for index, name in enumerate(comparison.names):
        entry, rho = registry("criterion")[name], comparison.spearman[0, index]
        rows.append(
            {
                "criterion": name,
                "needs": NEEDS[entry.needs],
                "time": duration(scores[name].seconds),
                f"rank correlation with {main}": f"{rho:.2f}".replace("-", "−") if np.isfinite(rho) else "no ranking",
                f"kept in common with {main}": f"{comparison.shared(0, index)} of {comparison.k}, {comparison.overlap[0, index]:.0%}",
                "paper": entry.paper,
                "what it scores": entry.told,
            }
        )
    return pd.DataFrame(rows)


def channel_table(comparison: CriteriaComparison) -> pd.DataFrame:
    """Return one row per channel: its score and rank by each criterion, and whether the criterion keeps it."""
    columns = {"channel": np.arange(comparison.scores.shape[1])}
    for index, name in enumerate(comparison.names):
        columns |= {
            f"{name} score": comparison.scores[index],
            f"{name} rank": comparison.ranks[index],
            f"{name} kept": comparison.kept[index],
        }
    return pd.DataFrame(columns)


def duration(seconds: float) -> str:
    """Format seconds as text in ms, s or min."""
    if seconds < 1:
        return f"{1000 * seconds:.0f} ms" if seconds >= 0.001 else "under 1 ms"
    return f"{seconds:.1f} s" if seconds < 90 else f"{seconds / 60:.1f} min"
