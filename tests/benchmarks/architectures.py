"""Which classifiers can be pruned: the rows of assets/architectures.csv, each measured in a process of its own.

python tests/benchmarks/architectures.py [NAME ...]: all of torchvision's and a few of timm's, or those named, as
imagenet/resnet18 or timm/resnet18d; weights drawn at random. Rows that are there already stay, unless they are named.
A row: parameters, groups found, how many of them can be pruned and what share of all parameters their layers hold, whether
dropping and fusing 30 % of them gave finite logits of the right shape, and the most frequent reasons why groups cannot be
pruned. Where comparing all channels would take longer than half a minute or so, only the groups that are cheapest to compare
are fused: "fused" says how many.
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
_WORK = 2e10  # differences of two numbers, in the comparison of channels
_PATIENCE = 1200  # seconds for a row
_TIMM = (
    "resnet18d", "resnetv2_50", "res2net50_26w_4s", "repvgg_a0", "vgg11_bn", "densenet121", "regnetx_002", "dla34",
    "efficientnet_b0", "tf_efficientnetv2_b0", "mobilenetv3_small_050", "mobilenetv4_conv_small", "ghostnet_100",
    "hardcorenas_a", "convnext_atto", "vit_tiny_patch16_224", "deit_tiny_patch16_224", "mixer_s32_224",
    "resmlp_12_224", "swin_tiny_patch4_window7_224",
)  # fmt: skip


def row(name: str) -> dict[str, object]:
    """One line of the table. Raises IntrafusionError where the network cannot be traced at all."""
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
    """A group's reason without the names of layers."""
    reason = str(group.reason).replace("these channels are ", "").partition(" (")[0].partition(": ")[0]
    return reason.replace("its channels ", "").replace("its coupling ", "").partition(", ")[0]


def held(model: nn.Module, groups: list[Group]) -> int:
    """How many parameters lie in rows or columns that these groups can lose."""
    marks = {name: torch.zeros_like(parameter, dtype=torch.bool) for name, parameter in model.named_parameters()}
    for group in groups:
        for layer in group.layers:
            for kind, view in layer.views(_Marked(model, marks)).items():
                if not kind.startswith("running"):
                    view[layer.positions[layer.present()].flatten()] = True
    return sum(int(mark.sum()) for mark in marks.values())


class _Marked:
    """Looks like the model to `Layer.views`, with marks in the place of parameters."""

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
    """The groups whose channels can be compared within the work, the cheapest first."""

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
    """Whether the network without 30 % of the channels of the chosen groups gives logits, or what it gives."""
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
    """The row of a network, or why there is none."""
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
