"""Test whether two solutions lie in one valley: SGD's and SDprun's, from the same start and the same order of images.

python tests/benchmarks/valley.py [MODEL] [EPOCHS] [REACH] [DATA]: trains both with the lab. Then it measures the straight
line and a trained Bezier path between them, with BatchNorm statistics measured again at 61 points, and the share of the
displacement in the ten sharpest directions of the training loss at SGD's solution. It measures the same from SGD's solution
to its one-shot pruned versions, dropped and fused.
"""

import sys
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import intrafusion as itf
from intrafusion.evaluation.loss_landscape import flatten_weights, lanczos, share_within
from intrafusion.pruning.groups.feature_maps import normalised, private
from intrafusion.pruning.groups.surgery import pad
from intrafusion.pruning.pruner import cut
from intrafusion.training.methods.runs import LabRun, run_training
from intrafusion.training.methods.sdprun import zeroed
from intrafusion.training.methods.spec import TrainSpec
from intrafusion.training.mode_connectivity import connect


def solution(spec: TrainSpec) -> LabRun:
    *_, found = run_training(spec)
    assert isinstance(found, LabRun)
    return found


def sharp(model: nn.Module, data: itf.ImageData, count: int = 10, steps: int = 40) -> Tensor:
    """Return the sharpest directions of the training loss, (D, count)."""
    network = private(model).requires_grad_(True)
    inputs, labels = (torch.cat(part) for part in zip(*normalised(network, data), strict=True))
    *_, found = lanczos(lambda one: F.cross_entropy(one(inputs), labels), network, count, steps, 0)
    return found.vectors


def tell(name: str, first: nn.Module, last: nn.Module, directions: Tensor, seen: itf.ImageData, data: itf.ImageData) -> None:
    *_, path = connect(first, last, seen, data)
    moved = flatten_weights(last) - flatten_weights(first)
    changed = moved != 0
    noise = torch.randn(20, len(moved), generator=torch.Generator().manual_seed(0), dtype=torch.float64) * changed
    chance = sum(share_within(one, directions) for one in noise) / len(noise)
    line, curve = path.line, path.curve
    print(
        f"| {name} | {100 * line.accuracy[0]:.1f} / {100 * line.accuracy[-1]:.1f} | {float(moved.norm()):.1f} "
        f"| {100 * line.accuracy.min():.1f}, {line.barrier:.2f} | {100 * curve.accuracy.min():.1f}, {curve.barrier:.2f} "
        f"| {share_within(moved, directions):.2%} / {chance:.2%} |",
        flush=True,
    )


def pruned(model: nn.Module, shares: Mapping[str, float], merge: str) -> nn.Module:
    """Return a pruned network in the folded model's shape, with zeros in place of the removed channels."""
    groups = itf.find_groups(model, model.card.example())
    made = cut(model, groups, shares, "l1", merge)
    whole = pad(made.small, made.dense(), {one.group: one.kept for one in made.merged})
    whole.card = model.card
    return whole


def main(model: str = "digits-vgg", epochs: str = "20", reach: str = "1.4", path: str | None = None) -> None:
    spec = TrainSpec(model=model, method="sdprun", epochs=float(epochs), reach=0.0, data_path=path)
    plain, lean = solution(spec), solution(spec.but(reach=float(reach)))
    a, b = plain.model, lean.model
    card = a.card
    data = itf.load_data(card.dataset, path=path).subset(2000)
    seen = itf.load_calibration(card.dataset, path, limit=2000)
    few = seen.subset(256)
    print(f"{model}, {epochs} epochs: SGD {plain.outcome.accuracy:.1%}, SDprun {lean.outcome.accuracy:.1%}, ", end="")
    print(f"{lean.outcome.params / lean.outcome.dense_params:.0%} of the parameters; {len(data):,} test images")
    print("| from SGD's solution to | both ends | distance | line: least accuracy, barrier | path: the same | share / chance |")
    print("|---|---|---|---|---|---|")
    tell("SDprun's", a, b, sharp(a, few), seen, data)
    gone = zeroed(one for one in _channels(b))
    shares = {name: min(float(zero.double().mean()), 1 - 1.01 / len(zero)) for name, zero in gone.items() if zero.any()}
    folded = itf.fold(a, card.example())
    folded.card = card
    directions = sharp(folded, few)
    for merge in ("drop", "fusion"):
        tell(f"itself, {merge}, as many channels gone", folded, pruned(a, shares, merge), directions, seen, data)


def _channels(model: nn.Module) -> list:
    from intrafusion.training.methods.sdprun import channels_of

    return channels_of(model, itf.find_groups(model, model.card.example()))


if __name__ == "__main__":
    main(*sys.argv[1:])
