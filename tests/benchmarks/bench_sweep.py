"""Time a sensitivity study against a plain notebook-style loop, in one run.

python tests/benchmarks/bench_sweep.py WEIGHTS DATA [MODEL] [--every 5] [--ablation ROUNDS]

For each point, the loop makes a deep copy and a dependency graph, prunes, and evaluates with a DataLoader of 4 workers. It
runs every 5th point of the study, half of them before and half after our sweeps, which run all points. For early decisions, the
images that each point took are counted, beside those of the rule of three looks on the same answers.

--ablation: instead, run every 5th point with each of the parts that make a sweep fast switched off in turn, in ROUNDS rounds,
and print how much processor time a study takes without the part, relative to the whole: the median of the rounds.
"""

import argparse
import contextlib
import copy
import statistics
import sys
import time
import warnings
from pathlib import Path
from unittest import mock

import intrafusion as itf  # before torchvision, which it makes importable

# isort: split
import numpy as np
import torch
import torch_pruning
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms

from intrafusion.evaluation import incremental
from intrafusion.models.fx import partition
from intrafusion.pruning.pruner import prune_groups
from intrafusion.spec import PruneSpec
from intrafusion.studies.measurement import Result
from intrafusion.studies.session import Session, open_session
from intrafusion.studies.study_file import Study
from intrafusion.studies.sweeps import sweep

sys.path.insert(0, str(Path(__file__).parents[1] / "support"))
from three_looks import three_looks

PARTS = {  # parts that make a sweep fast: where each is looked up, and what does the same without it
    "screening": (incremental.Meter, "_screening_twin", lambda meter: None),
    "output mixing": (incremental, "remixed", lambda dense, network, names: (network, frozenset())),
    "fused ReLU": (partition, "join_relus", lambda graph, model: None),
}


class Images(Dataset):
    """CIFAR as served by torchvision: each access converts a PIL image to a tensor and normalises it."""

    def __init__(self, data: itf.ImageData, card: itf.ModelCard):
        self.images, self.labels = data.images.permute(0, 2, 3, 1).contiguous().numpy(), data.labels.tolist()
        self.transform = transforms.Compose([transforms.ToTensor(), transforms.Normalize(card.mean, card.std)])

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        return self.transform(Image.fromarray(self.images[index])), self.labels[index]


def plain(spec: PruneSpec, session: Session, images: Images) -> tuple[list[bool], float]:
    """Run one point of the loop. Return which images are classified correctly, in data order, and the seconds taken."""
    start = time.perf_counter()
    network = copy.deepcopy(session.model).requires_grad_(True)
    with warnings.catch_warnings(), torch.enable_grad():
        warnings.simplefilter("ignore")
        torch_pruning.DependencyGraph().build_dependency(network, example_inputs=session.example)
        small = prune_groups(session.model, session.groups, spec.sparsity, "l1", spec.merge, spec.groups)
        right: list[bool] = []
        with torch.no_grad():
            for batch, labels in DataLoader(images, batch_size=128, num_workers=4):
                right += (small(batch).argmax(1) == labels).tolist()
    return right, time.perf_counter() - start


def ours(specs: list[PruneSpec], arguments: argparse.Namespace, **options: object) -> tuple[dict, float]:
    """Return the last result of each point and the seconds of the whole study, without loading."""
    session = opened(arguments)
    start = time.perf_counter()
    found = {result.spec: result for result in sweep(specs, session, **options)}
    return found, time.perf_counter() - start


def ablation(specs: list[PruneSpec], arguments: argparse.Namespace) -> None:
    """Print the processor time of a study without each of `PARTS`, relative to the time with all of them."""
    times: dict[str, list[float]] = {name: [] for name in ("nothing", *PARTS)}
    for _ in range(arguments.ablation):
        for name, seconds in times.items():
            session = opened(arguments)
            with contextlib.ExitStack() as stack:
                if name in PARTS:
                    owner, attribute, replacement = PARTS[name]
                    stack.enter_context(mock.patch.object(owner, attribute, replacement))
                start = time.process_time()
                for _ in sweep(specs, session):
                    pass
                seconds.append(time.process_time() - start)
                print(f"without {name}: {seconds[-1]:.1f} s of processor time", flush=True)
    for name in PARTS:
        ratios = [without / whole for without, whole in zip(times[name], times["nothing"], strict=True)]
        print(f"without {name}: {statistics.median(ratios):.3f} times the time ({min(ratios):.3f} to {max(ratios):.3f})")


def opened(arguments: argparse.Namespace) -> Session:
    model = arguments.model
    return open_session(PruneSpec(model=model, dataset="cifar10", weights=arguments.weights, data_path=arguments.data))


def answers(result: Result, session: Session) -> np.ndarray:
    """Return which images are classified correctly, in data order."""
    from intrafusion.evaluation.accuracy import stratified

    labels = session.images().subset(result.spec.limit, result.spec.seed).labels
    right = np.zeros(len(labels), bool)
    right[stratified(labels, result.spec.seed).numpy()] = np.unpackbits(
        np.frombuffer(result.correct, np.uint8), count=result.count
    )
    return right


def images_of_three_looks(found: dict[PruneSpec, Result]) -> float:
    """Return the images a point that the rule of three looks would take, from complete results of both merges."""
    pairs = [(found[spec.but(merge="fusion")], result) for spec, result in found.items() if spec.merge == "drop"]
    bits = [[np.unpackbits(np.frombuffer(r.correct, np.uint8), count=r.count).astype(int) for r in pair] for pair in pairs]
    return float(three_looks(np.array([fused - dropped for fused, dropped in bits])).mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("weights")
    parser.add_argument("data")
    parser.add_argument("model", nargs="?", default="cifar10-resnet20")
    parser.add_argument("--every", type=int, default=5)
    parser.add_argument("--ablation", type=int, default=0, metavar="ROUNDS")
    arguments = parser.parse_args()
    session = opened(arguments)
    names = tuple(group.name for group in session.groups if group.reason is None)
    base = bench_spec = PruneSpec(
        model=arguments.model, dataset="cifar10", weights=arguments.weights, data_path=arguments.data, limit=2000
    )
    axes = {"groups": names, "sparsity": (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7), "merge": ("drop", "fusion")}
    specs = Study("session", base, axes).specs(session.groups)
    if arguments.ablation:
        ablation(specs[:: arguments.every], arguments)
        return
    images = Images(session.images().subset(bench_spec.limit, 0), session.card)
    sample = specs[:: arguments.every]
    print(f"{len(specs)} points, {len(images):,} images, {torch.get_num_threads()} threads")
    loops = [plain(spec, session, images) for spec in sample[::2]]
    ways = {
        "exact": ({}, {}), "exact, early decisions": ({}, {"decide": True}),
        "fast": ({"precision": "fast"}, {}), "fast, early decisions": ({"precision": "fast"}, {"decide": True}),
    }  # fmt: skip
    measured = {
        name: ours([spec.but(**changes) for spec in specs], arguments, **options) for name, (changes, options) in ways.items()
    }
    loops += [plain(spec, session, images) for spec in sample[1::2]]
    a_point = statistics.mean(seconds for _, seconds in loops)
    print(f"plain loop: {a_point:.2f} s a point ({len(loops)} of them measured)")
    for name, (found, seconds) in measured.items():
        ratio, count = a_point * len(specs) / seconds, statistics.mean(result.count for result in found.values())
        print(
            f"{name}: {seconds:.1f} s, {seconds / len(specs):.3f} s a point, {ratio:.1f} times faster; "
            f"{count:.0f} images a point"
        )
    for name in ("exact", "fast"):
        print(f"{name}: three looks would take {images_of_three_looks(measured[name][0]):.0f} images a point")
    exact = measured["exact"][0]
    pairs = zip([*sample[::2], *sample[1::2]], loops, strict=True)
    flips = sum(int((answers(exact[spec], session) != np.array(right)).sum()) for spec, (right, _) in pairs)
    print(f"exact against the loop: {flips} of {len(loops) * len(images):,} answers differ")


if __name__ == "__main__":
    main()
