"""The command `own`: upload weights, a program or images, and list and remove what is kept."""

import argparse
from pathlib import Path
from typing import Any

from intrafusion.cli.options import add_command, add_weights_key, progress, show, summary_of
from intrafusion.data.arrays import LAYOUTS, Reading
from intrafusion.errors import IntrafusionError
from intrafusion.models.weights_file import SUFFIXES

_AS_MODEL = "for use as --model kept/NAME"


def add_own(commands: Any, parser_class: type[argparse.ArgumentParser]) -> list[argparse.ArgumentParser]:
    """Add the command and its subcommands to `commands`, and return the subcommands' parsers."""
    own = add_command(
        commands, "own", "Import your own weights, exported program or images", "Files are only read; no code in them is run."
    )
    kinds = own.add_subparsers(required=True, metavar="WHAT", parser_class=parser_class, help="see below")

    weights = add_command(
        kinds,
        "weights",
        "Import a weights file of a known architecture",
        examples=["resnet20.pth --model cifar10-resnet20 --name mine"],
    )
    weights.add_argument("file", type=Path, metavar="FILE", help=f"state dict, possibly wrapped, in {', '.join(SUFFIXES)}")
    weights.add_argument("--model", required=True, help="architecture: a name from `models`")
    weights.add_argument("--name", required=True, help=f"name to save it under, {_AS_MODEL}")
    add_weights_key(weights, dest="key")
    weights.set_defaults(command=_weights)

    program = add_command(
        kinds,
        "program",
        "Import a program saved by torch.export.save",
        examples=["net.pt2 --name mine --data cifar10"],
    )
    program.add_argument("file", type=Path, metavar="FILE", help="exported program, .pt2")
    program.add_argument("--name", required=True, help=f"name to save it under, {_AS_MODEL}")
    program.add_argument("--data", default="own", help="dataset it was trained on: a name from `data`, or kept/NAME")
    for name in ("mean", "std"):
        program.add_argument(
            f"--{name}", nargs="+", type=float, help=f"{name} of the normalisation, one per channel, for pixels from 0 to 1"
        )
    program.set_defaults(command=_program)

    data = add_command(kinds, "data", "Import labelled images", examples=["x_train.npz x_test.npz --name mine"])
    data.add_argument(
        "files",
        nargs="+",
        type=Path,
        metavar="FILE",
        help="one .npz, x_train.npz and x_test.npz, or a .zip of class folders",
    )
    data.add_argument("--name", required=True, help="name to save them under, for use as --data kept/NAME")
    data.add_argument(
        "--layout", choices=LAYOUTS, help="arrays: channels last (nhwc) or first (nchw), if the shape is ambiguous"
    )
    data.add_argument(
        "--range",
        nargs=2,
        type=float,
        metavar=("BLACK", "WHITE"),
        help="arrays: pixel values of black and white, such as 0 16",
    )
    data.set_defaults(command=_data)

    listed = add_command(kinds, "list", "List the saved networks and images and the damaged runs")
    listed.set_defaults(command=_list)
    removed = add_command(kinds, "remove", "Remove a saved network, saved images or a damaged run", examples=["kept/mine"])
    removed.add_argument("name", metavar="NAME", help="kept/NAME, or lab/NAME of a damaged run")
    removed.add_argument("--images", action="store_true", help="remove the images of that name instead of the network")
    removed.set_defaults(command=_remove)
    own.epilog = "\n".join(["commands:", *(f"  {name:10}{summary_of(one)}" for name, one in kinds.choices.items())])
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
    show([row], args.json, f"Saved as {name}; use it with --model {name}")


def _data(args: argparse.Namespace) -> None:
    from intrafusion.studies.uploads import take_data

    reading = Reading(args.layout, args.range and tuple(args.range))
    with progress() as bar:
        task = bar.add_task("reading images", total=None)
        name = take_data(args.files, args.name, lambda done, total: bar.update(task, completed=done, total=total), reading)
    rows = _described(name)
    show(rows, args.json, f"Saved as {name}; use them with --data {name}")


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
    rows += [{"kept": name, "what": "run", "about": why} for name, why in damaged().items()]
    if rows or args.json:
        show(rows, args.json, "Saved on this machine")
        return
    raise IntrafusionError("nothing is saved yet; see `own weights`, `own program` and `own data`")


def _remove(args: argparse.Namespace) -> None:
    from intrafusion.runtime.staging import IMAGES, NETWORKS, RUNS
    from intrafusion.studies.uploads import remove

    remove(IMAGES if args.images else RUNS if args.name.startswith("lab/") else NETWORKS, args.name)
    show([{"removed": args.name}], args.json, "Removed")
