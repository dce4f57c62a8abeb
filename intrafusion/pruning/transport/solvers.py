"""Solvers of one transport problem, from POT. Names follow POT: M cost, a and b marginals, G coupling.

The iterative ones get torch tensors: POT then computes with torch, several times faster here than with numpy.
"""

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass

import numpy as np
import torch

from intrafusion._registry import SOLVERS
from intrafusion.errors import IntrafusionError
from intrafusion.runtime.cancellation import beside

_LARGE = 1 << 19  # distances of a problem that takes seconds to solve, at least
_ITERATIONS = {"sinkhorn": 1000, "unbalanced": 500}  # a third of a second on 512 channels
_LIGHT = 1e-13  # share of all mass below which a solver's rounding hides a channel
_ROOM = 1e6  # times all light masses: what a target must hold to take them without being noticeably fuller
_ROUNDING = 1e-10  # share of a marginal below which its difference to another one is not believed


@dataclass(frozen=True, eq=False)
class Problem:
    """Move mass a (n,) onto b (k,), equal in sum, at cost M (n, k).

    kept: int (k,), the sources that the targets are, None where the targets are other points. metric: whether M obeys
    the triangle inequality. reg, reg_m: strength of the entropy and of the marginals, as multiples of the mean cost.
    mass: share of the mass to move.
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
        for name in ("a", "b"):  # a mass of fewer digits, shared out, could vanish
            mass = getattr(self, name)
            object.__setattr__(self, name, np.where(mass > 0, np.maximum(mass, 1e-300), 0))
        for name in ("reg", "reg_m"):
            if not 0 < getattr(self, name) < float("inf"):
                raise IntrafusionError(f"{name} must be a positive number, not {getattr(self, name)}")
        if not 0 < self.mass <= 1:
            raise IntrafusionError(f"mass must be a share above 0 and at most 1, not {self.mass}")

    @property
    def reducible(self) -> bool:
        """Whether leaving each kept channel's mass where it is belongs to some optimal plan, and is possible."""
        return self.metric and self.kept is not None and bool((self.b >= (1 - 1e-12) * self.a[self.kept]).all())

    @property
    def scale(self) -> float:
        """The mean cost, 1 where nothing costs anything: the unit of `reg` and `reg_m`."""
        return float(self.M.mean()) or 1.0


@SOLVERS.register(
    "exact", "the optimal plan (network simplex); solved on the dropped channels alone where that is exact", "POT"
)
def exact(problem: Problem) -> np.ndarray:
    """Optimal coupling (n, k).

    Where the problem is reducible, what remains is to send the n - k others into the residual target mass b - a[kept].
    Any detour through a kept channel costs no less, by the triangle inequality. Otherwise the full problem is solved.
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
    """What the k targets have room for beyond the mass that `stays` there, `goes` in all.

    Where the difference is nothing but rounding, it is what the others leave, in proportion to b.
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
    "entropy-smoothed plan: every channel is spread, the more so the larger reg",
    "Cuturi, NeurIPS 2013",
    knobs=("reg",),
)
def sinkhorn(problem: Problem) -> np.ndarray:
    """argmin <G, M> - reg H(G) in the log domain, then rounded onto the marginals (Altschuler et al., NeurIPS 2017)."""
    import ot

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
    "marginals are only wished for: far-off channels give up mass, the more so the smaller reg_m",
    "Chapel et al., NeurIPS 2021",
    knobs=("reg_m",),
)
def unbalanced(problem: Problem) -> np.ndarray:
    """argmin <G, M> + reg_m (KL(G 1 | a) + KL(G^T 1 | b)), by majorisation-minimisation."""
    import ot

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
    "only the share `mass` that is cheapest to move is moved: the farthest channels are dropped",
    "Chapel et al., NeurIPS 2020",
    knobs=("mass",),
)
def partial(problem: Problem) -> np.ndarray:
    """argmin <G, M> with G 1 <= a, G^T 1 <= b and sum(G) = mass sum(a), exactly.

    What stays behind goes to one more target, and what is missing comes from one more source, at no cost (their section 3).
    """
    if problem.mass == 1:
        return exact(problem)
    a, b, stays = problem.a, problem.b, (1 - problem.mass) * problem.a.sum()
    M = np.pad(problem.M, (0, 1))
    M[-1, -1] = 2 * problem.M.max() + 1
    return _emd(np.append(a, stays), np.append(b, stays), M)[:-1, :-1]


_Solved = tuple[np.ndarray, np.ndarray, np.ndarray]  # G (n, k), and the dual prices u (n,) and v (k,)


def _emd(a: np.ndarray, b: np.ndarray, M: np.ndarray) -> np.ndarray:
    """The optimal plan between masses of any size: rows sum to a to rounding, columns to b, scaled to the same sum."""
    import ot  # a second of imports that a first page view need not pay

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
    """Solve between the sources and targets that `solve` can tell from nothing, and then place the light ones.

    In the limit of no mass, a source goes to the target of the least M - v, and arrives(M - v) of it gets there; a target
    takes likewise from the source of the least M - u. Those without any mass neither give nor take.
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
    """Add to G what the light sources give, each to one target that has room. prices: of the heavy targets."""
    (a, b, M), (rows, columns) = problem, heavy
    light, targets = np.flatnonzero(~rows & (a > 0)), np.flatnonzero(columns)
    room = b[targets] >= min(_ROOM * a[light].sum(), b.max())
    costs = M[np.ix_(light, targets[room])] - prices[room]
    G[light, targets[room][costs.argmin(1)]] = a[light] * arrives(costs.min(1))


def _rounded(G: np.ndarray, a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """The nearest way to make the marginals of G exactly a and b: scale down, then fill what is missing."""
    G = G * np.minimum(1, a / np.maximum(G.sum(1), 1e-300))[:, None]
    G = G * np.minimum(1, b / np.maximum(G.sum(0), 1e-300))
    rows, columns = np.maximum(a - G.sum(1), 0), np.maximum(b - G.sum(0), 0)
    room = columns if 2 * columns.sum() > rows.sum() else b  # else what the columns lack is rounding
    return G + np.outer(rows, room / room.sum()) if rows.any() else G
