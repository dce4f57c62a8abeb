"""Measure which classifiers can be pruned and write the rows of assets/architectures.csv, each in a separate process.

python tests/benchmarks/architectures.py [NAME ...]: all of torchvision's classifiers and a few of timm's, or the named ones,
such as imagenet/resnet18 or timm/resnet18d, with random weights. Existing rows are kept unless they are named.
A row holds: the parameters, the number of groups found, how many of them can be pruned, the share of all parameters in their
layers, whether dropping and fusing 30 % of them gave finite logits of the right shape, and the most frequent reasons why
groups cannot be pruned. If comparing all channels would take longer than about half a minute, only the groups that are
cheapest to compare are fused, and "fused" is their number.
"""

import copy
import csv
import json
import subprocess
import sys
import warnings
from collections import Counter
from pathlib import Path

import torch
from torch import nn

import intrafusion as itf
from intrafusion.models.sources import torchvision
from intrafusion.pruning.groups.group import Group
from intrafusion.pruning.pruner import prune_groups

TABLE = Path(__file__).parents[2] / "assets" / "architectures.csv"
_WORK = 2e10  # most differences of two numbers when comparing channels
_PATIENCE = 1200  # most seconds per row
_TIMM = (
    "resnet18d", "resnetv2_50", "res2net50_26w_4s", "repvgg_a0", "vgg11_bn", "densenet121", "regnetx_002", "dla34",
    "efficientnet_b0", "tf_efficientnetv2_b0", "mobilenetv3_small_050", "mobilenetv4_conv_small", "ghostnet_100",
    "hardcorenas_a", "convnext_atto", "vit_tiny_patch16_224", "deit_tiny_patch16_224", "mixer_s32_224",
    "resmlp_12_224", "swin_tiny_patch4_window7_224",
)  # fmt: skip


def row(name: str) -> dict[str, object]:
    """Return one row of the table. Raise IntrafusionError if the network cannot be traced at all."""
    model = itf.load_model(name, "random")
    example = model.card.example()
    groups = itf.find_groups(model, example)
    usable = [group for group in groups if group.reason is None]
    reasons = Counter(reason_of(group) for group in groups if group.reason)
    reasons.pop("the network's outputs", None)
    total = sum(parameter.numel() for parameter in model.parameters())
    fused = affordable(model, usable)
    return {
        "name": name, "params": total, "groups": len(groups), "prunable": len(usable),
        "share": round(held(model, usable) / total, 3),
        "drop": runs(model, "drop", usable, groups), "fusion": runs(model, "fusion", fused, groups),
        "fused": len(fused), "why not": "; ".join(f"{count} {reason}" for reason, count in reasons.most_common(2)),
    }  # fmt: skip


def reason_of(group: Group) -> str:
    """Return a group's reason without layer names."""
    reason = str(group.reason).replace("these channels are ", "").partition(" (")[0].partition(": ")[0]
    return reason.replace("its channels ", "").replace("its coupling ", "").partition(", ")[0]


def held(model: nn.Module, groups: list[Group]) -> int:
    """Return how many parameters are in rows or columns that these groups can lose."""
    marks = {name: torch.zeros_like(parameter, dtype=torch.bool) for name, parameter in model.named_parameters()}
    for group in groups:
        for layer in group.layers:
            for kind, view in layer.views(_Marked(model, marks)).items():
                if not kind.startswith("running"):
                    view[layer.positions[layer.present()].flatten()] = True
    return sum(int(mark.sum()) for mark in marks.values())


class _Marked:
    """A stand-in for the model, for `Layer.views`, with marks in place of parameters."""

    def __init__(self, model: nn.Module, marks: dict[str, torch.Tensor]):
        self.model, self.marks = model, marks

    def get_submodule(self, name: str) -> nn.Module:
        module = copy.copy(self.model.get_submodule(name))
        module._parameters = {
            kind: None if value is None else nn.Parameter(self.marks[f"{name}.{kind}"], requires_grad=False)
            for kind, value in module._parameters.items()
        }
        return module


def affordable(model: nn.Module, groups: list[Group]) -> list[Group]:
    """Return the groups whose channels can be compared within the work limit, cheapest first, and at least one."""

    def work(group: Group) -> float:
        views = [view for layer in group.layers for kind, view in layer.views(model).items() if kind == "weight"]
        return group.size * sum(view.numel() for view in views) / 2

    left, chosen = _WORK, []
    for group in sorted(groups, key=work):
        left -= work(group)
        if left < 0 and chosen:
            break
        chosen.append(group)
    return chosen


def runs(model: nn.Module, merge: str, chosen: list[Group], groups: list[Group]) -> str:
    """Prune 30 % of the channels of the chosen groups. Return "yes" if the logits are valid, else what is wrong."""
    if not chosen:
        return "nothing to prune"
    try:
        small = prune_groups(model, groups, 0.3, "l1", merge, [group.name for group in chosen])
        logits = small(model.card.example())
    except Exception as error:
        return f"{type(error).__name__}: {error}"[:200]
    fits = tuple(logits.shape) == (1, model.card.classes) and bool(torch.isfinite(logits).all())
    return "yes" if fits else f"logits {tuple(logits.shape)}"


def measured(name: str) -> dict[str, object]:
    """Measure a network in a child process. Return its row, or a row with the reason for the failure."""
    try:
        told = subprocess.run([sys.executable, __file__, "--one", name], capture_output=True, text=True, timeout=_PATIENCE)
    except subprocess.TimeoutExpired:
        return {"name": name, "why not": f"not within {_PATIENCE} s"}
    if told.returncode:
        return {"name": name, "why not": (told.stderr.strip().splitlines() or ["out of memory"])[-1][:200]}
    return json.loads(told.stdout.splitlines()[-1])


def main(names: list[str]) -> None:
    known = {found["name"]: found for found in csv.DictReader(TABLE.open())} if TABLE.exists() else {}
    every = [*torchvision.names(), *(f"timm/{name}" for name in _TIMM)]
    for name in names or [name for name in every if name not in known]:
        known[name] = measured(name)
        print(known[name], flush=True)
        columns = ["name", "params", "groups", "prunable", "share", "drop", "fusion", "fused", "why not"]
        with TABLE.open("w", newline="") as file:
            writer = csv.DictWriter(file, columns)
            writer.writeheader()
            writer.writerows(known[name] for name in sorted(known))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--one"]:
        warnings.simplefilter("ignore")
        print(json.dumps(row(sys.argv[2])))
    else:
        main(sys.argv[1:])
