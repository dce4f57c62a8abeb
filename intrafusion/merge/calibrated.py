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


def _consumers(fit: Fit) -> list[str]:
    reading = {layer.name for merged in fit.merged for layer in merged.group.role(CONSUMER)}
    return [name for name in fit.walk.cuts.layers() if name in reading]


MERGES.register("calibrated", f"dropped, then {CALIBRATED}", "ours", "images", fit=calibrate)(drop)
MERGES.register("calibrated-fusion", "fused, then calibrated in the same way", "ours", "images", fit=calibrate)(fusion)
MERGES.register("refit", f"dropped, then {REFIT}", "ours", "images", fit=refit)(drop)
MERGES.register("refit-fusion", "fused, then calibrated and refitted in the same way", "ours", "images", fit=refit)(
    fusion
)
