"""Parallel training of networks on parts of the training images, each in its own process."""

import json
import os
import queue
import subprocess
import sys
import threading
from collections.abc import Generator, Sequence
from contextlib import suppress
from itertools import combinations
from pathlib import Path
from typing import Any

import torch
from torch import nn

from intrafusion.errors import IntrafusionError
from intrafusion.runtime.cancellation import checkpoint, clock
from intrafusion.runtime.shutdown import finishing
from intrafusion.training.methods.spec import TrainSpec
from intrafusion.training.methods.task import PhaseProgress, Task

_PACKAGE = Path(__file__).parents[3]


def parts_of(spec: TrainSpec) -> list[dict[str, Any]]:
    """Return the fields of each member: one for every choice of half of the folds, each with its own seed.

    Two folds give the two halves of the images. Raises IntrafusionError for an odd number of folds.
    """
    if spec.folds % 2:
        raise IntrafusionError(f"folds must be even, not {spec.folds}; each network trains on half of them")
    halves = combinations(range(spec.folds), spec.folds // 2)
    return [{"part": part, "seed": spec.seed + number} for number, part in enumerate(halves)]


def rows_of_part(count: int, spec: TrainSpec) -> torch.Tensor:
    """Return the sorted rows of `count` images that a spec trains on: those of its folds, the same for every seed."""
    order = torch.randperm(count, generator=torch.Generator().manual_seed(0))
    return torch.cat([order[fold :: spec.folds] for fold in spec.part]).sort().values if spec.part else torch.arange(count)


def together(task: Task, specs: Sequence[TrainSpec]) -> Generator[PhaseProgress, None, list[nn.Module]]:
    """Train each spec in its own process, as many at a time as there are cores; return their networks, in order.

    The phases are yielded with names such as "part 1: training". Stopping stops all processes, and each saves its state. The
    time of the phase "parts" lasts until the last process is done, but at least as long as the training of the slowest part,
    which may have run earlier. Raises IntrafusionError if a process fails.
    """
    told: queue.Queue[tuple[int, PhaseProgress | str]] = queue.Queue()
    cores = max(1, (os.cpu_count() or 1) if task.device.type == "cpu" else 1)
    threads = max(1, cores // len(specs))
    began, waiting = clock(), list(enumerate(specs))
    running: dict[int, tuple[subprocess.Popen, threading.Thread]] = {}
    try:
        while waiting or running:
            while waiting and len(running) < cores:
                number, spec = waiting.pop(0)
                running[number] = _started(number, spec, task.device, threads, told)
            checkpoint(idle=True)  # the other processes compute, this one waits
            with suppress(queue.Empty):
                number, what = told.get(timeout=0.2)
                if isinstance(what, PhaseProgress):
                    yield PhaseProgress(f"part {number + 1}: {what.phase}", what.moment, what.look)
                else:
                    running.pop(number)[1].join()
                    if what:
                        raise IntrafusionError(f"part {number + 1} failed: {what}")
    finally:
        with finishing():
            for process, _ in running.values():
                process.terminate()
            for process, listener in running.values():
                with suppress(subprocess.TimeoutExpired):
                    process.wait(20)
                process.kill()
                listener.join()
    runs = [[*task.run(spec, task.device)][-1] for spec in specs]  # all are finished, so this only reads them
    slowest = max(sum(run.outcome.seconds.values()) for run in runs)  # it may have been trained before
    task.seconds["parts"] = max(clock() - began, slowest)
    return [run.model.to(task.device) for run in runs]


def _started(
    number: int, spec: TrainSpec, device: torch.device, threads: int, told: "queue.Queue[tuple[int, PhaseProgress | str]]"
) -> tuple[subprocess.Popen, threading.Thread]:
    """Start the process of one member and a thread that reads its output; return both.

    The thread puts each step into `told`, and at the end "" or the reason of the failure.
    """
    paths = os.pathsep.join(filter(None, (str(_PACKAGE), os.environ.get("PYTHONPATH"))))
    process = subprocess.Popen(
        [sys.executable, "-m", "intrafusion", "lab", "--spec", spec.key(), "--device", str(device), "--json"],
        env={**os.environ, "OMP_NUM_THREADS": str(threads), "PYTHONPATH": paths},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )

    def listen() -> None:
        last: list[str] = []
        with process:
            heard = threading.Thread(target=lambda: last.extend(list(process.stderr)[-1:]))  # type: ignore[arg-type]
            heard.start()
            for line in process.stdout:  # type: ignore[union-attr]
                raw = json.loads(line)
                if "moment" in raw:
                    told.put((number, PhaseProgress.from_dict(raw)))
            heard.join()
        reason = last[0].strip() if last else "it ended early"
        told.put((number, reason.removeprefix("error: ") if process.returncode else ""))

    listener = threading.Thread(target=listen, daemon=True)
    listener.start()
    return process, listener
