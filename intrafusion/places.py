"""Where files lie: what ships with the project, and what is downloaded."""

import os
from pathlib import Path

ASSETS = Path(__file__).parent / "assets"
if not ASSETS.exists():  # a checkout: assets lie beside the package; an installed package carries them inside
    ASSETS = Path(__file__).parent.parent / "assets"


def home() -> Path:
    """The folder that holds downloads: $INTRAFUSION_HOME, or ~/.cache/intrafusion."""
    return Path(os.environ.get("INTRAFUSION_HOME") or Path.home() / ".cache" / "intrafusion")
