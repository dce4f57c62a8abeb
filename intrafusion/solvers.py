"""Solvers of one transport problem, from POT. Names follow POT: M cost, a and b marginals, G coupling.

The iterative ones get torch tensors: POT then computes with torch, several times faster here than with numpy.
"""

from dataclasses import dataclass

import numpy as np
import torch

from intrafusion.errors import IntrafusionError
from intrafusion.registry import SOLVERS

_ITERATIONS = {"sinkhorn": 1000, "unbalanced": 500}  # a third of a second on 512 channels


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
        for name in ("reg", "reg_m"):
            if not 0 < getattr(self, name) < float("inf"):
                raise IntrafusionError(f"{name} must be a positive number, not {getattr(self, name)}")
        if not 0 < self.mass <= 1:
            raise IntrafusionError(f"mass must be a share above 0 and at most 1, not {self.mass}")

    @property
    def reducible(self) -> bool:
        """Whether leaving each kept channel's mass where it is belongs to some optimal plan, and is possible."""
        return self.metric and self.kept is not None and bool((self.b - self.a[self.kept]).min() >= -1e-15)

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
    if a[dropped].sum() > 0:
        G[dropped] = _emd(a[dropped], np.maximum(b - a[kept], 0), M[dropped])
    return G


@SOLVERS.register(
    "sinkhorn", "entropy-smoothed plan: every channel is spread, the more so the larger reg", "Cuturi, NeurIPS 2013",
    knobs=("reg",),
)  # fmt: skip
def sinkhorn(problem: Problem) -> np.ndarray:
    """argmin <G, M> - reg H(G) in the log domain, then rounded onto the marginals (Altschuler et al., NeurIPS 2017)."""
    import ot

    def solve(a: np.ndarray, b: np.ndarray, M: np.ndarray) -> np.ndarray:
        G = ot.bregman.sinkhorn_log(
            *map(torch.from_numpy, (a, b, M)), problem.reg * problem.scale, numItermax=_ITERATIONS["sinkhorn"],
            stopThr=1e-5, warn=False,
        )  # fmt: skip
        return _rounded(G.numpy(), a, b)

    return _on_support(problem, solve)


@SOLVERS.register(
    "unbalanced", "marginals are only wished for: far-off channels give up mass, the more so the smaller reg_m",
    "Chapel et al., NeurIPS 2021", knobs=("reg_m",),
)  # fmt: skip
def unbalanced(problem: Problem) -> np.ndarray:
    """argmin <G, M> + reg_m (KL(G 1 | a) + KL(G^T 1 | b)), by majorisation-minimisation."""
    import ot

    def solve(a: np.ndarray, b: np.ndarray, M: np.ndarray) -> np.ndarray:
        G = ot.unbalanced.mm_unbalanced(
            *map(torch.from_numpy, (a, b, M)), problem.reg_m * problem.scale, numItermax=_ITERATIONS["unbalanced"],
            stopThr=1e-9,
        )  # fmt: skip
        return G.numpy()

    return _on_support(problem, solve)


@SOLVERS.register(
    "partial", "only the share `mass` that is cheapest to move is moved: the farthest channels are dropped",
    "Chapel et al., NeurIPS 2020", knobs=("mass",),
)  # fmt: skip
def partial(problem: Problem) -> np.ndarray:
    """argmin <G, M> with G 1 <= a, G^T 1 <= b and sum(G) = mass sum(a), exactly."""
    import ot

    if problem.mass == 1:
        return exact(problem)

    def solve(a: np.ndarray, b: np.ndarray, M: np.ndarray) -> np.ndarray:
        total = a.sum()
        G = ot.partial.partial_wasserstein(a / total, b / total, M, m=problem.mass, numItermax=1_000_000)
        return np.maximum(G, 0) * total

    return _on_support(problem, solve)


def _emd(a: np.ndarray, b: np.ndarray, M: np.ndarray) -> np.ndarray:
    import ot  # a second of imports that a first page view need not pay

    return ot.emd(a, b * (a.sum() / b.sum()), np.ascontiguousarray(M), numItermax=1_000_000)


def _on_support(problem: Problem, solve) -> np.ndarray:
    """Solve between sources and targets that have mass; the others neither give nor take any."""
    rows, columns = problem.a > 0, problem.b > 0
    G = np.zeros_like(problem.M)
    G[np.ix_(rows, columns)] = solve(problem.a[rows], problem.b[columns], problem.M[np.ix_(rows, columns)])
    return G


def _rounded(G: np.ndarray, a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """The nearest way to make the marginals of G exactly a and b: scale down, then fill what is missing."""
    G = G * np.minimum(1, a / np.maximum(G.sum(1), 1e-300))[:, None]
    G = G * np.minimum(1, b / np.maximum(G.sum(0), 1e-300))
    rows, columns = np.maximum(a - G.sum(1), 0), np.maximum(b - G.sum(0), 0)
    missing = rows.sum()
    return G + np.outer(rows, columns) / missing if missing > 0 else G
