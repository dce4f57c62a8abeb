"""The one exception family: a sentence for a person, shown as one line by the command line and the pages."""

import re
import traceback
from pathlib import Path

_NO_MEMORY = re.compile(r"out of memory|(not enough|can(no|')t allocate) memory|bad_alloc|_ALLOC_FAILED", re.IGNORECASE)
_OBJECT = re.compile(r"<(?:\w+\.)*(\w+) object at 0x[0-9a-fA-F]+>")
_PACKAGE = Path(__file__).parent
_WORD, _LINE = 200, 480  # characters of a word and of a message that are shown


class IntrafusionError(ValueError):
    """Something the caller can put right: says what was wrong, with which value, and what to do.

    Whatever the values that it quotes, it is one line that a person can read: the middle of a longer one is left out.
    """

    def __init__(self, message: str = ""):
        super().__init__(as_line(message))


def as_line(message: str) -> str:
    """A message as one line that a person can read, whatever it quotes: the middle of a longer one is left out."""
    return _shortened(re.sub(rf"\S{{{_WORD},}}", lambda word: _shortened(word[0], _WORD), printable(message)), _LINE)


def shown(value: object) -> str:
    """A value as messages quote it, be it the largest of numbers."""
    try:
        return repr(value)
    except (ValueError, RecursionError):  # a number of more than 4,300 digits, somewhere in it
        return f"a {type(value).__name__} too large to show"


def one_line(error: BaseException) -> str:
    """What another library's exception says, in one line, without where objects lie; its type where it says nothing."""
    lines = _OBJECT.sub(r"a \1", str(error)).split("\n")
    return next((line.strip() for line in lines if line.strip()), type(error).__name__)[:300]


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory was refused: by Python or NumPy, by the system, or by PyTorch, which says so in words, on any device."""
    words = isinstance(error, RuntimeError | OSError) and _NO_MEMORY.search(str(error)) is not None
    return words or isinstance(error, MemoryError)


def is_of_network(error: BaseException) -> bool:
    """Whether a network raised it: in its traceback, a module is called after the last line of this package."""
    frames = [frame.f_code for frame, _ in traceback.walk_tb(error.__traceback__)]
    ours = [place for place, code in enumerate(frames) if Path(code.co_filename).is_relative_to(_PACKAGE)]
    return bool(ours) and any(code.co_name == "_wrapped_call_impl" for code in frames[ours[-1] :])


def reason(error: BaseException) -> str:
    """Why something failed, in one line: the error's own sentence where it is one of ours."""
    if isinstance(error, IntrafusionError):
        return str(error)
    if is_out_of_memory(error):
        return "out of memory: look at fewer images (limit, calibration), keep fewer values (--memory) or leave out wide groups"
    said = f"{type(error).__name__}: {one_line(error)}"
    return f"the network failed: {said}" if is_of_network(error) else said


def check_choice(what: str, value: str, allowed: tuple[str, ...]) -> None:
    """Raise IntrafusionError unless `value` is one of `allowed`."""
    if value not in allowed:
        raise IntrafusionError(f"unknown {what} {shown(value)}: choose one of {', '.join(allowed)}")


def printable(text: str) -> str:
    """What does not print, line ends among it, as its number."""
    return text if text.isprintable() else "".join(sign if sign.isprintable() else ascii(sign)[1:-1] for sign in text)


def _shortened(text: str, most: int) -> str:
    if len(text) <= most:
        return text
    end = most // 3
    return f"{text[: most - end - 1]}…{text[-end:]}"
