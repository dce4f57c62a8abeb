"""Check which classifiers open as programs, each exported and opened in a separate process; or run random programs.

python tests/benchmarks/programs.py [NAME ...]: the embedded networks and those of assets/architectures.csv, or the named
ones, with random weights. Prints one line each: the number of steps and layers, the seconds that reading took, and whether
the logits equal the network's, or why the program is refused.
python tests/benchmarks/programs.py --fuzz [COUNT] [SEED]: see tests/support/program_fuzz.py; by default 2,000 programs and
1,000 changed files.
"""

import csv
import json
import resource
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path

import torch

SUPPORT = Path(__file__).parents[1] / "support"
_TABLE = SUPPORT.parents[1] / "assets" / "architectures.csv"
_OURS = ("digits-mlp", "digits-vgg", "digits-resnet", "cifar10-resnet20")
_PATIENCE = 1800  # most seconds per network
_ADDRESSES, _SECONDS = 6 << 30, 1800  # limits of address space in bytes and of CPU seconds for the fuzz process


def opened(name: str) -> dict[str, object]:
    """Export and open a network. Return its line of the table. Raise IntrafusionError if the program is refused."""
    sys.path.insert(0, str(SUPPORT))
    import own_files as files

    import intrafusion as itf
    from intrafusion.models.exported_program import read_program

    model = itf.load_model(name, "random")
    size = tuple(model.card.input_size)
    with tempfile.TemporaryDirectory() as folder:
        path = files.export(model, Path(folder) / "p.pt2", size)
        start = time.process_time()
        program, _, classes = read_program(path)
        seconds = time.process_time() - start
    images = torch.rand(3, *size, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        ours, theirs = program(images), model(images)
    same = bool((ours - theirs).abs().max() <= 1e-4 * theirs.abs().max())
    steps = program.plan.steps
    layers = sum(isinstance(step.run, str) for step in steps)
    return {
        "name": name,
        "classes": classes,
        "steps": len(steps),
        "layers": layers,
        "seconds": round(seconds, 1),
        "same": same,
    }


def measured(name: str) -> dict[str, object]:
    """Run `opened` in a child process. Return its line, or a line with the reason for the failure."""
    command = [sys.executable, __file__, "--one", name]
    try:
        told = subprocess.run(command, capture_output=True, text=True, timeout=_PATIENCE)
    except subprocess.TimeoutExpired:
        return {"name": name, "refused": f"not within {_PATIENCE} s"}
    if told.returncode:
        return {"name": name, "refused": (told.stderr.strip().splitlines() or ["out of memory"])[-1][-200:]}
    return dict(json.loads(told.stdout.splitlines()[-1]))


def fuzz(count: str = "2000", seed: str = "0") -> int:
    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_AS, (_ADDRESSES, _ADDRESSES))
        resource.setrlimit(resource.RLIMIT_CPU, (_SECONDS, _SECONDS))

    return subprocess.run([sys.executable, str(SUPPORT / "program_fuzz.py"), count, seed], preexec_fn=limit).returncode


def main(names: list[str]) -> None:
    for name in names or [*_OURS, *(row["name"] for row in csv.DictReader(_TABLE.open()))]:
        print(measured(name), flush=True)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--one"]:
        warnings.simplefilter("ignore")
        print(json.dumps(opened(sys.argv[2])))
    elif sys.argv[1:2] == ["--fuzz"]:
        sys.exit(fuzz(*sys.argv[2:]))
    else:
        main(sys.argv[1:])
