"""The command line."""

import argparse
import sys
from pathlib import Path

from intrafusion.data import ASSETS, load_data
from intrafusion.errors import IntrafusionError


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m intrafusion")
    commands = parser.add_subparsers(required=True)
    train = commands.add_parser("train")
    train.add_argument("model")
    train.add_argument("--data-path")
    train.add_argument("--out", type=Path, default=ASSETS)
    train.add_argument("--epochs", type=int)
    train.add_argument("--seed", type=int)
    args = parser.parse_args(argv)
    try:
        from intrafusion.train.recipes import make

        name = args.model
        dataset = name.split("-")[0]
        command = f"python -m intrafusion train {name}" + (" --data-path DATA" if args.data_path else "")
        changes = {k: getattr(args, k) for k in ("epochs", "seed") if getattr(args, k) is not None}
        card = make(
            name,
            load_data(dataset, "train", args.data_path),
            load_data(dataset, "test", args.data_path),
            command,
            args.out,
            lambda e: print(e, file=sys.stderr, flush=True),
            **changes,
        )
        print(card)
    except IntrafusionError as error:
        print(error, file=sys.stderr)
        return 2
    return 0
