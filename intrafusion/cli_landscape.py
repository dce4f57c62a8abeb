"""The command `landscape`: loss and accuracy on the plane through dense, dropped and fused weights."""

import argparse
import json
from collections.abc import Iterable
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
    rows: dict[tuple, dict[str, Any]] = {}
    with progress() as bar:
        task = bar.add_task("landscape", total=max(args.size, 1) ** 2)
        for found in slices(solutions, args.size, args.margin):
            new = {(row["name"], row["x"], row["y"]): about | row for row in found.rows()}
            if args.json:
                for line in (row for place, row in new.items() if place not in rows):
                    print(json.dumps(line), flush=True)
            rows = new
            bar.update(task, completed=round(found.share * args.size**2))
    if not args.json:
        show(_readable(rows.values()), False, f"{spec.model} on {about['count']:,} {spec.dataset} images")


def _single(name: str, values: list[Any]) -> Any:
    if len(values) != 1:
        raise IntrafusionError(f"landscape is of one pruning: give {flag(name)} one value, not {len(values)}")
    return values[0]


def _readable(rows: Iterable[dict[str, Any]]) -> list[dict[str, str]]:
    return [
        {
            "network": row["name"], "x": f"{row['x']:.3f}", "y": f"{row['y']:.3f}",
            "accuracy": f"{row['accuracy']:.1%}", "loss": "" if row["loss"] is None else f"{row['loss']:.4g}",
        }
        for row in rows
    ]  # fmt: skip
