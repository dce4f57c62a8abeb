"""Which process one is, and whether another still runs: numbers of processes are used again."""

import os
import socket
from pathlib import Path


def host() -> str:
    """Where a process number means the same process, and time.monotonic() the same moment.

    That is a host, and on Linux the container in it, until it starts anew.
    """
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{socket.gethostname()} {os.readlink('/proc/self/ns/pid')} {boot}"
    except OSError:
        return socket.gethostname()


def birth(pid: int) -> str:
    """When a process started, in Linux's own count, "ended" for one that is not yet waited for; "" where nobody says."""
    try:
        state, *rest = Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()
    except (OSError, ValueError):
        return ""
    return "ended" if state in "ZX" else rest[18]


def is_running(pid: int, born: str) -> bool:
    """Whether the process that had this number when it was born still runs: numbers are used again."""
    if now := birth(pid):
        return now == born
    if os.name != "posix":  # there os.kill would end it
        return True
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass  # another user's
    return True
