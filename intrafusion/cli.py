"""`python -m intrafusion models | data | methods | groups | scores | plan | curve | train`: tables, `--json` for programs.

Results go to stdout, progress and messages to stderr. Bad input exits with 2 and one line.
"""

import argparse
import json
import logging
import os
import sys
from collections.abc import Iterable, Sequence
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from rich.box import SIMPLE
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from intrafusion.data import DATASETS, load_data
from intrafusion.errors import IntrafusionError
from intrafusion.places import ASSETS
from intrafusion.quote import flag
from intrafusion.registry import registry
from intrafusion.spec import PruneSpec
from intrafusion.zoo import ARCHITECTURES, dataset_of, describe, model_names

if TYPE_CHECKING:
    from intrafusion.channels import Group
    from intrafusion.run import Bench

_HELP = {
    "model": "a name from `models`",
    "dataset": "a name from `data`",
    "weights": "weights file, 'random', or a torchvision enum name",
    "data_path": ".npz file or image folder",
    "groups": "'all', or names from `groups`",
    "sparsity": "shares of each group's channels to remove, each in [0, 1)",
    "limit": "evaluation images, or 'all'",
    "seed": "seed of the evaluation subset and of random choices",
    "p": "p-norm of the cost",
    "source": "source marginal",
    "target": "target marginal",
    "anchors": "target kind",
    "cost": "what the cost compares: weights, or activations on calibration images",
    "distance": "lp (with --p) or cosine",
    "reg": "entropy of sinkhorn, in units of the mean cost",
    "reg_m": "how strictly unbalanced keeps the marginals, in units of the mean cost",
    "mass": "share of the mass that partial moves",
    "calibration": "images that criteria and costs may look at, or 'all'",
    "normalise": "what sums to one in the applied matrix",
    "bias": "biases are part of the channel vectors",
}
KINDS = ("criterion", "merge", "solver", "recovery")
_SWEPT = ("criterion", "merge", "sparsity")


class _Parser(argparse.ArgumentParser):
    """Fails in one line, without the usage text."""

    def error(self, message: str) -> NoReturn:
        raise IntrafusionError(f"{self.prog}: {message} (see --help)")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; the exit status."""
    logging.basicConfig(level=logging.WARNING, stream=sys.stderr)
    try:
        args = _parser().parse_args(argv)
        args.command(args)
        sys.stdout.flush()
    except IntrafusionError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("cancelled; the results printed so far are complete", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader of stdout has gone, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="intrafusion", description="Structured pruning by Optimal Transport.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND", parser_class=_Parser)

    models = commands.add_parser("models", help="list the models that load by name")
    models.add_argument("--imagenet", action="store_true", help="torchvision's ImageNet models too")
    models.set_defaults(command=_models)

    data = commands.add_parser("data", help="list the datasets, or describe one")
    data.add_argument("name", nargs="?", help="a dataset to load and describe")
    data.add_argument("--data-path", help=_HELP["data_path"])
    data.add_argument("--split", default="test", help="train or test")
    data.add_argument("--download", action="store_true", help="fetch it when it is not there")
    data.set_defaults(command=_data)

    groups = commands.add_parser("groups", help="list a model's channel groups")
    groups.add_argument("--model", default=PruneSpec.model, help=_HELP["model"])
    groups.add_argument("--weights", help=_HELP["weights"])
    groups.set_defaults(command=_groups)

    methods = commands.add_parser("methods", help="list the criteria, merges, solvers and recoveries")
    methods.add_argument("kind", nargs="?", choices=KINDS, help="one of them")
    methods.set_defaults(command=_methods)

    scores = commands.add_parser("scores", help="importance of each channel, by each criterion")
    _add_spec_flags(scores)
    scores.add_argument("--device", default="cpu", help="cpu or cuda")
    scores.set_defaults(command=_scores)

    plan = commands.add_parser("plan", help="the transport plan of each group: where every channel's mass goes")
    _add_spec_flags(plan)
    plan.add_argument("--device", default="cpu", help="cpu or cuda")
    plan.set_defaults(command=_plan)

    curve = commands.add_parser("curve", help="accuracy against sparsity, for each criterion and merge")
    _add_spec_flags(curve)
    curve.add_argument("--device", default="cpu", help="cpu or cuda")
    curve.add_argument("--download", action="store_true", help="fetch the data when they are not there")
    curve.set_defaults(command=_curve)

    train = commands.add_parser("train", help="make an embedded model again: weights and card")
    train.add_argument("model", help="a name with a recipe")
    train.add_argument("--data-path", help=_HELP["data_path"])
    train.add_argument("--out", type=Path, default=ASSETS, help="folder for NAME.safetensors and NAME.json")
    train.add_argument("--epochs", type=int, help="instead of the recipe's")
    train.add_argument("--seed", type=int, help="instead of the recipe's")
    train.set_defaults(command=_train)

    for command in (models, data, methods, groups, scores, plan, curve, train):
        command.add_argument("--json", action="store_true", help="one JSON object a line on stdout")
    return parser


def _add_spec_flags(parser: argparse.ArgumentParser) -> None:
    """One flag for each field of the spec, so that a new knob shows up here by itself."""
    for field in fields(PruneSpec):
        options: dict[str, Any] = {"dest": field.name, "default": field.default, "help": _HELP.get(field.name)}
        kind = type(field.default)
        if field.name in _SWEPT:
            default = (
                [0.1, 0.3, 0.5] if field.name == "sparsity" else ["drop", "fusion"] if field.name == "merge" else ["l1"]
            )
            options |= {"nargs": "+", "type": kind, "default": default}
        elif field.name == "groups":
            options["nargs"] = "+"
        elif field.name in ("limit", "calibration"):
            options["type"] = _limit
        elif kind is bool:
            options["action"] = "store_true"
        elif kind is not type(None):
            options["type"] = kind
        if options["help"] is None and field.name in ("criterion", "merge", "solver", "recovery"):
            options["help"] = ", ".join(registry(field.name))
        parser.add_argument(flag(field.name), **options)
    parser.set_defaults(dataset=None)  # the one the model was trained on


def _limit(text: str) -> int | None:
    return None if text == "all" else int(text)


def _spec_of(args: argparse.Namespace) -> PruneSpec:
    values = {f.name: getattr(args, f.name) for f in fields(PruneSpec) if f.name not in _SWEPT}
    groups = values.pop("groups")
    values["dataset"] = args.dataset or dataset_of(args.model)
    return PruneSpec(**values, groups="all" if groups in ("all", ["all"]) else tuple(groups))


def _models(args: argparse.Namespace) -> None:
    rows = [describe(name) for name in model_names(args.imagenet)]
    if not args.json:
        rows = [row | {"accuracy": row["accuracy"] and f"{row['accuracy']:.1%}"} for row in rows]
    _show(rows, args.json, "Models")


def _data(args: argparse.Namespace) -> None:
    if args.name is None:
        _show([{"name": name, "summary": summary} for name, summary in DATASETS.items()], args.json, "Datasets")
        return
    data = load_data(args.name, args.split, args.data_path, download=args.download)
    shape = [len(data), *data.images.shape[1:]]
    row = {
        "name": data.name,
        "split": data.split,
        "images": shape,
        "classes": len(data.classes),
        "names": data.classes[:20],
    }
    _show([row], args.json, data.name)


def _groups(args: argparse.Namespace) -> None:
    from intrafusion.run import open_model

    bench = open_model(args.model, args.weights)
    rows = [
        {"name": g.name, "channels": g.size, "layers": len(g.layers), "prunable": g.reason is None, "reason": g.reason}
        for g in bench.groups
    ]
    prunable = sum(group.reason is None for group in bench.groups)
    _show(rows, args.json, f"{args.model}: {prunable} of {len(rows)} groups can be pruned")


def _methods(args: argparse.Namespace) -> None:
    kinds = [args.kind] if args.kind else KINDS
    rows = [
        {"kind": kind, "name": e.name, "needs": e.needs, "summary": e.summary, "paper": e.paper}
        for kind in kinds
        for e in registry(kind).values()
    ]
    _show(rows, args.json, "Methods")


def _opened(args: argparse.Namespace) -> tuple[list[PruneSpec], "Bench", list["Group"]]:
    """The specs of `scores` and `plan`, which differ in criterion and sparsity only; the bench; the chosen groups."""
    from intrafusion.prune import choose_groups
    from intrafusion.run import check, open_model
    from intrafusion.sweep import grid

    specs = grid(_spec_of(args), criterion=args.criterion, sparsity=args.sparsity)
    bench = open_model(args.model, args.weights, args.device)
    for spec in specs:
        check(spec, bench)
    return specs, bench, choose_groups(bench.groups, specs[0].groups)


def _scores(args: argparse.Namespace) -> None:
    from intrafusion.agreement import compare

    specs, bench, groups = _opened(args)
    rows = []
    for group in groups:
        for spec in specs:
            compared = compare({spec.criterion: bench.scores(spec, group).values}, group, spec.sparsity)
            columns = compared.scores[0].tolist(), compared.ranks[0].tolist(), compared.kept[0].tolist()
            rows += [
                {
                    "group": group.name, "criterion": spec.criterion, "sparsity": spec.sparsity, "channel": channel,
                    "score": score, "rank": rank, "kept": kept,
                }
                for channel, (score, rank, kept) in enumerate(zip(*columns, strict=True))
            ]  # fmt: skip
    _show(rows, args.json, f"{args.model}: importance of the channels")


def _plan(args: argparse.Namespace) -> None:
    from intrafusion.story import moves

    specs, bench, groups = _opened(args)
    rows = [
        {"group": group.name, "criterion": spec.criterion, "sparsity": spec.sparsity, **move}
        for group in groups
        for spec in specs
        for move in moves(bench.plan(spec, group))
    ]
    _show(rows, args.json, f"{args.model}: where the mass of each channel goes")


def _curve(args: argparse.Namespace) -> None:
    from intrafusion.run import open_bench
    from intrafusion.sweep import grid, sweep

    specs = grid(_spec_of(args), criterion=args.criterion, merge=args.merge, sparsity=args.sparsity)
    bench = open_bench(specs[0], args.device, download=args.download, limit=args.limit)
    console, rows = Console(stderr=True), []
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    with Progress(
        *columns,
        console=console,
        transient=True,
        redirect_stdout=False,
        redirect_stderr=False,
        disable=not console.is_terminal,
    ) as progress:
        task = progress.add_task(args.model, total=len(specs))
        for result in sweep(specs, bench):
            rows.append(result.to_row())
            if args.json:
                print(json.dumps(rows[-1]), flush=True)
            progress.update(task, advance=1, description=f"{result.spec.merge} {result.spec.sparsity:.0%}")
    if not args.json:
        dense = rows[0]["dense_accuracy"]
        title = f"{args.model} on {rows[0]['count']:,} {rows[0]['data']} images: dense {dense:.1%}"
        _show([_readable(row) for row in rows], False, title)


def _readable(row: dict[str, Any]) -> dict[str, str]:
    return {
        "criterion": row["criterion"],
        "sparsity": f"{row['sparsity']:.0%}",
        "merge": row["merge"],
        "accuracy": f"{row['accuracy']:.1%}",
        "95 %": f"{row['low']:.1%}-{row['high']:.1%}",
        "channels": f"{row['channels']:,}/{row['channels_before']:,}",
        "params": f"{row['params'] / row['params_before']:.0%}",
        "MACs": f"{row['macs'] / row['macs_before']:.0%}",
    }


def _train(args: argparse.Namespace) -> None:
    from intrafusion.train.recipes import make

    if args.model not in ARCHITECTURES:
        raise IntrafusionError(f"unknown model {args.model!r}: see `models`")
    dataset = ARCHITECTURES[args.model].card.dataset
    changes = {key: value for key in ("epochs", "seed") if (value := getattr(args, key)) is not None}
    flags = "".join(f" --{key} {value}" for key, value in changes.items())
    command = f"python -m intrafusion train {args.model}{' --data-path DATA' if args.data_path else ''}{flags}"
    train_data, test_data = (load_data(dataset, split, args.data_path) for split in ("train", "test"))
    card = make(args.model, train_data, test_data, command, args.out, lambda e: print(e, file=sys.stderr), **changes)
    _show([card.to_dict()], args.json, f"{card.name}: {card.accuracy:.2%} of the test images, written to {args.out}")


def _show(rows: Iterable[dict[str, Any]], as_json: bool, title: str) -> None:
    rows = list(rows)
    if as_json:
        for row in rows:
            print(json.dumps(row))
        return
    table = Table(title=title, title_justify="left", header_style="bold", box=SIMPLE)
    for column in rows[0]:
        table.add_column(column, justify="right" if isinstance(rows[0][column], int | float) else "left")
    for row in rows:
        table.add_row(*("" if value is None else str(value) for value in row.values()))
    Console().print(table)
