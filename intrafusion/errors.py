"""The one exception family: a sentence for a person, shown as one line by the command line and the pages."""

import re

_NO_MEMORY = re.compile(r"out of memory|(not enough|can(no|')t allocate) memory|bad_alloc|_ALLOC_FAILED", re.IGNORECASE)


class IntrafusionError(ValueError):
    """Something the caller can put right: says what was wrong, with which value, and what to do."""


def one_line(error: BaseException) -> str:
    """What another library's exception says, in one line; its type where it says nothing."""
    lines = str(error).split("\n")
    return next((line.strip() for line in lines if line.strip()), type(error).__name__)[:300]


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory was refused: by Python or NumPy, by the system, or by PyTorch, which says so in words, on any device."""
    words = isinstance(error, RuntimeError | OSError) and _NO_MEMORY.search(str(error)) is not None
    return words or isinstance(error, MemoryError)


def reason(error: BaseException) -> str:
    """Why something failed, in one line: the error's own sentence where it is one of ours."""
    if isinstance(error, IntrafusionError):
        return str(error)
    if is_out_of_memory(error):
        return "out of memory: look at fewer images (limit, calibration), keep fewer values (--memory) or leave out wide groups"
    return f"{type(error).__name__}: {one_line(error)}"


def check_choice(what: str, value: str, allowed: tuple[str, ...]) -> None:
    """Raise IntrafusionError unless `value` is one of `allowed`."""
    if value not in allowed:
        raise IntrafusionError(f"unknown {what} {value!r}: choose one of {', '.join(allowed)}")
