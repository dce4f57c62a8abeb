"""A `torch.export` program (.pt2) as a network that can be pruned, safe by construction.

A stranger's program becomes layers of ours (convolutions, linear layers, batch norms, zero-padded shortcuts) and steps, each an
operator of one short table (`operators`) with plain arguments, or it is refused. Nothing else of it is ever run:

- `archive` reads the zip, its JSON and its raw tensors, within bounds. It unpickles and evaluates nothing.
- `lift` writes the graph as a description: a JSON-able table of layers and steps. It is a translation, which nothing trusts.
  A change in place is a new value for the names that surely mean the changed numbers; others that may are not read again.
- `build` is the only way from a description to a module, wherever that comes from. It proves each step, by the rule of its
  operator, for any number of images: sizes are whole numbers or whole multiples of the batch (`shapes`), so that the forward
  pass computes no sizes. What cannot be proven is refused: a size that is the batch plus one, or a division with a rest.

Every operator of the table is a pure function of float32 tensors that writes to none of its arguments. Words are of closed
lists; whole numbers stay within 2^40; no size is 0; indices are constants of the file, whose values are checked against the
sizes, and which other weights cannot replace. There is no arithmetic on sizes in a module, and no operator whose shape depends
on numbers of the images. A batch norm is a layer in eval mode whose four tensors have one number a channel.

What all steps take is added up before any number is computed: the memory of what is alive at a time, counting views as copies
that keep what they show; numbers read and made; multiply-accumulates of every product.
"""

from pathlib import Path

import torch

from intrafusion.errors import IntrafusionError, one_line
from intrafusion.models.exported_program.archive import read_archive
from intrafusion.models.exported_program.assemble import built as built
from intrafusion.models.exported_program.assemble import check_described as check_described
from intrafusion.models.exported_program.assemble import described as described
from intrafusion.models.exported_program.assemble import tensors_of as tensors_of
from intrafusion.models.exported_program.importer import lifted
from intrafusion.models.exported_program.program import Program as Program
from intrafusion.models.exported_program.shapes import DYNAMIC

__all__ = ["Program", "built", "check_described", "described", "read_program", "tensors_of"]


def read_program(path: Path) -> tuple[Program, tuple[int, int, int], int]:
    """The network of a .pt2 file, the size (C, H, W) of its images, and the number of its classes.

    Its logits are the program's. Convolutions, linear layers and batch norms are layers under the names of their weights.
    Raises IntrafusionError for a file that is none, that holds what this module does not run, or that is no classifier.
    """
    written = read_archive(path)
    try:
        program = built(*lifted(written))
        _tried(program)
        return program, program.plan.image, program.plan.classes
    except IntrafusionError as error:
        raise IntrafusionError(f"{path} is no program that can be used: {error}") from error
    except (KeyError, TypeError, ValueError, AttributeError, IndexError, ArithmeticError, RecursionError) as error:
        raise IntrafusionError(f"{path} is damaged (an error in its graph): export the network again") from error


def _tried(program: Program) -> None:
    """Run two images, together and alone."""
    noise = torch.rand(2, *program.plan.image, generator=torch.Generator().manual_seed(0))
    try:
        with torch.inference_mode():
            both, one = program(noise), program(noise[:1])
    except RuntimeError as error:
        raise IntrafusionError(f"it does not run: {one_line(error)}") from error
    if not torch.isfinite(both).all():
        raise IntrafusionError("it gives NaN or infinite logits")
    if not torch.allclose(both[:1], one, rtol=1e-3, atol=1e-3 * float(both.abs().max())):
        raise IntrafusionError(f"it gives an image other logits alone than beside another: {DYNAMIC}")
