"""What is wrong with how a call refuses a file."""

from collections.abc import Callable
from pathlib import Path

import intrafusion as itf


def complaint(path: Path, call: Callable[[], object]) -> str | None:
    """None when `call` fails in one line that names `path`, else what happened instead."""
    try:
        call()
    except itf.IntrafusionError as error:
        return None if str(path) in str(error) and "\n" not in str(error) else f"unclear: {error}"
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "accepted"
