"""The command `landscape`: measure the loss around and between dense, dropped and fused weights, and their outputs."""

import argparse
import json
import math
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any

from intrafusion.cli.options import add_spec_flags, decoding_progress, progress, show, spec_of
from intrafusion.errors import IntrafusionError
from intrafusion.reporting.snippets import flag

if TYPE_CHECKING:
    from intrafusion.studies.weight_space import Solutions

VIEWS = ("plane", "path", "directions", "answers")
_SHARES = ("accuracy", "line_accuracy", "curve_accuracy", "share")


def add_landscape(commands: Any) -> argparse.ArgumentParser:
    """Add the command to `commands`, and return its parser."""
    parser = commands.add_parser(
        "landscape",
        help="what lies around and between the dense, the dropped and the fused network",
        description="plane: loss and accuracy of the three networks, then of each point of the grid, from coarse to fine. "
        "path: along the straight line and a trained curve between two networks. directions: the sharpest of the loss, and the "
        "share of each displacement in them. answers: each image's predictions, and how far its logits move.",
    )
    parser.add_argument("view", nargs="?", default="plane", metavar="VIEW", help=f"{', '.join(VIEWS)} (plane)")
    add_spec_flags(parser)
    parser.set_defaults(command=_landscape, sparsity=[0.4], merge=None, limit=500, epochs=6.0, training=2000)
    parser.add_argument("--size", type=int, default=17, help="of a plane: points on a side of the grid")
    parser.add_argument("--margin", type=float, default=0.3, help="of a plane: around the networks, in shares of their extent")
    parser.add_argument(
        "--ends",
        nargs=2,
        default=["dense", "fused"],
        metavar="NAME",
        help="of a path: dense, dropped, fused, calibrated, refit, or a kept network, as kept/NAME",
    )
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--download", action="store_true", help="fetch the data when they are not there")
    return parser


def _landscape(args: argparse.Namespace) -> None:
    from intrafusion.studies.session import open_session
    from intrafusion.studies.weight_space import Solutions

    if args.merge is not None:
        raise IntrafusionError("landscape compares dropping and fusion: leave --merge out")
    views = _views(args)
    if args.view not in views:
        raise IntrafusionError(f"unknown view {args.view!r}: choose one of {', '.join(VIEWS)}")
    chosen = {name: _single(name, getattr(args, name)) for name in ("criterion", "sparsity")}
    spec = spec_of(args).but(**chosen)
    with decoding_progress() as tell:
        session = open_session(spec, args.device, download=args.download, limit=args.limit, progress=tell)
    solutions = Solutions(spec, session)
    about = {
        "model": spec.model,
        "data": spec.dataset,
        "groups": spec.groups,
        **chosen,
        "count": len(solutions.images),
    }
    rows: dict[str, dict[str, Any]] = {}
    with progress() as bar:
        task = bar.add_task(args.view, total=1.0)
        for found in views[args.view](solutions):
            bar.update(task, completed=found.share)
            if args.view != "plane" and found.share < 1:
                continue
            new = {line: row for row in found.rows() if (line := json.dumps(about | row)) not in rows}
            rows |= new
            if args.json and new:
                print("\n".join(new), flush=True)
    if not args.json:
        show(_readable(rows.values()), False, f"{spec.model} on {about['count']:,} {spec.dataset} images")


def _views(args: argparse.Namespace) -> dict[str, Callable[["Solutions"], Iterator[Any]]]:
    from intrafusion.studies.output_distance import outputs
    from intrafusion.studies.weight_space import networks_between, sharpness, slices

    return {
        "plane": lambda made: slices(made, args.size, args.margin),
        "path": lambda made: networks_between(made, tuple(args.ends), made.spec.epochs, made.spec.rate, made.spec.training),
        "directions": sharpness,
        "answers": outputs,
    }


def _single(name: str, values: list[Any]) -> Any:
    if len(values) != 1:
        raise IntrafusionError(f"landscape is of one pruning: give {flag(name)} one value, not {len(values)}")
    return values[0]


def _readable(rows: Iterable[dict[str, Any]]) -> list[dict[str, str]]:
    return [{name: _said(name, value) for name, value in row.items()} for row in rows]


def _said(name: str, value: Any) -> str:
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return ""
    if isinstance(value, float):
        return f"{value:.1%}" if name in _SHARES else f"{value:.4g}"
    return str(value)
