"""What every source does with a weights file: the card beside it, the layers that the card describes, the weights."""

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor, nn

from intrafusion.cards import ModelCard, read_card
from intrafusion.saved import set_layers
from intrafusion.weights import load_state


def filled(model: nn.Module, card: ModelCard, state: Mapping[str, Tensor], path: Path) -> tuple[nn.Module, ModelCard]:
    """The model with the layers of the card beside the file and these weights, which came from it, and that card."""
    card = read_card(path.with_suffix(".json"), card)
    set_layers(model, card.details.get("layers", {}), state)
    load_state(model, dict(state), path, card.name)
    return model, card
