"""Calibrated and refit merges (ours): closed-form solutions on unlabelled images, on dropped or on fused producers."""

from intrafusion.channels import CONSUMER
from intrafusion.merge.base import drop, fusion
from intrafusion.merge.fitting import Fit
from intrafusion.registry import MERGES

CALIBRATED = "each consumer reads the dense channels as the kept ones predict them: `W' = W M^T`, M by ridge regression"
REFIT = "calibrated, then each layer is solved for whole, to give what the dense network gives there"


def calibrate(fit: Fit) -> None:
    """Every consumer of a pruned group, from input to output."""
    for name in _consumers(fit):
        fit.calibrate(name)


def refit(fit: Fit) -> None:
    """Every consumer of a pruned group, from input to output: calibrated, then its whole weight."""
    for name in _consumers(fit):
        fit.calibrate(name)
        fit.refit(name)


def refit_all(fit: Fit) -> None:
    """Every layer from the first one that lost channels on, those that write pruned channels and the last one too.

    Convolutions of several groups, and layers that cannot be fitted, stay as the merge left them.
    """
    reading, layers = _consumers(fit), fit.walk.cuts.layers()
    touched = {layer.name for merged in fit.merged for layer in merged.group.layers}
    for name in layers[min(i for i, name in enumerate(layers) if name in touched) :]:
        if name in reading:
            fit.calibrate(name)
        if getattr(fit.small.get_submodule(name), "groups", 1) == 1 and name not in fit.odd:
            fit.refit(name)


def _consumers(fit: Fit) -> list[str]:
    """The layers that read pruned channels, in their order. Raises IntrafusionError where one does not run exactly once."""
    return fit.once({layer.name for merged in fit.merged for layer in merged.group.role(CONSUMER)})


_WAYS = {
    "calibrated": (calibrate, CALIBRATED),
    "refit": (refit, REFIT),
    "refit-all": (refit_all, "refit, and so are all layers from the first that lost channels to the last"),
}
for _name, (_fit, _summary) in _WAYS.items():
    MERGES.register(_name, f"dropped, then {_summary}", "ours", "images", fit=_fit, transports=False)(drop)
    MERGES.register(f"{_name}-fusion", f"fused, then as {_name}", "ours", "images", fit=_fit)(fusion)
