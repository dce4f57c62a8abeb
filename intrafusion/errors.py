"""The package's exception family: one-line messages for users, shown as they are by the command line and the pages."""

import re
import traceback
from collections.abc import Iterable
from pathlib import Path

_NO_MEMORY = re.compile(r"out of memory|(not enough|can(no|')t allocate) memory|bad_alloc|_ALLOC_FAILED", re.IGNORECASE)
_OBJECT = re.compile(r"<(?:\w+\.)*(\w+) object at 0x[0-9a-fA-F]+>")
_PACKAGE = Path(__file__).parent
_WORD, _LINE = 200, 480  # most characters of a word and of a message


class IntrafusionError(ValueError):
    """An error that the caller can fix: says what was wrong, with which value, and what to do.

    The message is always one readable line, whatever values it quotes; the middle of a longer one is left out.
    """

    def __init__(self, message: str = ""):
        super().__init__(as_line(message))


def as_line(message: str) -> str:
    """Return a message as one readable line, whatever it quotes; the middle of a longer one is left out."""
    return _shortened(re.sub(rf"\S{{{_WORD},}}", lambda word: _shortened(word[0], _WORD), printable(message)), _LINE)


def shown(value: object) -> str:
    """Return a value as messages quote it, even if it is too large to print."""
    try:
        return repr(value)
    except (ValueError, RecursionError):  # it contains a number of more than 4,300 digits
        return f"a {type(value).__name__} too large to show"


def one_line(error: BaseException) -> str:
    """Return another library's error message as one line, without object addresses; its type if the message is empty."""
    lines = _OBJECT.sub(r"a \1", str(error)).split("\n")
    return next((line.strip() for line in lines if line.strip()), type(error).__name__)[:300]


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an error means out of memory: from Python, NumPy or the system, or from PyTorch on any device.

    PyTorch and the system are recognised by the text of their messages.
    """
    words = isinstance(error, RuntimeError | OSError) and _NO_MEMORY.search(str(error)) is not None
    return words or isinstance(error, MemoryError)


def is_of_network(error: BaseException) -> bool:
    """Return whether the user's network raised an error: a module call follows this package's last frame in the traceback."""
    frames = [frame.f_code for frame, _ in traceback.walk_tb(error.__traceback__)]
    ours = [place for place, code in enumerate(frames) if Path(code.co_filename).is_relative_to(_PACKAGE)]
    return bool(ours) and any(code.co_name == "_wrapped_call_impl" for code in frames[ours[-1] :])


def reason(error: BaseException) -> str:
    """Return why something failed, in one line: the message itself for one of the package's own errors."""
    if isinstance(error, IntrafusionError):
        return str(error)
    if is_out_of_memory(error):
        return "out of memory; use fewer images (limit, calibration), cache less (--memory) or leave out wide groups"
    said = f"{type(error).__name__}: {one_line(error)}"
    return f"the network failed: {said}" if is_of_network(error) else said


def unknown(what: str, value: object, choices: Iterable[str]) -> IntrafusionError:
    """Return the error for a name that is not one of `choices`. what: the kind of name."""
    return IntrafusionError(f"unknown {what} {shown(value)}; choose one of {', '.join(choices) or '(none yet)'}")


def check_choice(what: str, value: str, allowed: Iterable[str]) -> None:
    """Raise IntrafusionError unless `value` is one of `allowed`."""
    if value not in allowed:
        raise unknown(what, value, allowed)


def printable(text: str) -> str:
    """Return text with its unprintable characters, including line ends, replaced by escape sequences."""
    return text if text.isprintable() else "".join(sign if sign.isprintable() else ascii(sign)[1:-1] for sign in text)


def _shortened(text: str, most: int) -> str:
    if len(text) <= most:
        return text
    end = most // 3
    return f"{text[: most - end - 1]}…{text[-end:]}"
