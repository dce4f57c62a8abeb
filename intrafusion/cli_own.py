"""The command `own`: take a person's weights, program or images; list and remove what is kept."""

import argparse
from pathlib import Path
from typing import Any

from intrafusion.arrays import LAYOUTS, Reading
from intrafusion.checkpoints import SUFFIXES
from intrafusion.errors import IntrafusionError
from intrafusion.terminal import add_weights_key, progress, show


def add_own(commands: Any, parser_class: type[argparse.ArgumentParser]) -> list[argparse.ArgumentParser]:
    """Add the command and its own commands to the command line's; their parsers."""
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
    from intrafusion.own import take_weights

    _show_network(take_weights(args.file, args.model, args.name, args.key), args)


def _program(args: argparse.Namespace) -> None:
    from intrafusion.own import take_program

    _show_network(take_program(args.file, args.name, args.data, args.mean, args.std), args)


def _show_network(name: str, args: argparse.Namespace) -> None:
    from intrafusion.bench import open_model

    bench = open_model(name)
    prunable = sum(group.reason is None for group in bench.groups)
    row = {
        "kept": name, "data": bench.card.dataset, "input": list(bench.card.input_size), "classes": bench.card.classes,
        "params": bench.size.params, "macs": bench.size.macs, "macs_left_out": list(bench.size.left_out),
        "groups": len(bench.groups), "prunable": prunable,
    }  # fmt: skip
    show([row], args.json, f"Kept as {name}: open it with --model {name}")


def _data(args: argparse.Namespace) -> None:
    from intrafusion.own import take_data

    reading = Reading(args.layout, args.range and tuple(args.range))
    with progress() as bar:
        task = bar.add_task("reading pictures", total=None)
        name = take_data(
            args.files, args.name, lambda done, total: bar.update(task, completed=done, total=total), reading
        )
    rows = _described(name)
    show(rows, args.json, f"Kept as {name}: use them with --data {name}")


def _described(name: str) -> list[dict[str, Any]]:
    """A row for each split that is there."""
    from intrafusion.own.images import splits

    return [{"kept": name, "split": split, "images": count} for split, count in splits(name).items()]


def _list(args: argparse.Namespace) -> None:
    from intrafusion.data import kept_data
    from intrafusion.own.images import about
    from intrafusion.train.lab import damaged
    from intrafusion.zoo import describe, kept_names

    rows = [{"kept": name, "what": "network", "about": describe(name)["summary"]} for name in kept_names()]
    rows += [{"kept": name, "what": "images", "about": about(name)} for name in kept_data()]
    rows += [{"kept": name, "what": "run of the lab", "about": why} for name, why in damaged().items()]
    if rows or args.json:
        show(rows, args.json, "Kept on this machine")
        return
    raise IntrafusionError("nothing is kept yet: see `own weights`, `own program` and `own data`")


def _remove(args: argparse.Namespace) -> None:
    from intrafusion.own import remove
    from intrafusion.own.place import IMAGES, NETWORKS, RUNS

    remove(IMAGES if args.images else RUNS if args.name.startswith("lab/") else NETWORKS, args.name)
    show([{"removed": args.name}], args.json, "Removed")
