"""Calibrated and refit merges: closed-form solutions on unlabelled images, on dropped or on fused producers.

`calibrated` is GRAIL (Tang, Wang, Thiele & Saukh, arXiv 2602.23795), which is also the group update of Optimal Brain Surgeon.
This project adds the intercept, and solves each layer on its inputs in the network pruned so far. `refit` is the least-squares
reconstruction of He, Zhang & Sun (ICCV 2017) and of ThiNet (Luo, Wu & Lin, ICCV 2017). This project adds the ridge towards the
present weights, with a strength chosen on held-out images, and the target behind a residual sum, which compensates for earlier
errors.
"""

from intrafusion._registry import MERGES
from intrafusion.pruning.groups.group import CONSUMER
from intrafusion.pruning.merge.drop_and_fusion import drop, fusion
from intrafusion.pruning.merge.least_squares import Fit

CALIBRATED = "each consumer reads dense channels predicted from the kept ones: `W' = W M^T`, M by ridge regression"
REFIT = "calibrated, then the whole weight of each consumer is refitted to the outputs of the dense network"


def calibrate(fit: Fit) -> None:
    """Calibrate every consumer of a pruned group, from input to output."""
    for name in _consumers(fit):
        fit.calibrate(name)


def refit(fit: Fit) -> None:
    """Calibrate every consumer of a pruned group and then refit its whole weight, from input to output."""
    for name in _consumers(fit):
        fit.calibrate(name)
        fit.refit(name)


def refit_all(fit: Fit) -> None:
    """Refit every layer from the first one that lost channels to the last, including those that write pruned channels.

    Layers that read pruned channels are calibrated first. Convolutions with several groups, and layers that cannot be fitted,
    are not refitted.
    """
    reading, layers = _consumers(fit), fit.walk.cuts.layers()
    touched = {layer.name for merged in fit.merged for layer in merged.group.layers}
    for name in layers[min(i for i, name in enumerate(layers) if name in touched) :]:
        if name in reading:
            fit.calibrate(name)
        if getattr(fit.small.get_submodule(name), "groups", 1) == 1 and name not in fit.odd:
            fit.refit(name)


def _consumers(fit: Fit) -> list[str]:
    """Return the layers that read pruned channels, in their order. Raises IntrafusionError if one does not run exactly once."""
    return fit.once({layer.name for merged in fit.merged for layer in merged.group.role(CONSUMER)})


_GRAIL = "after Tang et al. (GRAIL), arXiv 2602.23795"
_HE = "after He et al., ICCV 2017; Luo et al. (ThiNet), ICCV 2017"
_CALIBRATED = "GRAIL's ridge regression; ours: with an intercept, and on the inputs of the network as pruned so far"
_REFIT = (
    "least-squares reconstruction; ours: a ridge towards the present weights, chosen on held-out images, and the target of a "
    "residual sum"
)
_WAYS = {
    "calibrated": (calibrate, CALIBRATED),
    "refit": (refit, REFIT),
    "refit-all": (refit_all, "refit, as are all layers from the first one that lost channels to the last"),
}
for _name, (_fit, _summary) in _WAYS.items():
    _paper, _differs = (_GRAIL, _CALIBRATED) if _name == "calibrated" else (_HE, _REFIT)
    MERGES.register(_name, f"dropped, then {_summary}", _paper, "images", fit=_fit, transports=False, differs=_differs)(drop)
    MERGES.register(f"{_name}-fusion", f"fused, then as {_name}", _paper, "images", fit=_fit, differs=_differs)(fusion)
