"""What must happen before torch and torchvision are used; imported by the package before anything else.

Threads: OpenMP workers sleep while they wait, unless the environment says otherwise. Spinning, the default, wastes the
cores that another session, job or thread needs: on 2 busy cores the default curve took ten times as long.

torchvision: a CPU-only torch next to PyPI's build must import it.
torchvision's compiled operators do not load beside a torch of another build, and its import then fails with "operator
torchvision::nms does not exist": it registers shape functions for two operators that nobody declared. Declaring their
schemas is enough, as no detection operator is ever called here.
"""

import os
from importlib.util import find_spec
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # read once, when torch loads OpenMP

import torch

SCHEMAS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)


def compiled_operators_load() -> bool:
    """Whether torchvision's compiled library fits this torch (loading it declares the operators)."""
    spec = find_spec("torchvision")
    folders = (spec.submodule_search_locations if spec else None) or []
    for library in (file for folder in folders for file in Path(folder).glob("_C*")):
        try:
            torch.ops.load_library(str(library))
        except OSError:
            return False
        return True
    return False


if not compiled_operators_load():
    _library = torch.library.Library("torchvision", "FRAGMENT")  # the schemas live as long as this object
    for _schema in SCHEMAS:
        _library.define(_schema)
