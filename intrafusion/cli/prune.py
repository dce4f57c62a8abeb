"""The command `prune`: write one pruned network to a folder, in several verified formats, with a report."""

import argparse
import json
from pathlib import Path
from typing import Any

from intrafusion.cli.options import add_spec_flags, progress, show, spec_of
from intrafusion.errors import IntrafusionError
from intrafusion.reporting.snippets import flag
from intrafusion.runtime.log import say
from intrafusion.spec import PruneSpec


def add_prune(commands: Any) -> argparse.ArgumentParser:
    """Add the command to `commands`, and return its parser."""
    parser = commands.add_parser(
        "prune",
        help="make one smaller network, and write it into a folder with a report",
        description="Prunes, recovers and measures one network and writes it in each format. Every file is opened again and "
        "its logits are compared with the network's; what differs by more than 1e-4 of the largest logit is not kept.",
    )
    add_spec_flags(parser)
    parser.set_defaults(command=_prune, sparsity=[0.3], merge=["fusion"])
    parser.add_argument("--out", type=Path, required=True, help="folder for the files: a new or an empty one")
    parser.add_argument(
        "--formats", nargs="+", default=[], metavar="NAME", help="safetensors, torch.export, onnx (all of them)"
    )
    parser.add_argument("--speed", action="store_true", help="time the networks before and after, on this device")
    parser.add_argument("--batch", type=int, help="images of the large batch that is timed, beside 1")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--download", action="store_true", help="fetch the data when they are not there")
    return parser


def _prune(args: argparse.Namespace) -> None:
    from intrafusion.reporting import Exported, export

    chosen = {name: _single(name, getattr(args, name)) for name in ("criterion", "merge", "sparsity")}
    spec = spec_of(args).but(**chosen)
    session = _session(spec, args)
    exported: Exported | None = None
    with progress() as bar:
        task = bar.add_task("prune", total=1.0)
        for told in export(spec, session, args.out, args.formats, args.speed, args.batch):
            bar.update(task, completed=told.share, description=told.doing)
            exported = told.result
    assert exported is not None
    if args.json:
        print(json.dumps(exported.to_row()))
    else:
        _tell(exported)


def _session(spec: PruneSpec, args: argparse.Namespace) -> Any:
    """Open a session with images, or without them if no flag asks for images and none can be loaded for the model."""
    from intrafusion.data.datasets import load_data
    from intrafusion.models.card import card_for
    from intrafusion.studies.session import open_session

    session = open_session(spec, args.device, images=False)
    try:
        data = load_data(
            spec.dataset,
            path=spec.data_path,
            device=args.device,
            download=args.download,
            input_size=session.card.input_size,
        )
        card_for(session.model, data)
        session.data = data
    except IntrafusionError as error:
        if args.data_path or args.dataset or args.download:
            raise
        say(f"accuracy is not measured: {error}")
    return session


def _single(name: str, values: list[Any]) -> Any:
    if len(values) != 1:
        raise IntrafusionError(f"prune makes one network: give {flag(name)} one value, not {len(values)}")
    return values[0]


def _tell(exported: Any) -> None:
    from intrafusion.reporting.report import before_and_after, file_rows, speed_rows, speed_words

    made = exported.made
    tables = [(before_and_after(made), f"{made.spec.model}, pruned")]
    if exported.speed is not None:
        tables.append((speed_rows(exported.speed), speed_words(exported.speed)))
    tables.append((file_rows(exported.files), f"written to {exported.folder}, with report.html, report.md and spec.json"))
    for rows, title in tables:
        show([dict(zip(rows[0], row, strict=True)) for row in rows[1:]], False, title)
