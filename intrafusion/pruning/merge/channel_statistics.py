"""Restoring the statistics of a pruned network's channels, layer after layer, without labels or gradients.

A folded network has no BatchNorm left whose statistics could be measured again. Inserting a BatchNorm behind a layer, measuring
it and folding it back is the same as scaling and shifting the layer's outputs, so this module does that directly and exactly.
Jordan et al., "REPAIR: REnormalizing Permuted Activations for Interpolation Repair", ICLR 2023.
"""

from torch import nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd

from intrafusion.errors import IntrafusionError
from intrafusion.pruning.groups.norms import norm_of
from intrafusion.pruning.merge.least_squares import Fit


def reset_norms(fit: Fit) -> None:
    """Measure every norm's statistics again, from input to output; folded BatchNorms are treated as if they were present.

    The outputs of a layer with a folded norm get the mean beta and the deviation |gamma|. InstanceNorms with running statistics
    are measured as BatchNorms are. Raises IntrafusionError for a network without any norm, and for a norm that runs more than
    once.
    """
    folded = {name: norm for name, layer in fit.dense.named_modules() if (norm := norm_of(layer))}
    if not folded and not fit.norms:
        raise IntrafusionError("this network has no BatchNorm statistics to measure; choose recovery repair")
    for name in fit.once({*folded, *fit.norms}, _ConvNd, nn.Linear, _NormBase):
        if name in fit.norms:
            fit.measure(name)
        else:
            fit.restate(name, folded[name].beta, folded[name].gamma.abs())


def repair(fit: Fit) -> None:
    """Give the outputs of every layer but the last the mean and deviation that the dense network's have on the images.

    Layers are convolutions and linear layers. Layers that run more than once or cannot be fitted are left alone, and so are
    norms that were not folded.
    """
    for name in fit.walk.cuts.layers()[:-1]:
        if name not in fit.odd:
            fit.restate(name)
