"""As much of Ray as the driver of a study uses, in this process: tasks stream results that are ready when they are sent."""

import pickle
import time
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

from intrafusion.spec import PruneSpec
from intrafusion.studies.measurement import Result


class RayError(Exception):
    """A worker is lost."""


class RayTaskError(Exception):
    """A task raised an exception."""

    cause = None


class Stream:
    """The items of one task, pickled as Ray does. take: seconds of processor time to take one."""

    def __init__(self, items: Sequence[Any], take: float):
        self.left, self.take, self.ended = [pickle.dumps(item) for item in reversed(items)], take, False

    def __next__(self) -> bytes:
        _spend(self.take)
        if self.left:
            return self.left.pop()
        self.ended = True
        raise StopIteration

    def completed(self) -> "Stream":
        return self


class FakeRay:
    """Of the tasks that have not ended, the first `workers` run; each of them always has its next item ready.

    items: makes what a task yields behind the name of its device, from its specs that are not yet complete. wait, take, submit:
    seconds of processor time of a wait for each stream in it, of an item, and of a task. An exception as an item is raised.
    """

    def __init__(
        self,
        workers: int,
        items: Callable[[list[PruneSpec]], Sequence[Any]],
        *,
        wait: float = 0.0,
        take: float = 0.0,
        submit: float = 0.0,
    ):
        self.workers, self.items = workers, items
        self.costs = {"wait": wait, "take": take, "submit": submit}
        self.streams: list[Stream] = []  # oldest first
        self.exceptions = SimpleNamespace(RayError=RayError, RayTaskError=RayTaskError)
        self.listed = 0  # streams in all waits

    def nodes(self) -> list[dict[str, Any]]:
        return [{"Alive": True, "Resources": {"CPU": self.workers}}]

    def put(self, value: Any) -> Any:
        return value

    def remote(self, function: Callable[..., Any]) -> Any:
        return SimpleNamespace(options=lambda **options: SimpleNamespace(remote=self._submit))

    def _submit(self, parts: list[Any], specs: list[PruneSpec], known: dict[PruneSpec, Result], *rest: Any) -> Stream:
        _spend(self.costs["submit"])
        left = [spec for spec in pickle.loads(pickle.dumps(specs)) if spec not in known or not known[spec].complete]
        stream = Stream(["cpu", *self.items(left)], self.costs["take"])
        self.streams.append(stream)
        return stream

    def wait(self, streams: list[Stream], num_returns: int, timeout: float) -> tuple[list[Stream], list[Stream]]:
        self.listed += len(streams)
        _spend(self.costs["wait"] * len(streams))
        self.streams = [stream for stream in self.streams if not stream.ended]
        running = {*self.streams[: self.workers]}
        ready = [stream for stream in streams if stream.ended or stream in running]
        return ready[:num_returns], [stream for stream in streams if not (stream.ended or stream in running)]

    def get(self, item: bytes) -> Any:
        """Return an item; raise it if it is an exception."""
        came = pickle.loads(item)
        if isinstance(came, Exception):
            raise came
        return came

    def cancel(self, stream: Stream, force: bool = False) -> None:
        stream.ended = True


def _spend(seconds: float) -> None:
    end = time.process_time() + seconds
    while time.process_time() < end:
        pass
