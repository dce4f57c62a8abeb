"""The command `landscape`: loss and accuracy on the plane through dense, dropped and fused weights."""

import argparse
import json
import math
from typing import Any

from intrafusion.errors import IntrafusionError
from intrafusion.quote import flag
from intrafusion.terminal import add_spec_flags, progress, show, spec_of


def add_landscape(commands: Any) -> argparse.ArgumentParser:
    """Add the command to the command line's; its parser."""
    parser = commands.add_parser(
        "landscape", help="loss and accuracy around the dense, the dropped and the fused network, on their plane",
        description="One row for each of the three networks, then one for each point of the grid, from coarse to fine.",
    )  # fmt: skip
    add_spec_flags(parser)
    parser.set_defaults(command=_landscape, sparsity=[0.4], merge=None, limit=500)
    parser.add_argument("--size", type=int, default=17, help="points on a side of the grid")
    parser.add_argument("--margin", type=float, default=0.3, help="around the networks, as a share of their extent")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--download", action="store_true", help="fetch the data when they are not there")
    return parser


def _landscape(args: argparse.Namespace) -> None:
    import numpy as np

    from intrafusion.bench import open_bench
    from intrafusion.solutions import Solutions, slices

    if args.merge is not None:
        raise IntrafusionError("landscape compares dropping and fusion: leave --merge out")
    chosen = {name: _single(name, getattr(args, name)) for name in ("criterion", "sparsity")}
    spec = spec_of(args).but(**chosen)
    solutions = Solutions(spec, open_bench(spec, args.device, download=args.download, limit=args.limit))
    about = {
        "model": spec.model, "data": spec.dataset, "groups": spec.groups, **chosen, "count": len(solutions.images),
    }  # fmt: skip
    rows: list[dict[str, Any]] = []
    printed = np.zeros((max(args.size, 0),) * 2, bool)
    with progress() as bar:
        task = bar.add_task("landscape", total=args.size**2)
        for found in slices(solutions, args.size, args.margin):
            new = [] if rows else [_row(about, "mark", m.name, m.x, m.y, m.loss, m.accuracy) for m in found.marks]
            surface = found.surface
            for row, column in np.argwhere(np.isfinite(surface.accuracy) & ~printed).tolist():
                place = float(surface.x[column]), float(surface.y[row])
                values = float(surface.loss[row, column]), float(surface.accuracy[row, column])
                new.append(_row(about, "point", None, *place, *values))
                printed[row, column] = True
            bar.update(task, completed=int(printed.sum()))
            if args.json:
                for line in new:
                    print(json.dumps(line), flush=True)
            rows += new
    if not args.json:
        show(_readable(rows), False, f"{spec.model} on {about['count']:,} {spec.dataset} images")


def _single(name: str, values: list[Any]) -> Any:
    if len(values) != 1:
        raise IntrafusionError(f"landscape is of one pruning: give {flag(name)} one value, not {len(values)}")
    return values[0]


def _row(
    about: dict[str, Any], kind: str, name: str | None, x: float, y: float, loss: float, accuracy: float
) -> dict[str, Any]:
    """A JSON-able row; a loss that is no finite number is null."""
    loss_or_none = loss if math.isfinite(loss) else None
    return {**about, "kind": kind, "name": name, "x": x, "y": y, "loss": loss_or_none, "accuracy": accuracy}


def _readable(rows: list[dict[str, Any]]) -> list[dict[str, str]]:
    return [
        {
            "network": row["name"] or "", "x": f"{row['x']:.3f}", "y": f"{row['y']:.3f}",
            "accuracy": f"{row['accuracy']:.1%}", "loss": "" if row["loss"] is None else f"{row['loss']:.4g}",
        }
        for row in rows
    ]  # fmt: skip
