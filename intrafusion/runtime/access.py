"""Who may ask for what: everything for the person at this machine, little for strangers.

A server that others reach is public. What it may do then is read from the environment alone:
INTRAFUSION_PUBLIC  1 for a public server; one that is bound wider than this machine sets it by itself
INTRAFUSION_ROOTS   folders whose files its pages may open, separated as in PATH; none when not set
INTRAFUSION_UPLOAD_MB, INTRAFUSION_KEPT_MB  MiB of one uploaded file, and of all that is kept; 50 and 2048 when not set
INTRAFUSION_MODEL_MB  MiB of the weights of a model that its pages open; 512 when not set
INTRAFUSION_PROGRAMS  1 where readers may upload programs (.pt2), too
INTRAFUSION_PROXIES  how many proxies stand in front, each adding to X-Forwarded-For whom it heard; 0 when not set

Its limits hold for an address and for the server as a whole, not for a browser or a session:
`pages.shared.client_address` says which address.
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
UPLOADS = 20  # files that one address may send to a public server in a minute, in all of four times the largest
HELD = 4, 16  # times the largest upload that may lie in memory at once: of one address, of everybody
EACH, ALL = 4, 32  # computations that are not done yet, of one address and of everybody
FIRST = 32  # more, for addresses that have none
GRACE = 180.0  # seconds after which what was asked for in a session that has gone is cancelled
_DAY, _SHARE = 86400.0, 4  # one address may keep a quarter of what is kept in a day
_FREE = 1 << 30  # bytes of the disk that a public server leaves alone
_ADDRESSES = 10_000  # whose uploads are remembered


def is_public() -> bool:
    """Whether people other than the one at this machine may open the pages."""
    return os.environ.get("INTRAFUSION_PUBLIC", "0") not in ("", "0")


def roots() -> list[Path]:
    """The folders whose files the pages of a public server may open."""
    return [Path(part).expanduser() for part in os.environ.get("INTRAFUSION_ROOTS", "").split(os.pathsep) if part]


def takes_programs() -> bool:
    """Whether readers may upload programs: on a public server where its operator turned that on."""
    return not is_public() or os.environ.get("INTRAFUSION_PROGRAMS", "0") not in ("", "0")


def upload_mib() -> int:
    """MiB that one uploaded file may have on a public server."""
    return _number("INTRAFUSION_UPLOAD_MB", 50)


def check_computations(mine: int, everybody: int) -> None:
    """Raise IntrafusionError where an address that has so many computations running or waiting may ask for no other one.

    everybody: how many there are in all. When there are as many as one may ask for, an address that has none may still.
    """
    if not is_public():
        return
    if mine >= EACH:
        raise IntrafusionError(f"{EACH} computations that you asked for are not done yet: cancel one, or wait for it")
    if everybody >= ALL + (0 if mine else FIRST):
        raise IntrafusionError("this server has more to compute than it can: try again later")


def check_share(who: str, size: int) -> None:
    """Raise IntrafusionError where this address should keep nothing more of so many bytes today; else it counts."""
    if not is_public():
        return
    most = _number("INTRAFUSION_KEPT_MB", 2048) / _SHARE
    if wait := _kept.wait(who, size / MIB / most):
        hours = f"try again in {wait / 3600:.0f} hours" if wait < _DAY - 1800 else "try again tomorrow"
        raise IntrafusionError(f"one reader may keep at most {most:,.0f} MiB a day on this server: {hours}")


def check_path(what: str, text: str | None) -> None:
    """Raise IntrafusionError for a path that a page of this server may not open, whether it exists or not.

    Links, .. and ~ are followed first. what: which one it is, in words.
    """
    if text is None or not is_public():
        return
    try:
        path = Path(os.path.expanduser(text)).resolve()
        allowed = any(path.is_relative_to(root.resolve()) for root in roots())
    except (OSError, RuntimeError, ValueError):  # a loop of links, a name of zeros
        allowed = False
    if not allowed:
        where = "only in the folders that it was started with" if roots() else "none"
        raise IntrafusionError(f"{what} {text[:200]!r} cannot be opened: of the files of this server a reader may name {where}")


def check_size(model: str, weights: int) -> None:
    """Raise IntrafusionError for a model with so many bytes of weights that a page of this server may not open it."""
    most = _number("INTRAFUSION_MODEL_MB", 512)
    if is_public() and weights > most * MIB:
        raise IntrafusionError(
            f"{model} has {weights / MIB:,.0f} MiB of weights, and this server opens at most {most:,}: choose a smaller model"
        )


def check_room() -> None:
    """Raise IntrafusionError where a public server should keep nothing more: what is being taken counts, too."""
    if not is_public():
        return
    most, places = _number("INTRAFUSION_KEPT_MB", 2048), [home() / "models", home() / "images", *temporary()]
    held = sum({file: _size(file) for place in places for file in (place, *place.rglob("*"))}.values())
    if held >= most * MIB:
        raise IntrafusionError(f"this server keeps at most {most:,} MiB, and has them: whoever runs it must remove some")
    there = next(folder for folder in (home(), *home().absolute().parents) if folder.exists())
    if shutil.disk_usage(there).free < _FREE:
        raise IntrafusionError("the disk of this server is almost full: whoever runs it must free some space")


def _size(file: Path) -> int:
    """Its bytes; none of a folder, or of what has gone meanwhile."""
    try:
        told = file.stat()
    except OSError:
        return 0
    return told.st_size if stat.S_ISREG(told.st_mode) else 0


def public(text: str) -> str:
    """A message as the pages may show it: on a public server the names of its folders in place of where they are."""
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
    """At most `times` things of `amount` in all in `seconds`, for each who asks."""

    def __init__(self, times: int, amount: float, seconds: float = MINUTE):
        self.times, self.amount, self.seconds = times, amount, seconds
        self._past: OrderedDict[str, deque[tuple[float, float]]] = OrderedDict()
        self._lock = threading.Lock()

    def wait(self, who: str, amount: float, now: float | None = None) -> float:
        """Seconds until this may happen; 0 when it may now, and then it counts. inf for more than may ever happen."""
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
            for when, one in past:  # what has to be forgotten first
                if count < self.times and spent + amount <= self.amount:
                    break
                wait, count, spent = when + self.seconds - now, count - 1, spent - one
            if not wait:
                past.append((now, amount))
            return wait


_kept = Rate(10_000, 1.0, _DAY)  # in shares of what one address may keep
