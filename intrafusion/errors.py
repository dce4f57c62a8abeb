"""The one exception family: a sentence for a person, shown as one line by the command line and the pages."""


class IntrafusionError(ValueError):
    """Something the caller can put right: says what was wrong, with which value, and what to do."""


def one_line(error: BaseException) -> str:
    """What another library's exception says, in one line; its type where it says nothing."""
    lines = str(error).split("\n")
    return next((line.strip() for line in lines if line.strip()), type(error).__name__)[:300]


def check_choice(what: str, value: str, allowed: tuple[str, ...]) -> None:
    """Raise IntrafusionError unless `value` is one of `allowed`."""
    if value not in allowed:
        raise IntrafusionError(f"unknown {what} {value!r}: choose one of {', '.join(allowed)}")
