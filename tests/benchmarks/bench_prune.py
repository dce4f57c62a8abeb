"""Time pruning alone, without evaluation, on the CPU; paired against another checkout of the project.

python tests/benchmarks/bench_prune.py [CASE ...] [--against CHECKOUT] [--runs N]

Each run is a process of its own; those of the two checkouts alternate. Seconds are processor time of all threads, which a busy
machine disturbs less than wall time, without the time that `find_groups` takes. Networks have random weights and images are
noise: the work is the same.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parents[2]
CASES = {
    "resnet18-fusion": "ResNet-18 for 32 x 32 images, all groups at 50 %, fusion",
    "mobilenet-fold": "MobileNetV2, all groups (up to 1,280 channels) at 50 %, fold",
    "squeezenet-refit-all": "SqueezeNet, all groups at 50 %, l1, refit-all on 500 images of 224 x 224",
    "squeezenet-greedy": "SqueezeNet, all groups at 50 %, greedy, refit-all on 500 images of 224 x 224",
}


def measure(case: str) -> dict[str, float]:
    """Return the seconds of one case, in this process."""
    import torch
    from torch import nn

    import intrafusion as itf  # isort: skip  (before torchvision, which it lets load beside a CPU-only torch)
    import torchvision  # isort: skip

    torch.manual_seed(0)
    side = 32 if case.startswith("resnet") else 224
    if case.startswith("resnet18"):
        model = torchvision.models.resnet18(num_classes=10)
        model.conv1, model.maxpool = nn.Conv2d(3, 64, 3, padding=1, bias=False), nn.Identity()
    else:
        model = (torchvision.models.mobilenet_v2 if "mobilenet" in case else torchvision.models.squeezenet1_1)(num_classes=10)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.3)
            module.running_var.uniform_(0.5, 2)
    model.eval()
    model.card = itf.ModelCard(case, (0.5,) * 3, (0.25,) * 3, (3, side, side), 10, "imagenet")
    example, data = torch.zeros(1, 3, side, side), None
    choices = {"criterion": "l1", "merge": case.partition("-")[2]}
    if case.startswith("squeezenet"):
        images = torch.randint(0, 256, (500, 3, side, side), dtype=torch.uint8)
        data = itf.ImageData("imagenet", "test", images, torch.arange(500) % 10, tuple(map(str, range(10))))
        choices = {"criterion": "greedy" if "greedy" in case else "l1", "merge": "refit-all"}
    itf.prune(model, example, 0.9, **choices | {"merge": "drop", "criterion": "l1"})  # loads what is loaded once
    start, began = time.process_time(), time.perf_counter()
    itf.find_groups(model, example)
    found, also = time.process_time() - start, time.perf_counter() - began
    start, began = time.process_time(), time.perf_counter()
    itf.prune(model, example, 0.5, data=data, calibration=None, **choices)
    return {"processor": time.process_time() - start - found, "wall": time.perf_counter() - began - also}


def run(checkout: Path, case: str) -> dict[str, float]:
    """Measure a case in a process that imports the project from a checkout."""
    environment = os.environ | {"PYTHONPATH": str(checkout), "OMP_WAIT_POLICY": "PASSIVE"}
    command = [sys.executable, __file__, "--measure", case]
    done = subprocess.run(command, env=environment, cwd=checkout, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("cases", nargs="*", default=list(CASES), help=", ".join(CASES))
    parser.add_argument("--against", type=Path, help="another checkout of the project")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        print(json.dumps(measure(args.measure)))
        return
    print("| case | processor seconds (wall) | of the other | ratio |\n|---|---|---|---|")
    for case in args.cases:
        ours, theirs = [], []
        for _ in range(args.runs):
            ours.append(run(ROOT, case))
            if args.against:
                theirs.append(run(args.against.resolve(), case))
        mine, others = ({k: statistics.median(r[k] for r in runs) if runs else 0.0 for k in ours[0]} for runs in (ours, theirs))
        ratio = f"{others['processor'] / mine['processor']:.2f}" if theirs else ""
        told = [f"{one['processor']:.2f} ({one['wall']:.2f})" if one["wall"] else "" for one in (mine, others)]
        print(f"| {CASES[case]} | {told[0]} | {told[1]} | {ratio} |", flush=True)


if __name__ == "__main__":
    main()
