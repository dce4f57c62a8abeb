"""Solvers of one transport problem, from POT. Names follow POT: M cost, a and b marginals, G coupling.

The iterative solvers get torch tensors: POT then computes with torch, which is several times faster here than numpy.
"""

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from intrafusion._registry import SOLVERS
from intrafusion.errors import IntrafusionError
from intrafusion.runtime.cancellation import beside
from intrafusion.runtime.light_imports import without

_LARGE = 1 << 19  # problems with more distances than this take seconds to solve
_ITERATIONS = {"sinkhorn": 1000, "unbalanced": 500}  # take a third of a second on 512 channels
_LIGHT = 1e-13  # share of all mass below which a solver's rounding hides a channel
_ROOM = 1e6  # times all light masses: a target with this much mass takes them without a noticeable change
_ROUNDING = 1e-10  # share of a marginal below which its difference to another one counts as rounding


@dataclass(frozen=True, eq=False)
class Problem:
    """A transport problem: move mass a (n,) onto b (k,), equal in sum, at cost M (n, k).

    kept: int (k,), the source that is each target; None if the targets are other points. metric: whether M obeys the triangle
    inequality. reg, reg_m: strength of the entropy and of the marginals, as multiples of the mean cost. mass: share of the mass
    to move. Raises IntrafusionError for reg, reg_m or mass out of range.
    """

    a: np.ndarray
    b: np.ndarray
    M: np.ndarray
    kept: np.ndarray | None = None
    metric: bool = True
    reg: float = 0.02
    reg_m: float = 5.0
    mass: float = 0.9

    def __post_init__(self) -> None:
        for name in ("a", "b"):  # a smaller mass has fewer digits and could vanish when it is split
            mass = getattr(self, name)
            object.__setattr__(self, name, np.where(mass > 0, np.maximum(mass, 1e-300), 0))
        for name in ("reg", "reg_m"):
            if not 0 < getattr(self, name) < float("inf"):
                raise IntrafusionError(f"{name} must be a number above 0, not {getattr(self, name)}")
        if not 0 < self.mass <= 1:
            raise IntrafusionError(f"mass must be a number above 0 and at most 1, not {self.mass}")

    @property
    def reducible(self) -> bool:
        """Whether some optimal plan leaves each kept channel's mass in place, and whether the targets have room for that."""
        return self.metric and self.kept is not None and has_room(self.a, self.b, self.kept)

    @property
    def scale(self) -> float:
        """The mean cost, or 1 if all costs are zero: the unit of `reg` and `reg_m`."""
        return float(self.M.mean()) or 1.0


def has_room(a: np.ndarray, b: np.ndarray, kept: np.ndarray) -> bool:
    """Return whether each target has room for the mass of its own channel."""
    return bool((b >= (1 - 1e-12) * a[kept]).all())


@SOLVERS.register("exact", "optimal plan by network simplex, solved for the removed channels only where that is exact", "POT")
def exact(problem: Problem) -> np.ndarray:
    """Compute the optimal coupling (n, k).

    If the problem is reducible, only the n - k other channels are transported, into the residual target mass b - a[kept]. By
    the triangle inequality, a detour through a kept channel never costs less. Otherwise the full problem is solved.
    """
    a, b, M, kept = problem.a, problem.b, problem.M, problem.kept
    if kept is None or not problem.reducible:
        return _emd(a, b, M)
    G = np.zeros_like(M)
    G[kept, np.arange(len(kept))] = a[kept]
    dropped = np.ones(len(a), bool)
    dropped[kept] = False
    if a[dropped].any():
        G[dropped] = _emd(a[dropped], _room(a[kept], b, a[dropped].sum()), M[dropped])
    return G


def _room(stays: np.ndarray, b: np.ndarray, goes: float) -> np.ndarray:
    """Return the room of the k targets beyond the mass that `stays` there; `goes` is the total mass to place.

    Targets whose difference is mere rounding share the mass that the others leave, in proportion to b.
    """
    room, hidden = b - stays, np.zeros_like(b)
    clear = room > _ROUNDING * b
    hidden[~clear] = b[~clear]
    rest = goes - room[clear].sum()
    if rest > _ROUNDING * goes and hidden.any():
        return np.where(clear, room, rest * hidden / hidden.sum())
    return np.where(clear, room, 0)


@SOLVERS.register(
    "sinkhorn",
    "entropy-regularised plan: every channel is spread, more widely for a larger reg",
    "Cuturi, NeurIPS 2013",
    knobs=("reg",),
)
def sinkhorn(problem: Problem) -> np.ndarray:
    """Compute argmin <G, M> - reg H(G) in the log domain, then round to the marginals (Altschuler et al., NeurIPS 2017)."""
    ot = pot()

    rows, columns = problem.a > 0, problem.b > 0
    a, b, M = problem.a[rows], problem.b[columns], problem.M[np.ix_(rows, columns)]
    G = np.zeros_like(problem.M)
    smooth = ot.bregman.sinkhorn_log(
        *map(torch.from_numpy, (a, b, M)),
        problem.reg * problem.scale,
        numItermax=_ITERATIONS["sinkhorn"],
        stopThr=1e-5,
        warn=False,
    )
    G[np.ix_(rows, columns)] = _rounded(smooth.numpy(), a, b)
    return G


@SOLVERS.register(
    "unbalanced",
    "soft marginals: distant channels may lose mass, more of it for a smaller reg_m",
    "Chapel et al., NeurIPS 2021",
    knobs=("reg_m",),
)
def unbalanced(problem: Problem) -> np.ndarray:
    """Compute argmin <G, M> + reg_m (KL(G 1 | a) + KL(G^T 1 | b)) by majorisation-minimisation."""
    ot = pot()

    strength = problem.reg_m * problem.scale

    def solve(a: np.ndarray, b: np.ndarray, M: np.ndarray) -> _Solved:
        G = ot.unbalanced.mm_unbalanced(
            *map(torch.from_numpy, (a, b, M)), strength, numItermax=_ITERATIONS["unbalanced"], stopThr=1e-9
        ).numpy()
        u, v = (-strength * np.log(np.maximum(G.sum(i), 1e-300) / mass) for i, mass in ((1, a), (0, b)))
        return G, u, v

    def arrives(price: np.ndarray) -> np.ndarray:
        return np.exp(-np.maximum(price, 0) / strength)

    return _with_light(problem.a, problem.b, problem.M, solve, arrives)


@SOLVERS.register(
    "partial",
    "only the cheapest share `mass` of the mass is moved: the most distant channels are dropped",
    "Chapel et al., NeurIPS 2020",
    knobs=("mass",),
)
def partial(problem: Problem) -> np.ndarray:
    """Compute argmin <G, M> with G 1 <= a, G^T 1 <= b and sum(G) = mass sum(a), exactly.

    The mass that is left goes to one additional target, and the missing mass comes from one additional source, at no cost
    (section 3 of the paper).
    """
    if problem.mass == 1:
        return exact(problem)
    a, b, stays = problem.a, problem.b, (1 - problem.mass) * problem.a.sum()
    M = np.pad(problem.M, (0, 1))
    M[-1, -1] = 2 * problem.M.max() + 1
    return _emd(np.append(a, stays), np.append(b, stays), M)[:-1, :-1]


def pot() -> Any:
    """Import POT, which takes half a second that a first page view need not pay."""
    with without("sklearn", "networkx"):
        import ot
    return ot


_Solved = tuple[np.ndarray, np.ndarray, np.ndarray]  # G (n, k), and the dual prices u (n,) and v (k,)


def _emd(a: np.ndarray, b: np.ndarray, M: np.ndarray) -> np.ndarray:
    """Compute the optimal plan between masses of any size.

    Up to rounding, rows sum to a, and columns to b scaled to the same total.
    """
    ot = pot()

    def solve(a: np.ndarray, b: np.ndarray, M: np.ndarray) -> _Solved:
        with beside() if M.size > _LARGE else nullcontext():
            G, log = ot.emd(a / a.sum(), b / b.sum(), np.ascontiguousarray(M), numItermax=1_000_000, log=True)
        return G * a.sum(), log["u"], log["v"]

    G = _with_light(a, b * (a.sum() / b.sum()), M, solve)
    return G * np.divide(a, G.sum(1), out=np.zeros_like(a), where=a > 0)[:, None]


def _with_light(
    a: np.ndarray,
    b: np.ndarray,
    M: np.ndarray,
    solve: Callable[[np.ndarray, np.ndarray, np.ndarray], _Solved],
    arrives: Callable[[np.ndarray], np.ndarray] = np.ones_like,
) -> np.ndarray:
    """Solve for the sources and targets whose mass `solve` can resolve, then place the light ones.

    In the limit of zero mass, a source moves to the target with the smallest M - v, and the share arrives(M - v) of it arrives.
    Likewise, a target takes from the source with the smallest M - u. Sources and targets without mass are left out.
    """
    rows, columns = (mass > _LIGHT * mass.sum() for mass in (a, b))
    G = np.zeros_like(M)
    G[np.ix_(rows, columns)], u, v = solve(a[rows], b[columns], M[np.ix_(rows, columns)])
    _place(G, (a, b, M), (rows, columns), v, arrives)
    _place(G.T, (b, a, M.T), (columns, rows), u, arrives)
    return G


def _place(
    G: np.ndarray,
    problem: _Solved,
    heavy: tuple[np.ndarray, np.ndarray],
    prices: np.ndarray,
    arrives: Callable[[np.ndarray], np.ndarray],
) -> None:
    """Add the mass of the light sources to G, each to one target that has room.

    prices: dual prices of the heavy targets.
    """
    (a, b, M), (rows, columns) = problem, heavy
    light, targets = np.flatnonzero(~rows & (a > 0)), np.flatnonzero(columns)
    room = b[targets] >= min(_ROOM * a[light].sum(), b.max())
    costs = M[np.ix_(light, targets[room])] - prices[room]
    G[light, targets[room][costs.argmin(1)]] = a[light] * arrives(costs.min(1))


def _rounded(G: np.ndarray, a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Make the marginals of G exactly a and b with little change: scale down, then fill in what is missing."""
    G = G * np.minimum(1, a / np.maximum(G.sum(1), 1e-300))[:, None]
    G = G * np.minimum(1, b / np.maximum(G.sum(0), 1e-300))
    rows, columns = np.maximum(a - G.sum(1), 0), np.maximum(b - G.sum(0), 0)
    room = columns if 2 * columns.sum() > rows.sum() else b  # else the deficit of the columns is rounding
    return G + np.outer(rows, room / room.sum()) if rows.any() else G
