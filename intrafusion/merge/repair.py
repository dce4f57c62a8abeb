"""Giving a pruned network's channels the statistics that they had: without labels and gradients, layer after layer.

A network that was folded has no BatchNorm left whose statistics could be measured again. To insert one behind a layer, to
measure it, and to fold it back is to scale and shift that layer's outputs, which is what happens here, exactly.
Jordan et al., "REPAIR: REnormalizing Permuted Activations for Interpolation Repair", ICLR 2023.
"""

from intrafusion.errors import IntrafusionError
from intrafusion.merge.fitting import Fit
from intrafusion.norms import norm_of


def reset_norms(fit: Fit) -> None:
    """As if each BatchNorm that was folded had its statistics measured again: mean beta and deviation |gamma| behind it.

    Raises IntrafusionError for a network that had none.
    """
    norms = {name: norm_of(fit.dense.get_submodule(name)) for name in fit.walk.cuts.layers()}
    found = {name: norm for name, norm in norms.items() if norm is not None}
    if not found:
        raise IntrafusionError("this network has no BatchNorm whose statistics could be measured again: choose repair")
    for name, norm in found.items():
        fit.restate(name, norm.beta, norm.gamma.abs())


def repair(fit: Fit) -> None:
    """Every layer's outputs, but the last one's, get the mean and deviation that the dense ones have on the images."""
    for name in fit.walk.cuts.layers()[:-1]:
        fit.restate(name)
