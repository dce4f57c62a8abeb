"""What pruning does to a network's answers: how far the logits move, image by image, and which predictions change."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from intrafusion.studies.weight_space import THREE, Solutions

KINDS = {  # in words: whether dense, dropped and fused networks are right
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
    """The answers of dense, dropped and fused networks to the same images.

    logits: float (N, classes) by name, those that are there so far; labels: int64 (N,).
    """

    logits: Mapping[str, Tensor]
    labels: Tensor
    classes: tuple[str, ...]

    @property
    def share(self) -> float:
        """How much of the work is done, in [0, 1]."""
        return len(self.logits) / len(THREE)

    def distance(self, name: str) -> Tensor:
        """L2 distance of the logits to the dense network's, for each image: (N,)."""
        return (self.logits[name] - self.logits["dense"]).norm(dim=1)

    def predictions(self, name: str) -> Tensor:
        """int64 (N,)."""
        return self.logits[name].argmax(1)

    def rows(self) -> list[dict[str, Any]]:
        """JSON-able, once all is there: each image's class, the three predictions, and how far its logits moved."""
        said = {name: self.predictions(name).tolist() for name in THREE}
        moved = {name: self.distance(name).tolist() for name in THREE[1:]}
        return [
            {"image": i, "class": self.classes[label] if label >= 0 else ""}
            | {name: self.classes[said[name][i]] for name in THREE}
            | {f"{name}_distance": moved[name][i] for name in THREE[1:]}
            for i, label in enumerate(self.labels.tolist())
        ]

    def medians(self, name: str) -> dict[str, float]:
        """The median distance over the images of each class that has any."""
        distance, found = self.distance(name), self.labels.unique().tolist()
        return {self.classes[c]: float(distance[self.labels == c].median()) for c in found if c >= 0}

    def changed(self) -> dict[str, Tensor]:
        """Which images have another prediction than before in the dropped or the fused network: rows (n,) of each of KINDS.

        Within a kind those come first on whose prediction the dense network was surest (largest probability).
        """
        said = torch.stack([self.predictions(name) for name in THREE])
        right, changed = said == self.labels, (said != said[0]).any(0)
        order = self.logits["dense"].softmax(1).amax(1).argsort(descending=True, stable=True)
        return {kind: order[((right == torch.tensor(are)[:, None]).all(0) & changed)[order]] for kind, are in KINDS.items()}


def outputs(solutions: Solutions) -> Iterator[Outputs]:
    """The three networks' answers to the evaluation images, each time of one more."""
    data, found = solutions.images, {}
    for name in THREE:
        found[name] = solutions.logits(name)
        yield Outputs(dict(found), data.labels.cpu(), data.classes)
