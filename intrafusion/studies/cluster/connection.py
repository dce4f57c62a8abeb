"""The connection of this process to Ray: opened (or Ray started) for the first study, and closed after the last."""

import logging
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from typing import Any

import torch

from intrafusion.errors import IntrafusionError, one_line

RAY = "ray==2.60.0"
_CONNECT = 30.0  # seconds in which a cluster must answer
_SPARE = 128 << 20  # bytes of a local object store beyond the known need


class RayConnection:
    """A connection to Ray that all studies of this process share.

    alone: whether the cluster is this machine's own, which no other machine joins.
    """

    def __init__(self) -> None:
        self.alone = False
        self._users = 0
        self._keeper: _Keeper | None = None
        self._lock = threading.Lock()

    @contextmanager
    def ray(self, address: str | None, size: int) -> Iterator[Any]:
        """Yield the initialised module `ray`.

        If Ray is not initialised yet, connect to `address` (None for $RAY_ADDRESS, or else "local"). size: bytes that a
        cluster on this machine must hold. Raises IntrafusionError if Ray is missing, or no cluster answers within half a
        minute.
        """
        ray = _import_ray()
        with self._lock:
            if not ray.is_initialized():
                address = address or os.environ.get("RAY_ADDRESS") or "local"
                self._keeper, self.alone = _Keeper(ray, address, size), address == "local"
            self._users += 1
        try:
            yield ray
        finally:
            with self._lock:
                self._users -= 1
                if self._keeper and not self._users:
                    self._keeper.close()
                    self._keeper, self.alone = None, False


class _Keeper:
    """A thread that starts Ray and shuts it down.

    Ray's processes end with the thread that started them, even if others still use them, so they need a thread that lasts.
    Raises IntrafusionError if Ray does not start.
    """

    def __init__(self, ray: Any, address: str, size: int):
        self._started: Future[None] = Future()
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._keep, args=(ray, address, size), daemon=True)
        self._thread.start()
        try:
            self._started.result()
        except BaseException:  # also for an interrupt during the wait
            self.close()
            raise

    def close(self) -> None:
        self._closing.set()
        self._thread.join()

    def _keep(self, ray: Any, address: str, size: int) -> None:
        try:
            _start(ray, address, size)
        except BaseException as error:
            self._started.set_exception(error)
            return
        self._started.set_result(None)
        self._closing.wait()
        ray.shutdown()


SESSION = RayConnection()


def _import_ray() -> Any:
    try:
        import ray
    except ImportError as error:
        raise IntrafusionError(f"Ray is not installed; run pip install 'intrafusion[ray]', or pip install {RAY}") from error
    return ray


def _start(ray: Any, address: str, size: int) -> None:
    """Connect to a cluster, or start one on this machine, without log output."""
    options: dict[str, Any] = {}
    if address == "local":
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        resources = {"object_store_memory": _SPARE + 2 * size, "num_gpus": torch.cuda.device_count()}
        options = {"include_dashboard": False, **resources}
    else:
        _reach(address)
    logging.getLogger("ray").setLevel(logging.ERROR)
    try:
        ray.init(address, log_to_driver=False, logging_level=logging.ERROR, configure_logging=False, **options)
    except Exception as error:
        raise IntrafusionError(f"cannot start Ray: {one_line(error)}") from error


_PROBE = "import ray, sys; ray.init(sys.argv[1], log_to_driver=False, logging_level='ERROR', configure_logging=False)"


def _reach(address: str) -> None:
    """Raise IntrafusionError unless Ray can connect.

    A child process tries first, because Ray ends a process whose cluster does not answer.
    """
    if address.startswith("ray://"):
        raise IntrafusionError("Ray Client (ray://) is not supported; start the study on a machine of the cluster")
    try:
        if ":" in address:
            host, _, port = address.rpartition(":")
            socket.create_connection((host.strip("[]"), int(port)), _CONNECT).close()
        command = [sys.executable, "-c", _PROBE, address]
        done = subprocess.run(command, capture_output=True, text=True, timeout=_CONNECT)
        if not done.returncode:
            return
        reason = done.stderr.strip().rpartition("\n")[2]
    except subprocess.TimeoutExpired:
        reason = f"no answer in {_CONNECT:g} s"
    except (OSError, ValueError, OverflowError) as error:
        reason = one_line(error)
    raise IntrafusionError(
        f"no Ray cluster answers at {address} ({reason}); start the study on a machine that joined it with `ray start`"
    )
