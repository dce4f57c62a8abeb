"""A `torch.export` program (.pt2) as a network that can be pruned, without running untrusted code.

An untrusted program is either refused or converted into this package's layers (convolutions, linear layers, batch norms,
zero-padded shortcuts) and steps. Each step is an operator from one short table (`operators`) with plain arguments. Nothing else
of the program is ever run:

- `archive` reads the zip, its JSON and its raw tensors, within size limits. It unpickles and evaluates nothing.
- `importer` translates the graph into a description: a JSON-serialisable table of layers and steps. The description is not
  trusted. An in-place change becomes a new value for the names that certainly mean the changed numbers. Other names that may
  share them must not be read again.
- `built` in `assemble` is the only way from a description to a module, whatever its origin. It verifies each step with the
  rule of its operator, for any number of images: sizes are integers or integer multiples of the batch (`shapes`), so the
  forward pass computes no sizes. What cannot be verified is refused, such as a size of batch plus one, or a division with a
  remainder.

Every operator of the table is a pure function that modifies none of its arguments. It computes in float32; indices are int64
and masks are bool. String arguments come from closed lists; integers stay within 2^40; no size is 0. Indices are constants of
the file: their values are checked against the sizes, and loading other weights cannot replace them. A module does no arithmetic
on sizes and has no operator whose output shape depends on the image values. A batch norm is a layer in eval mode whose four
tensors have one number per channel.

The total cost of all steps is added up and limited before anything is computed: peak memory, where views count as copies that
keep their base in memory; numbers read and written; and multiply-accumulates of every product.
"""

from pathlib import Path

import torch

from intrafusion.errors import IntrafusionError, one_line
from intrafusion.models.exported_program.archive import read_archive
from intrafusion.models.exported_program.assemble import built as built
from intrafusion.models.exported_program.assemble import tensors_of as tensors_of
from intrafusion.models.exported_program.description import check_description as check_description
from intrafusion.models.exported_program.description import describe_program as describe_program
from intrafusion.models.exported_program.importer import lifted
from intrafusion.models.exported_program.program import Program as Program
from intrafusion.models.exported_program.shapes import DYNAMIC

__all__ = ["Program", "built", "check_description", "describe_program", "read_program", "tensors_of"]


def read_program(path: Path) -> tuple[Program, tuple[int, int, int], int]:
    """Load the network of a .pt2 file. Return it, its image size (C, H, W) and its number of classes.

    Its logits are those of the program. Convolutions, linear layers and batch norms become layers, named after their weights.
    Raises IntrafusionError if the file is not a program, uses something unsupported, or is not a classifier.
    """
    written = read_archive(path)
    try:
        program = built(*lifted(written))
        _tried(program)
        return program, program.plan.image, program.plan.classes
    except IntrafusionError as error:
        raise IntrafusionError(f"{path} is not a supported program: {error}") from error
    except (KeyError, TypeError, ValueError, AttributeError, IndexError, ArithmeticError, RecursionError) as error:
        raise IntrafusionError(f"{path} is damaged (an error in its graph); export the network again") from error


def _tried(program: Program) -> None:
    """Run two images together, and one of them alone.

    Raises IntrafusionError if this fails, or if the logits are not finite or not the same.
    """
    noise = torch.rand(2, *program.plan.image, generator=torch.Generator().manual_seed(0))
    try:
        with torch.inference_mode():
            both, one = program(noise), program(noise[:1])
    except RuntimeError as error:
        raise IntrafusionError(f"it does not run: {one_line(error)}") from error
    if not torch.isfinite(both).all():
        raise IntrafusionError("its logits are NaN or infinite")
    if not torch.allclose(both[:1], one, rtol=1e-3, atol=1e-3 * float(both.abs().max())):
        raise IntrafusionError(f"its logits for an image depend on the other images of the batch; {DYNAMIC}")
