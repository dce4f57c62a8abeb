"""Print the speed table for assets/docs/results.md: ResNet-18 and MobileNetV2, with any widths and with multiples of 8.

python tests/benchmarks/speed_table.py [--threads 2] [--runs 30] [--device cpu]

Weights are random and the last channels are removed, since neither affects the time. BatchNorm is folded in both networks.
"""

import argparse
import copy
import time

import torch
from torch import nn

import intrafusion as itf
from intrafusion.evaluation.latency import LatencyComparison, Speed, compare_latency
from intrafusion.pruning.groups.norms import fold_groups
from intrafusion.pruning.groups.surgery import shrink
from intrafusion.pruning.transport.planning import group_counts

MODELS = "imagenet/resnet18", "imagenet/mobilenet_v2"
CASES = (0.3, 1), (0.3, 8), (0.5, 1), (0.5, 8)


def narrow(dense: nn.Module, groups: list[itf.Group], sparsity: float, round_to: int) -> nn.Module:
    """Return a copy of the network without the last channels of each block."""
    small, kept = copy.deepcopy(dense), {}  # type: nn.Module, dict
    for group in groups:
        if group.reason is None:
            counts = group_counts(group, sparsity, round_to)
            stays = [(group.block == block).nonzero()[:k, 0] for block, k in enumerate(counts)]
            kept[group] = torch.cat(stays).sort().values
    shrink(small, kept)
    return small


def row(name: str, sparsity: float, round_to: int, found: LatencyComparison) -> str:
    def pair(before: float, after: float, unit: float, form: str = ".1f") -> str:
        return f"{before / unit:{form}} → {after / unit:{form}}"

    first, last = found.before, found.after
    cells = [name.removeprefix("imagenet/"), f"{sparsity:.0%}", str(round_to)]
    cells += [pair(first.params, last.params, 1e6), pair(first.macs, last.macs, 1e9, ".2f")]
    cells += [pair(first.bytes, last.bytes, 1e6), pair(first.memory, last.memory, 1e6, ".0f")]
    for one, before, after in zip(found.ratios, *map(latencies, (first, last)), strict=True):
        low, high = one.interval
        cells.append(f"{pair(before, after, 1e-3)}: {one.times:.2f} ({low:.2f} to {high:.2f}), {one.verdict}")
    return f"| {' | '.join(cells)} |"


def latencies(speed: Speed) -> list[float]:
    return [one.median for one in speed.latencies]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--runs", type=int, default=30)
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    begun = time.perf_counter()
    for name in MODELS:
        model = itf.load_model(name, weights="random", device=args.device)
        example = model.card.example().to(args.device)
        groups = itf.find_groups(model, example)
        fold_groups(model, groups)
        for sparsity, round_to in CASES:
            *_, found = compare_latency(model, narrow(model, groups, sparsity, round_to), example, runs=args.runs)
            print(row(name, sparsity, round_to, found), flush=True)
    print(f"{found.device}; {time.perf_counter() - begun:.0f} s")


if __name__ == "__main__":
    main()
