"""The one exception family: a sentence for a person, shown as one line by the command line and the pages."""


class IntrafusionError(ValueError):
    """Something the caller can put right: says what was wrong, with which value, and what to do."""
