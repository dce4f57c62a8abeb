"""The command line: `python -m intrafusion --help` lists the commands, each `COMMAND --help` its flags.

Results go to stdout, as tables or as lines of JSON (`--json`). Progress and messages go to stderr. The exit status is 2 for
bad input, with one line of explanation, and 1 for work that failed. An unexpected error also exits with 1, and its one line
says where the traceback is.
"""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from intrafusion._registry import registry
from intrafusion.cli.docs import DOCS, add_docs, update_tables
from intrafusion.cli.doctor import add_doctor
from intrafusion.cli.landscape import add_landscape
from intrafusion.cli.options import HELP, add_spec_flags, add_weights_key, decoding_progress, join_key, show, spec_of
from intrafusion.cli.prune import add_prune
from intrafusion.cli.studies import add_commands
from intrafusion.cli.train import add_lab
from intrafusion.cli.upload import add_own
from intrafusion.data.datasets import DATASETS, load_data
from intrafusion.errors import IntrafusionError, is_of_network
from intrafusion.models.hub import ARCHITECTURES, describe, model_names
from intrafusion.models.precision import PRECISIONS
from intrafusion.runtime import shutdown
from intrafusion.runtime.cancellation import Cancelled, interruptible
from intrafusion.runtime.log import explain, say, start, where
from intrafusion.runtime.paths import ASSETS
from intrafusion.spec import PruneSpec

if TYPE_CHECKING:
    from intrafusion.pruning.groups.group import Group
    from intrafusion.studies.session import Session

KINDS = ("criterion", "merge", "solver", "recovery", "trainer")


class _Parser(argparse.ArgumentParser):
    """A parser whose errors are one line, without the usage text."""

    def error(self, message: str) -> NoReturn:
        raise IntrafusionError(f"{self.prog}: {message} (see --help)")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return the exit status."""
    try:
        with interruptible():
            start()
            if any("\0" in word for word in argv or ()):  # impossible from a shell, but possible from Python
                raise IntrafusionError("a word of the command holds a NUL character, which no name has")
            args = _parser().parse_args(argv)  # exits after --help
            join_key(args)
            try:
                status = args.command(args)
            except SystemExit as error:
                raise IntrafusionError(f"the code of the model ended the program (status {error.code})") from error
            sys.stdout.flush()
    except (KeyboardInterrupt, Cancelled):
        return shutdown.cancelled()
    except BrokenPipeError:  # the reader of stdout has ended, for example `head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except SystemExit:
        raise
    except BaseException as error:  # a panic in a library written in Rust is not an Exception
        said, number = explain(error, "command")
        if number is None:
            say(f"error: {said}")
            return 2
        say(f"error: {'' if is_of_network(error) else 'internal error, '}{said} (id {number}; its traceback {where()})")
        return 1
    return status or 0


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="intrafusion", description="Structured pruning by Optimal Transport.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND", parser_class=_Parser)

    models = commands.add_parser("models", help="list the models that load by name")
    models.add_argument("--imagenet", action="store_true", help="torchvision's ImageNet models too")
    models.set_defaults(command=_models)

    data = commands.add_parser("data", help="list the datasets, or describe one")
    data.add_argument("name", nargs="?", help="a dataset to load and describe")
    data.add_argument("--data-path", help=HELP["data_path"])
    data.add_argument("--split", default="test", help="train or test")
    data.add_argument("--download", action="store_true", help="fetch it when it is not there")
    data.set_defaults(command=_data)

    groups = commands.add_parser("groups", help="list a model's channel groups")
    groups.add_argument("--model", default=PruneSpec.model, help=HELP["model"])
    groups.add_argument("--weights", help=HELP["weights"])
    add_weights_key(groups)
    groups.set_defaults(command=_groups)

    methods = commands.add_parser("methods", help="list the criteria, merges, solvers, recoveries and trainers")
    methods.add_argument("kind", nargs="?", choices=KINDS, help="one of them")
    methods.add_argument(
        "--markdown", nargs="?", type=Path, metavar="FILE", const=DOCS / "methods.md",
        help="write the tables of methods in this document anew; without FILE in assets/docs/methods.md",
    )  # fmt: skip
    methods.set_defaults(command=_methods)

    scores = commands.add_parser("scores", help="importance of each channel, by each criterion")
    add_spec_flags(scores)
    scores.add_argument("--device", default="cpu", help="cpu or cuda")
    scores.set_defaults(command=_scores)

    plan = commands.add_parser("plan", help="the transport plan of each group: where every channel's mass goes")
    add_spec_flags(plan)
    plan.add_argument("--device", default="cpu", help="cpu or cuda")
    plan.set_defaults(command=_plan)

    measured = [*add_commands(commands), add_landscape(commands), add_prune(commands)]

    train = commands.add_parser("train", help="make an embedded model again: weights and card")
    train.add_argument("model", help="a name with a recipe")
    train.add_argument("--data-path", help=HELP["data_path"])
    train.add_argument("--out", type=Path, default=ASSETS, help="folder for NAME.safetensors and NAME.json")
    train.add_argument("--epochs", type=int, help="instead of the recipe's")
    train.add_argument("--seed", type=int, help="instead of the recipe's")
    train.add_argument("--precision", choices=PRECISIONS, help=HELP["precision"])
    train.set_defaults(command=_train)

    lab = add_lab(commands)
    own = add_own(commands, _Parser)

    listing = add_doctor(commands), add_docs(commands), models, data, methods, groups
    for command in (*listing, *own, scores, plan, train, lab, *measured):
        command.add_argument("--json", action="store_true", help="one JSON object a line on stdout")
    return parser


def _models(args: argparse.Namespace) -> None:
    rows = [describe(name) for name in model_names(args.imagenet)]
    if not args.json:
        rows = [row | {"accuracy": row["accuracy"] and f"{row['accuracy']:.1%}"} for row in rows]
    show(rows, args.json, "Models")


def _data(args: argparse.Namespace) -> None:
    if args.name is None:
        show([{"name": name, "summary": summary} for name, summary in DATASETS.items()], args.json, "Datasets")
        return
    with decoding_progress() as tell:
        data = load_data(args.name, args.split, args.data_path, download=args.download, progress=tell)
    shape = [len(data), *data.images.shape[1:]]
    row = {
        "name": data.name,
        "split": data.split,
        "images": shape,
        "labelled": int((data.labels >= 0).sum()),
        "classes": len(data.classes),
        "names": data.classes[:20],
    }
    show([row], args.json, data.name)


def _groups(args: argparse.Namespace) -> None:
    from intrafusion.studies.session import open_session

    session = open_session(args.model, weights=args.weights)
    rows = [
        {"name": g.name, "channels": g.size, "layers": len(g.layers), "prunable": g.reason is None, "reason": g.reason}
        for g in session.groups
    ]
    prunable = sum(group.reason is None for group in session.groups)
    sizes = f"{session.size.params:,} parameters, {session.size.macs / 1e6:,.1f} million MACs"
    show(rows, args.json, f"{args.model}: {prunable} of {len(rows)} groups can be pruned; {sizes}")
    if session.size.note:
        say(session.size.note)


def _methods(args: argparse.Namespace) -> None:
    if args.markdown:
        update_tables(args.markdown)
        say(f"updated the tables of {args.markdown}")
        return
    kinds = [args.kind] if args.kind else KINDS
    rows = [
        {"kind": kind, "name": e.name, "needs": e.needs, "summary": e.told, "paper": e.paper, "differs": e.differs}
        for kind in kinds
        for e in registry(kind).values()
    ]
    show(rows, args.json, "Methods")


def _opened(args: argparse.Namespace) -> tuple[list[PruneSpec], "Session", list["Group"]]:
    """Return the specs of `scores` and `plan`, the session and the chosen groups.

    The specs differ only in criterion and sparsity.
    """
    from intrafusion.pruning.pruner import choose_groups
    from intrafusion.studies.measurement import check_spec
    from intrafusion.studies.session import open_session
    from intrafusion.studies.sweeps import grid

    specs = grid(spec_of(args), criterion=args.criterion, sparsity=args.sparsity)
    session = open_session(args.model, args.device, args.weights)
    for spec in specs:
        check_spec(spec, session)
    return specs, session, choose_groups(session.groups, specs[0].groups)


def _scores(args: argparse.Namespace) -> None:
    from intrafusion.pruning.agreement import compare_criteria

    specs, session, groups = _opened(args)
    rows = []
    for group in groups:
        for spec in specs:
            compared = compare_criteria(
                {spec.criterion: session.scores(spec, group).values}, group, spec.sparsity, spec.round_to
            )
            columns = compared.scores[0].tolist(), compared.ranks[0].tolist(), compared.kept[0].tolist()
            rows += [
                {
                    "group": group.name,
                    "criterion": spec.criterion,
                    "sparsity": spec.sparsity,
                    "channel": channel,
                    "score": score,
                    "rank": rank,
                    "kept": kept,
                }
                for channel, (score, rank, kept) in enumerate(zip(*columns, strict=True))
            ]
    show(rows, args.json, f"{args.model}: importance of the channels")


def _plan(args: argparse.Namespace) -> None:
    from intrafusion.pruning.transport.provenance import moves

    specs, session, groups = _opened(args)
    rows = [
        {"group": group.name, "criterion": spec.criterion, "sparsity": spec.sparsity, **move}
        for group in groups
        for spec in specs
        for move in moves(session.plan(spec, group))
    ]
    show(rows, args.json, f"{args.model}: where the mass of each channel goes")


def _train(args: argparse.Namespace) -> None:
    from intrafusion.training.embedded_models import make

    if args.model not in ARCHITECTURES:
        raise IntrafusionError(f"unknown model {args.model!r}: see `models`")
    dataset = ARCHITECTURES[args.model].card.dataset
    changes = {key: value for key in ("epochs", "seed", "precision") if (value := getattr(args, key)) is not None}
    flags = "".join(f" --{key} {value}" for key, value in changes.items())
    command = f"python -m intrafusion train {args.model}{' --data-path DATA' if args.data_path else ''}{flags}"
    train_data, test_data = (load_data(dataset, split, args.data_path) for split in ("train", "test"))
    card = make(args.model, train_data, test_data, command, args.out, say, **changes)
    told = {"accuracy": card.accuracy, **{key: card.details[key] for key in ("parameters", "test_images", "seed")}}
    title = f"{card.name}: {card.accuracy:.2%} of the test images, written to {args.out}"
    show([card.to_dict() if args.json else told], args.json, title)
