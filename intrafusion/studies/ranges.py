"""Numeric ranges as text, for the command line and study files: "0.1:0.5:0.1" is 0.1, 0.2, 0.3, 0.4, 0.5."""

import math

from intrafusion.errors import IntrafusionError, shown

_MOST = 100_000


def expand_range(text: str, kind: type[int] | type[float], name: str) -> list[int] | list[float]:
    """Return the numbers of a single number or of a range start:stop:step; stop is included, and step defaults to 1.

    kind: int or float. name: the option's name, for error messages. Raises IntrafusionError for any other text, and for a
    range that is empty or has more than 100,000 numbers.

    >>> expand_range("0.1:0.5:0.2", float, "sparsity")
    [0.1, 0.3, 0.5]
    """
    try:
        ends = [kind(part) for part in text.split(":")]
        if len(ends) == 1:
            return ends
        start, stop, step = ends if len(ends) == 3 else (*ends, 1)
        count = math.floor((stop - start) / step + 1e-9) + 1
    except (ValueError, ArithmeticError) as error:
        raise IntrafusionError(f"{name} must be numbers or a range start:stop:step, not {shown(text)}") from error
    if not 0 < count <= _MOST:
        raise IntrafusionError(f"the range {shown(text)} of {name} is empty or has more than {_MOST:,} numbers")
    return [kind(round(start + i * step, 10)) for i in range(count)]
