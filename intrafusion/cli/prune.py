"""The command `prune`: write one pruned network to a folder, in several verified formats, with a report."""

import argparse
import json
from pathlib import Path
from typing import Any

from intrafusion.cli.options import add_command, add_device, add_download, add_spec_flags, progress, show, single, spec_of
from intrafusion.errors import IntrafusionError
from intrafusion.runtime.log import say
from intrafusion.spec import PruneSpec


def add_prune(commands: Any) -> argparse.ArgumentParser:
    """Add the command to `commands`, and return its parser."""
    parser = add_command(
        commands,
        "prune",
        "Prune one network and write it to a folder, with a report",
        "Prunes, recovers and measures one network and writes it in each format. Every file is loaded again and its logits are "
        "compared with the network's; a file whose logits differ by more than 1e-4 of the largest logit is deleted.",
        ["--sparsity 0.5 --recovery repair --out out"],
    )
    add_spec_flags(parser)
    parser.set_defaults(command=_prune, sparsity=[0.3], merge=["fusion"])
    parser.add_argument("--out", type=Path, required=True, help="folder to write to: new or empty")
    parser.add_argument(
        "--formats",
        nargs="+",
        default=[],
        metavar="NAME",
        help="file formats to write: safetensors, torch.export, onnx; by default all",
    )
    parser.add_argument("--speed", action="store_true", help="time the dense and the pruned network on this device")
    parser.add_argument("--batch", type=int, help="size of the large batch to time, in addition to 1")
    add_device(parser)
    add_download(parser)
    return parser


def _prune(args: argparse.Namespace) -> None:
    from intrafusion.reporting import Exported, export

    chosen = {name: single(args, name) for name in ("criterion", "merge", "sparsity")}
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
        say(f"accuracy was not measured: {error}")
    return session


def _tell(exported: Any) -> None:
    from intrafusion.reporting.report import before_and_after, file_rows, speed_rows, speed_words

    made = exported.made
    tables = [(before_and_after(made), f"{made.spec.model}, pruned")]
    if exported.speed is not None:
        tables.append((speed_rows(exported.speed), speed_words(exported.speed)))
    tables.append((file_rows(exported.files), f"written to {exported.folder}, with report.html, report.md and spec.json"))
    for rows, title in tables:
        show([dict(zip(rows[0], row, strict=True)) for row in rows[1:]], False, title)
