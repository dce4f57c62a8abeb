"""Process identity: where a process runs, and whether it is still running, although process ids are reused."""

import os
import socket
from pathlib import Path


def host() -> str:
    """Return a text that identifies where a process id means the same process, and time.monotonic() the same moment.

    That is a host, and on Linux the container in it, until it restarts.
    """
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{socket.gethostname()} {os.readlink('/proc/self/ns/pid')} {boot}"
    except OSError:
        return socket.gethostname()


def birth(pid: int) -> str:
    """Return when a process started, in Linux's own units; "ended" for one that is not yet reaped; "" if not known."""
    try:
        state, *rest = Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()
    except (OSError, ValueError):
        return ""
    return "ended" if state in "ZX" else rest[18]


def is_running(pid: int, born: str) -> bool:
    """Return whether the process that had this id and start time is still running; ids are reused."""
    if now := birth(pid):
        return now == born
    if os.name != "posix":  # on Windows, os.kill would end the process
        return True
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass  # it belongs to another user
    return True
