"""The command `landscape`: measure the loss around and between dense, dropped and fused weights, and their outputs."""

import argparse
import json
import math
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any

from intrafusion.cli.options import (
    add_command,
    add_device,
    add_download,
    add_spec_flags,
    decoding_progress,
    progress,
    show,
    single,
    spec_of,
)
from intrafusion.errors import IntrafusionError, check_choice

if TYPE_CHECKING:
    from intrafusion.studies.weight_space import Solutions

VIEWS = ("plane", "path", "directions", "answers")
_SHARES = ("accuracy", "line_accuracy", "curve_accuracy", "share")


def add_landscape(commands: Any) -> argparse.ArgumentParser:
    """Add the command to `commands`, and return its parser."""
    parser = add_command(
        commands,
        "landscape",
        "Measure the loss around the dense, dropped and fused networks",
        "plane: loss and accuracy of the three networks, then at each point of a grid, from coarse to fine. "
        "path: loss and accuracy along the straight line and along a trained curve between two networks. "
        "directions: the sharpest directions of the loss, and the share of each displacement in them. "
        "answers: each image's predictions, and how far its logits move.",
        ["--model digits-resnet --sparsity 0.4 --size 9", "path --ends dense fused"],
    )
    parser.add_argument("view", nargs="?", default="plane", metavar="VIEW", help=f"what to measure: {', '.join(VIEWS)}")
    add_spec_flags(parser)
    parser.set_defaults(command=_landscape, sparsity=[0.4], merge=None, limit=500, epochs=6.0, training=2000)
    parser.add_argument("--size", type=int, default=17, help="plane: number of grid points per side")
    parser.add_argument("--margin", type=float, default=0.3, help="plane: margin around the networks, relative to their extent")
    parser.add_argument(
        "--ends",
        nargs=2,
        default=["dense", "fused"],
        metavar="NAME",
        help="path: its two ends: dense, dropped, fused, calibrated, refit, or kept/NAME",
    )
    add_device(parser)
    add_download(parser)
    return parser


def _landscape(args: argparse.Namespace) -> None:
    from intrafusion.studies.session import open_session
    from intrafusion.studies.weight_space import Solutions

    if args.merge is not None:
        raise IntrafusionError("landscape always compares drop and fusion; leave --merge out")
    views = _views(args)
    check_choice("view", args.view, VIEWS)
    chosen = {name: single(args, name) for name in ("criterion", "sparsity")}
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


def _readable(rows: Iterable[dict[str, Any]]) -> list[dict[str, str]]:
    return [{name: _said(name, value) for name, value in row.items()} for row in rows]


def _said(name: str, value: Any) -> str:
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return ""
    if isinstance(value, float):
        return f"{value:.1%}" if name in _SHARES else f"{value:.4g}"
    return str(value)
