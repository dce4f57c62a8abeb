"""Giving a pruned network's channels the statistics that they had: without labels and gradients, layer after layer.

A network that was folded has no BatchNorm left whose statistics could be measured again. To insert one behind a layer, to
measure it, and to fold it back is to scale and shift that layer's outputs, which is what happens here, exactly.
Jordan et al., "REPAIR: REnormalizing Permuted Activations for Interpolation Repair", ICLR 2023.
"""

from torch import nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd

from intrafusion.errors import IntrafusionError
from intrafusion.pruning.groups.norms import norm_of
from intrafusion.pruning.merge.least_squares import Fit


def reset_norms(fit: Fit) -> None:
    """Every norm's statistics are measured again, from input to output; of BatchNorms that were folded as if they were there.

    Behind a layer with a norm folded in the mean becomes beta and the deviation |gamma|. InstanceNorms with running
    statistics are measured as BatchNorms are. Raises IntrafusionError for a network without any, and for a norm that runs
    more than once.
    """
    folded = {name: norm for name, layer in fit.dense.named_modules() if (norm := norm_of(layer))}
    if not folded and not fit.norms:
        raise IntrafusionError("this network has no BatchNorm whose statistics could be measured again: choose repair")
    for name in fit.once({*folded, *fit.norms}, _ConvNd, nn.Linear, _NormBase):
        if name in fit.norms:
            fit.measure(name)
        else:
            fit.restate(name, folded[name].beta, folded[name].gamma.abs())


def repair(fit: Fit) -> None:
    """The outputs of every layer but the last get the mean and deviation that the dense ones have on the images.

    Layers are convolutions and linear layers; those that run more than once, and those that cannot be fitted, stay as they
    are, and so do norms that were not folded.
    """
    for name in fit.walk.cuts.layers()[:-1]:
        if name not in fit.odd:
            fit.restate(name)
