"""Folding of every BatchNorm into the layer before it, without changing the outputs."""

from torch import Tensor, nn

from intrafusion.models.fx.sharing import check_call, check_finite, set_modes, twin
from intrafusion.pruning.groups.find import find_groups
from intrafusion.pruning.groups.norms import fold_groups
from intrafusion.pruning.groups.norms import norm_of as norm_of


def fold(model: nn.Module, example: Tensor) -> nn.Module:
    """Fold every BatchNorm that directly follows a layer into it, in a copy of the network.

    example: one input, float (1, C, H, W). Norms that follow a sum or a concatenation are not folded. Neither are norms whose
    folding would change the logits, for example behind a layer with a custom forward, or in half precision, where rounding
    changes them too much. Raises IntrafusionError for a network that cannot be traced or copied, and for NaN or infinite
    weights.

    Examples
    --------
    >>> import intrafusion as itf
    >>> model = itf.load_model("digits-vgg")
    >>> folded = itf.fold(model, model.card.example())
    >>> [sum(type(layer).__name__ == "BatchNorm2d" for layer in network.modules()) for network in (model, folded)]
    [6, 0]
    """
    check_call(model, example)
    check_finite(model.named_modules())
    folded = twin(model)
    fold_groups(folded, find_groups(model, example))
    set_modes(folded, model)
    return folded
