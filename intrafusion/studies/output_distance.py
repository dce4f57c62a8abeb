"""The effect of pruning on a network's outputs: how far the logits of each image move, and which predictions change."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from intrafusion.studies.weight_space import THREE, Solutions

KINDS = {  # label -> whether the dense, dropped and fused networks are right
    "fusion keeps": (True, False, True),
    "both lose": (True, False, False),
    "only fusion loses": (True, True, False),
    "only fusion gains": (False, False, True),
    "only dropping gains": (False, True, False),
    "both gain": (False, True, True),
    "wrong otherwise": (False, False, False),
}


@dataclass(frozen=True, eq=False)
class Outputs:
    """The outputs of the dense, dropped and fused networks on the same images.

    logits: float (N, classes) by network name, for the networks evaluated so far. labels: int64 (N,).
    """

    logits: Mapping[str, Tensor]
    labels: Tensor
    classes: tuple[str, ...]

    @property
    def share(self) -> float:
        """The share of the work that is done, in [0, 1]."""
        return len(self.logits) / len(THREE)

    def distance(self, name: str) -> Tensor:
        """Return the L2 distance of each image's logits from the dense network's: (N,)."""
        return (self.logits[name] - self.logits["dense"]).norm(dim=1)

    def predictions(self, name: str) -> Tensor:
        """Return the predicted class of each image: int64 (N,)."""
        return self.logits[name].argmax(1)

    def rows(self) -> list[dict[str, Any]]:
        """Return a JSON-serialisable row for each image: its class, the three predictions, and how far its logits moved.

        All three networks must have been evaluated.
        """
        said = {name: self.predictions(name).tolist() for name in THREE}
        moved = {name: self.distance(name).tolist() for name in THREE[1:]}
        return [
            {"image": i, "class": self.classes[label] if label >= 0 else ""}
            | {name: self.classes[said[name][i]] for name in THREE}
            | {f"{name}_distance": moved[name][i] for name in THREE[1:]}
            for i, label in enumerate(self.labels.tolist())
        ]

    def medians(self, name: str) -> dict[str, float]:
        """Return the median distance for each class that has images."""
        distance, found = self.distance(name), self.labels.unique().tolist()
        return {self.classes[c]: float(distance[self.labels == c].median()) for c in found if c >= 0}

    def changed(self) -> dict[str, Tensor]:
        """Return the images whose prediction changes in the dropped or the fused network: rows (n,) for each of KINDS.

        Each kind is sorted by the dense network's largest probability, most confident first.
        """
        said = torch.stack([self.predictions(name) for name in THREE])
        right, changed = said == self.labels, (said != said[0]).any(0)
        order = self.logits["dense"].softmax(1).amax(1).argsort(descending=True, stable=True)
        return {kind: order[((right == torch.tensor(are)[:, None]).all(0) & changed)[order]] for kind, are in KINDS.items()}


def outputs(solutions: Solutions) -> Iterator[Outputs]:
    """Evaluate the three networks on the evaluation images; yields the outputs after each network."""
    data, found = solutions.images, {}
    for name in THREE:
        found[name] = solutions.logits(name)
        yield Outputs(dict(found), data.labels.cpu(), data.classes)
