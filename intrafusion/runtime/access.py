"""Access rules: the local user may do everything, remote readers little.

A server that others can reach is public. What it allows is read from the environment alone:
INTRAFUSION_PUBLIC  1 for a public server; a server that binds to more than this machine sets it itself
INTRAFUSION_ROOTS   folders whose files its pages may open, separated as in PATH; none if not set
INTRAFUSION_UPLOAD_MB, INTRAFUSION_KEPT_MB  MiB of one uploaded file, and of everything kept; 50 and 2048 if not set
INTRAFUSION_MODEL_MB  MiB of the weights of a model that its pages open; 512 if not set
INTRAFUSION_PROGRAMS  1 if readers may also upload programs (.pt2)
INTRAFUSION_PROXIES  number of proxies in front, each appending its client to X-Forwarded-For; 0 if not set

The limits apply to an address and to the server as a whole, not to a browser or a session: `pages.shared.client_address`
determines the address.
"""

import os
import re
import shutil
import stat
import sys
import sysconfig
import tempfile
import threading
import time
from collections import OrderedDict, deque
from pathlib import Path

from intrafusion.errors import IntrafusionError
from intrafusion.runtime.paths import ASSETS, home, store_path
from intrafusion.runtime.stale_files import temporary

MIB = 1 << 20
MINUTE = 60.0
UPLOADS = 20  # files that one address may upload to a public server per minute, in total four times the largest
HELD = 4, 16  # uploads in memory at once, in units of the largest: of one address, of all
EACH, ALL = 4, 32  # most unfinished computations, of one address and of all
FIRST = 32  # additional ones, for addresses that have none yet
GRACE = 180.0  # seconds after a session has gone until its computations are cancelled
_DAY, _SHARE = 86400.0, 4  # one address may keep a quarter of the total per day
_FREE = 1 << 30  # bytes of disk space that a public server leaves free
_ADDRESSES = 10_000  # most addresses whose uploads are remembered


def is_public() -> bool:
    """Return whether people other than the local user may open the pages."""
    return os.environ.get("INTRAFUSION_PUBLIC", "0") not in ("", "0")


def roots() -> list[Path]:
    """Return the folders whose files the pages of a public server may open."""
    return [Path(part).expanduser() for part in os.environ.get("INTRAFUSION_ROOTS", "").split(os.pathsep) if part]


def takes_programs() -> bool:
    """Return whether readers may upload programs: on a public server, only if its operator enabled that."""
    return not is_public() or os.environ.get("INTRAFUSION_PROGRAMS", "0") not in ("", "0")


def upload_mib() -> int:
    """Return the most MiB that an uploaded file may have on a public server."""
    return _number("INTRAFUSION_UPLOAD_MB", 50)


def check_computations(mine: int, everybody: int) -> None:
    """Raise IntrafusionError if an address with `mine` unfinished computations may not request another.

    everybody: how many unfinished computations there are in total. Above the total limit, an address that has none may still
    request some.
    """
    if not is_public():
        return
    if mine >= EACH:
        raise IntrafusionError(f"you have {EACH} unfinished computations, the most allowed; cancel one or wait")
    if everybody >= ALL + (0 if mine else FIRST):
        raise IntrafusionError("this server is busy; try again later")


def check_share(who: str, size: int) -> None:
    """Raise IntrafusionError if this address may not keep `size` more bytes today; otherwise count them."""
    if not is_public():
        return
    most = _number("INTRAFUSION_KEPT_MB", 2048) / _SHARE
    if wait := _kept.wait(who, size / MIB / most):
        hours = f"try again in {wait / 3600:.0f} hours" if wait < _DAY - 1800 else "try again tomorrow"
        raise IntrafusionError(f"each visitor may save at most {most:,.0f} MiB a day on this server; {hours}")


def check_path(what: str, text: str | None) -> None:
    """Raise IntrafusionError for a path that a page of this server may not open, whether it exists or not.

    Links, .. and ~ are resolved first. what: which path it is, for the message.
    """
    if text is None or not is_public():
        return
    try:
        path = Path(os.path.expanduser(text)).resolve()
        allowed = any(path.is_relative_to(root.resolve()) for root in roots())
    except (OSError, RuntimeError, ValueError):  # a loop of links, or a null byte in the name
        allowed = False
    if not allowed:
        where = "only opens files in the folders it was started with" if roots() else "does not open its own files"
        raise IntrafusionError(f"cannot open {what} {text[:200]!r}: this server {where}")


def check_weights_size(model: str, weights: int) -> None:
    """Raise IntrafusionError if a page of this server may not open a model with this many bytes of weights."""
    most = _number("INTRAFUSION_MODEL_MB", 512)
    if is_public() and weights > most * MIB:
        raise IntrafusionError(
            f"{model} has {weights / MIB:,.0f} MiB of weights; the limit of this server is {most:,} MiB; choose a smaller model"
        )


def check_room() -> None:
    """Raise IntrafusionError if a public server may keep nothing more; files that are being written count too."""
    if not is_public():
        return
    most, places = _number("INTRAFUSION_KEPT_MB", 2048), [home() / "models", home() / "images", *temporary()]
    held = sum({file: _size(file) for place in places for file in (place, *place.rglob("*"))}.values())
    if held >= most * MIB:
        raise IntrafusionError(f"this server has reached its limit of {most:,} MiB of files; its operator must remove some")
    there = next(folder for folder in (home(), *home().absolute().parents) if folder.exists())
    if shutil.disk_usage(there).free < _FREE:
        raise IntrafusionError("the disk of this server is almost full; its operator must free some space")


def _size(file: Path) -> int:
    """Return the bytes of a regular file; 0 for a folder, or for a file that is gone."""
    try:
        told = file.stat()
    except OSError:
        return 0
    return told.st_size if stat.S_ISREG(told.st_mode) else 0


def public(text: str) -> str:
    """Return a message as the pages may show it: on a public server, placeholders replace the paths of its folders."""
    if not is_public():
        return text
    for path, name in sorted(_places().items(), key=lambda place: -len(place[0])):
        text = re.sub(re.escape(path) + r"(?![\w-])", name, text)
    return text


def _places() -> dict[str, str]:
    known = {
        "<cache>": home(),
        "<store>": store_path().absolute().parent,
        "<assets>": ASSETS,
        "<app>": Path(__file__).parents[2],
        "<packages>": Path(sysconfig.get_path("purelib")),
        "<python>": Path(sys.prefix),
        "<base>": Path(sys.base_prefix),
        "<tmp>": Path(tempfile.gettempdir()),
        "<home>": Path.home(),
    }
    both = {str(form): name for name, path in known.items() for form in (path.absolute(), path.resolve())}
    return {path: name for path, name in both.items() if len(path) > 1}


def _number(variable: str, usual: int) -> int:
    text = os.environ.get(variable, "")
    if text and not re.fullmatch(r"[0-9]{1,9}", text):
        raise IntrafusionError(f"{variable} must be a whole number of MiB, not {text[:60]!r}")
    return int(text or usual)


class Rate:
    """A rate limit for each client: at most `times` events, of `amount` in total, within `seconds`."""

    def __init__(self, times: int, amount: float, seconds: float = MINUTE):
        self.times, self.amount, self.seconds = times, amount, seconds
        self._past: OrderedDict[str, deque[tuple[float, float]]] = OrderedDict()
        self._lock = threading.Lock()

    def wait(self, who: str, amount: float, now: float | None = None) -> float:
        """Return the seconds until this event is allowed; 0 if it is allowed now, and then it counts.

        inf if `amount` exceeds what is ever allowed.
        """
        now = time.monotonic() if now is None else now
        if amount > self.amount:
            return float("inf")
        with self._lock:
            past = self._past.setdefault(who, deque())
            self._past.move_to_end(who)
            while len(self._past) > _ADDRESSES:
                self._past.popitem(last=False)
            while past and past[0][0] <= now - self.seconds:
                past.popleft()
            wait, count, spent = 0.0, len(past), sum(one for _, one in past)
            for when, one in past:  # events that must expire first
                if count < self.times and spent + amount <= self.amount:
                    break
                wait, count, spent = when + self.seconds - now, count - 1, spent - one
            if not wait:
                past.append((now, amount))
            return wait


_kept = Rate(10_000, 1.0, _DAY)  # amounts are fractions of what one address may keep
