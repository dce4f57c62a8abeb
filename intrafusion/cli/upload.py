"""The command `own`: upload weights, a program or images, and list and remove what is kept."""

import argparse
from pathlib import Path
from typing import Any

from intrafusion.cli.options import add_weights_key, progress, show
from intrafusion.data.arrays import LAYOUTS, Reading
from intrafusion.errors import IntrafusionError
from intrafusion.models.weights_file import SUFFIXES


def add_own(commands: Any, parser_class: type[argparse.ArgumentParser]) -> list[argparse.ArgumentParser]:
    """Add the command and its subcommands to `commands`, and return the subcommands' parsers."""
    own = commands.add_parser("own", help="take your own weights, program or images; nothing in a file is run")
    kinds = own.add_subparsers(required=True, metavar="WHAT", parser_class=parser_class)

    weights = kinds.add_parser("weights", help="a weights file of a known architecture")
    weights.add_argument("file", type=Path, help=f"a state dict, perhaps wrapped, in {', '.join(SUFFIXES)}")
    weights.add_argument("--model", required=True, help="its architecture: a name from `models`")
    weights.add_argument("--name", required=True, help="to keep it under: kept/NAME opens it")
    add_weights_key(weights, dest="key")
    weights.set_defaults(command=_weights)

    program = kinds.add_parser("program", help="a program of torch.export.save")
    program.add_argument("file", type=Path, help=".pt2")
    program.add_argument("--name", required=True, help="to keep it under: kept/NAME opens it")
    program.add_argument("--data", default="own", help="what it was trained on: a name from `data`, or kept/NAME")
    for name in ("mean", "std"):
        program.add_argument(
            f"--{name}", nargs="+", type=float, help="of the normalisation, one a channel, on pixels from 0 to 1"
        )
    program.set_defaults(command=_program)

    data = kinds.add_parser("data", help="labelled images")
    data.add_argument(
        "files",
        nargs="+",
        type=Path,
        metavar="FILE",
        help="one .npz, x_train.npz and x_test.npz, or a .zip of class folders",
    )
    data.add_argument("--name", required=True, help="to keep them under: --data kept/NAME opens them")
    data.add_argument(
        "--layout", choices=LAYOUTS, help="of arrays: channels last (nhwc) or first, where the shape leaves it open"
    )
    data.add_argument(
        "--range",
        nargs=2,
        type=float,
        metavar=("BLACK", "WHITE"),
        help="of arrays: the values of black and of white, as 0 16",
    )
    data.set_defaults(command=_data)

    listed = kinds.add_parser("list", help="what is kept on this machine")
    listed.set_defaults(command=_list)
    removed = kinds.add_parser("remove", help="remove a kept network, kept images or a damaged run")
    removed.add_argument("name", help="kept/NAME, or lab/NAME of a damaged run of the lab")
    removed.add_argument("--images", action="store_true", help="the images of that name, not the network")
    removed.set_defaults(command=_remove)
    return [weights, program, data, listed, removed]


def _weights(args: argparse.Namespace) -> None:
    from intrafusion.studies.uploads import take_weights

    _show_network(take_weights(args.file, args.model, args.name, args.key), args)


def _program(args: argparse.Namespace) -> None:
    from intrafusion.studies.uploads import take_program

    _show_network(take_program(args.file, args.name, args.data, args.mean, args.std), args)


def _show_network(name: str, args: argparse.Namespace) -> None:
    from intrafusion.studies.session import open_session

    session = open_session(name)
    prunable = sum(group.reason is None for group in session.groups)
    row = {
        "kept": name,
        "data": session.card.dataset,
        "input": list(session.card.input_size),
        "classes": session.card.classes,
        "params": session.size.params,
        "macs": session.size.macs,
        "macs_left_out": list(session.size.left_out),
        "groups": len(session.groups),
        "prunable": prunable,
    }
    show([row], args.json, f"Kept as {name}: open it with --model {name}")


def _data(args: argparse.Namespace) -> None:
    from intrafusion.studies.uploads import take_data

    reading = Reading(args.layout, args.range and tuple(args.range))
    with progress() as bar:
        task = bar.add_task("reading pictures", total=None)
        name = take_data(args.files, args.name, lambda done, total: bar.update(task, completed=done, total=total), reading)
    rows = _described(name)
    show(rows, args.json, f"Kept as {name}: use them with --data {name}")


def _described(name: str) -> list[dict[str, Any]]:
    """Return a row for each split that exists."""
    from intrafusion.data.upload import splits

    return [{"kept": name, "split": split, "images": count} for split, count in splits(name).items()]


def _list(args: argparse.Namespace) -> None:
    from intrafusion.data.datasets import kept_data
    from intrafusion.data.upload import about
    from intrafusion.models.hub import describe, kept_names
    from intrafusion.training.methods.runs import damaged

    rows = [{"kept": name, "what": "network", "about": describe(name)["summary"]} for name in kept_names()]
    rows += [{"kept": name, "what": "images", "about": about(name)} for name in kept_data()]
    rows += [{"kept": name, "what": "run of the lab", "about": why} for name, why in damaged().items()]
    if rows or args.json:
        show(rows, args.json, "Kept on this machine")
        return
    raise IntrafusionError("nothing is kept yet: see `own weights`, `own program` and `own data`")


def _remove(args: argparse.Namespace) -> None:
    from intrafusion.runtime.staging import IMAGES, NETWORKS, RUNS
    from intrafusion.studies.uploads import remove

    remove(IMAGES if args.images else RUNS if args.name.startswith("lab/") else NETWORKS, args.name)
    show([{"removed": args.name}], args.json, "Removed")
