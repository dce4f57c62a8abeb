"""Inputs and outputs of an exported graph."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from intrafusion.errors import IntrafusionError
from intrafusion.models.exported_program.archive import ProgramFile
from intrafusion.models.exported_program.importer.aten import EVAL

_FLOAT32 = 7


@dataclass(frozen=True)
class Signature:
    """Inputs and output of a graph by their names in it.

    weights: the dotted names of weights. learned: those of parameters. images: the image batch. image: its (C, H, W). batch:
    its size, if the graph was exported for this one only. answer: the logits.
    """

    weights: Mapping[str, str]
    learned: frozenset[str]
    images: str
    image: tuple[int, int, int]
    batch: int | None
    answer: str


def read_signature(written: ProgramFile) -> Signature:
    """Read what a graph takes and gives.

    Raises IntrafusionError unless that is one batch of images, and one tensor of logits.
    """
    given, weights, learned = [], {}, set()
    for spec in written.signature["input_specs"]:
        ((kind, about),) = spec.items()
        if kind == "user_input" and "as_tensor" in about["arg"]:
            given.append(about["arg"]["as_tensor"]["name"])
        elif kind in ("parameter", "buffer", "tensor_constant"):
            path = about[f"{kind}_name"]
            if path not in written.tensors:
                raise IntrafusionError(f"it has no weights {str(path)[:80]}")
            weights[about["arg"]["name"]] = path
            if kind == "parameter":
                learned.add(path)
        else:
            raise IntrafusionError(f"it must take one batch of images, but it also takes a {kind}")
    if len(given) != 1:
        raise IntrafusionError(f"it must take one batch of images, not {len(given)} tensors")
    about = written.graph["tensor_values"][given[0]]
    sizes = [one.get("as_int") for one in about["sizes"]]
    if len(sizes) != 4 or any(type(one) is not int or one < 1 for one in sizes[1:]) or about["dtype"] != _FLOAT32:
        raise IntrafusionError(
            f"its images must be float32 (batch, channels, height, width) of a fixed size, not {str(sizes)[:60]}"
        )
    answer = _answer(written.signature["output_specs"])
    return Signature(weights, frozenset(learned), given[0], tuple(sizes[1:]), sizes[0], answer)


def _answer(specs: list[Mapping[str, Any]]) -> str:
    kinds = [kind for spec in specs for kind in spec]
    if any(kind.endswith("mutation") for kind in kinds):
        raise IntrafusionError(f"it changes its own buffers; {EVAL}")
    if kinds != ["user_output"] or "as_tensor" not in specs[0]["user_output"]["arg"]:
        raise IntrafusionError("it must return one tensor of logits, (images, classes)")
    return str(specs[0]["user_output"]["arg"]["as_tensor"]["name"])
