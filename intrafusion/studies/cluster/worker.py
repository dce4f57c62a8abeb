"""The task that runs in worker processes of a cluster: the local sweep, on a session that each process opens once."""

import copy
import warnings
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from intrafusion.data.datasets import ImageData
from intrafusion.errors import IntrafusionError
from intrafusion.evaluation.accuracy import Size
from intrafusion.evaluation.incremental import MEMORY, Meter
from intrafusion.pruning.groups.group import Group
from intrafusion.runtime.code_digest import code_version
from intrafusion.runtime.devices import device_name
from intrafusion.spec import PruneSpec
from intrafusion.studies.measurement import Result
from intrafusion.studies.session import Session, sight
from intrafusion.studies.sweeps import Failure, sweep

_sessions: dict[str, Session] = {}


def measure_remotely(
    parts: list[Any],
    specs: list[PruneSpec],
    known: dict[PruneSpec, Result],
    decide: bool,
    memory: int,
    threads: int,
    device: str,
    version: str,
) -> Iterator[str | Result | Failure]:
    """Run the local sweep over some points as a task; yields the device's name first, then results.

    parts: the reference to `Parts`, in a list so that Ray does not fetch them for each task. version: of the code, under
    which the results are stored. Raises IntrafusionError if this machine has another version of the code.
    """
    if version != code_version():
        raise IntrafusionError("one has another version of intrafusion or of its libraries than this machine")
    torch.set_num_threads(threads)
    try:
        session = _open(parts[0], device)
        yield device_name(session.device)
        yield from sweep(specs, session, decide=decide, memory=memory, known=known)
    except Exception:
        raise
    except BaseException:  # cancelled at any point, so that cached state may be half written
        _sessions.clear()
        raise


def _open(parts: Any, device: str) -> Session:
    """Return the session of these parts; a process keeps the last one."""
    import ray

    key = f"{parts.hex()} {device}"
    if key not in _sessions:
        _sessions.clear()
        _sessions[key] = ray.get(parts).session(device)
    return _sessions[key]


@dataclass(frozen=True)
class Parts:
    """The parts of a session, on the CPU.

    Images are NumPy arrays, which the processes of a machine share in Ray's object store.
    """

    model: nn.Module
    groups: list[Group]
    size: Size
    data: tuple
    calibrations: dict[tuple, tuple]

    @classmethod
    def of(cls, session: Session, specs: Iterable[PruneSpec]) -> "Parts":
        """Collect the parts that these specs need."""
        model = session.model if session.device.type == "cpu" else copy.deepcopy(session.model).cpu()
        seen = {sight(one): one for spec in specs for one in session.learned_from(spec)}
        calibrations = {key: _packed(session.calibration(one)) for key, one in seen.items()}
        return cls(model, session.groups, session.size, _packed(session.images()), calibrations)

    def session(self, device: str) -> Session:
        session = _WorkerBench(self.model.to(device), self.groups, self.size, _unpacked(self.data).to(device))
        session.sent = {key: _unpacked(packed).to(device) for key, packed in self.calibrations.items()}
        return session


class _WorkerBench(Session):
    """A session in a worker. All tasks share its meters; only the last used meter keeps activations."""

    sent: Mapping[tuple, ImageData]
    last: Meter | None = None

    def meter(self, spec: PruneSpec, memory: int = MEMORY) -> Meter:
        make = super().meter
        key = "meter", spec.limit, spec.seed, spec.precision, memory
        meter = self._data_known.get(key, lambda: make(spec, memory))
        if self.last is not None and self.last is not meter:
            self.last.forget()
        self.last = meter
        return meter

    def calibration(self, spec: PruneSpec) -> ImageData:
        return self.sent[sight(spec)]


def _packed(data: ImageData) -> tuple:
    images = data.images.cpu().permute(0, 2, 3, 1).contiguous()
    return data.name, data.split, images.numpy(), data.labels.cpu().numpy(), data.classes


def _unpacked(packed: tuple) -> ImageData:
    name, split, images, labels, classes = packed
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # Ray's arrays are read-only, and images are never written to
        return ImageData(name, split, torch.from_numpy(images).permute(0, 3, 1, 2), torch.from_numpy(labels), classes)
