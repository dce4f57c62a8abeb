"""The command line: `python -m intrafusion --help` lists the commands, each `COMMAND --help` its flags.

Results go to stdout, as tables or as lines of JSON (`--json`). Progress and messages go to stderr. The exit status is 2 for
bad input, with one line of explanation, and 1 for work that failed. An unexpected error also exits with 1, and its one line
says where the traceback is.
"""

import argparse
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from intrafusion._registry import registry
from intrafusion.cli.docs import DOCS, add_docs, update_tables
from intrafusion.cli.doctor import add_doctor
from intrafusion.cli.landscape import add_landscape
from intrafusion.cli.options import (
    HELP,
    add_command,
    add_device,
    add_download,
    add_spec_flags,
    add_weights_key,
    decoding_progress,
    join_key,
    show,
    spec_of,
    summary_of,
)
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
_TOUR = {
    "start": ("doctor", "docs"),
    "models and data": ("models", "data", "own", "groups"),
    "methods": ("methods", "scores", "plan"),
    "studies": ("curve", "sweep", "studies", "landscape"),
    "networks": ("prune", "lab", "train"),
}  # the commands, as --help lists them


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
                raise IntrafusionError("an argument contains a NUL character")
            args = _parser().parse_args(argv)  # exits after --help
            join_key(args)
            try:
                status = args.command(args)
            except SystemExit as error:
                raise IntrafusionError(f"the model's code exited the program (status {error.code})") from error
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
    parser = _Parser(
        prog="intrafusion",
        usage="intrafusion COMMAND ...",
        description="Structured pruning by optimal transport.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(
        required=True, metavar="COMMAND", parser_class=_Parser, prog="intrafusion", help="see below"
    )

    models = add_command(commands, "models", "List the models that can be loaded by name")
    models.add_argument("--imagenet", action="store_true", help="include torchvision's ImageNet models")
    models.set_defaults(command=_models)

    data = add_command(commands, "data", "List the datasets, or load one and describe it", examples=["cifar10 --download"])
    data.add_argument("name", nargs="?", metavar="NAME", help="dataset to load and describe")
    data.add_argument("--data-path", help=HELP["data_path"])
    data.add_argument("--split", default="test", help="split to load: train or test")
    add_download(data)
    data.set_defaults(command=_data)

    groups = add_command(commands, "groups", "List a model's channel groups")
    groups.add_argument("--model", default=PruneSpec.model, help=HELP["model"])
    groups.add_argument("--weights", help=HELP["weights"])
    add_weights_key(groups)
    groups.set_defaults(command=_groups)

    methods = add_command(commands, "methods", "List the criteria, merges, solvers, recoveries and trainers")
    methods.add_argument("kind", nargs="?", choices=KINDS, help="kind of method to list; by default all")
    methods.add_argument(
        "--markdown", nargs="?", type=Path, metavar="FILE", const=DOCS / "methods.md",
        help="regenerate the tables of methods in a Markdown file; without FILE, in assets/docs/methods.md",
    )  # fmt: skip
    methods.set_defaults(command=_methods)

    scores = add_command(
        commands,
        "scores",
        "Score the importance of each channel, by criterion",
        examples=["--model digits-resnet --criterion l1 taylor --sparsity 0.3"],
    )
    add_spec_flags(scores)
    add_device(scores)
    scores.set_defaults(command=_scores)

    plan = add_command(
        commands,
        "plan",
        "Show each group's transport plan: where each channel's mass goes",
        examples=["--model digits-mlp --sparsity 0.5 --solver sinkhorn"],
    )
    add_spec_flags(plan)
    add_device(plan)
    plan.set_defaults(command=_plan)

    measured = [*add_commands(commands), add_landscape(commands), add_prune(commands)]

    train = add_command(
        commands, "train", "Retrain an embedded model: write its weights and card", examples=["digits-mlp --out out"]
    )
    train.add_argument("model", metavar="MODEL", help="name of a model that has a recipe, such as digits-resnet")
    train.add_argument("--data-path", help=HELP["data_path"])
    train.add_argument("--out", type=Path, default=ASSETS, help="folder to write NAME.safetensors and NAME.json to")
    train.add_argument("--epochs", type=int, help="training epochs; by default the recipe's")
    train.add_argument("--seed", type=int, help="random seed; by default the recipe's")
    train.add_argument("--precision", choices=PRECISIONS, help="precision of training; by default the recipe's")
    train.set_defaults(command=_train)

    lab = add_lab(commands)
    own = add_own(commands, _Parser)

    listing = add_doctor(commands), add_docs(commands), models, data, methods, groups
    for command in (*listing, *own, scores, plan, train, lab, *measured):
        command.add_argument("--json", action="store_true", help="print one JSON object per line to stdout")
    parser.epilog = "\n".join(_tour(commands.choices))
    return parser


def _tour(parsers: Mapping[str, argparse.ArgumentParser]) -> Iterator[str]:
    """Yield the lines of an overview of the commands, by topic."""
    for topic, names in _TOUR.items():
        yield f"{topic}:"
        yield from (f"  {name:10}{summary_of(parsers[name])}" for name in names)
        yield ""
    yield "`intrafusion COMMAND --help` describes a command."


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
    show(rows, args.json, f"{args.model}: {prunable} of {len(rows)} groups are prunable; {sizes}")
    if session.size.note:
        say(session.size.note)


def _methods(args: argparse.Namespace) -> None:
    if args.markdown:
        update_tables(args.markdown)
        say(f"updated the tables in {args.markdown}")
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
    show(rows, args.json, f"{args.model}: importance of each channel")


def _plan(args: argparse.Namespace) -> None:
    from intrafusion.pruning.transport.provenance import moves

    specs, session, groups = _opened(args)
    rows = [
        {"group": group.name, "criterion": spec.criterion, "sparsity": spec.sparsity, **move}
        for group in groups
        for spec in specs
        for move in moves(session.plan(spec, group))
    ]
    show(rows, args.json, f"{args.model}: where each channel's mass goes")


def _train(args: argparse.Namespace) -> None:
    from intrafusion.training.embedded_models import make

    if args.model not in ARCHITECTURES:
        raise IntrafusionError(f"unknown model {args.model!r}; `models` lists the known ones")
    dataset = ARCHITECTURES[args.model].card.dataset
    changes = {key: value for key in ("epochs", "seed", "precision") if (value := getattr(args, key)) is not None}
    flags = "".join(f" --{key} {value}" for key, value in changes.items())
    command = f"python -m intrafusion train {args.model}{' --data-path DATA' if args.data_path else ''}{flags}"
    train_data, test_data = (load_data(dataset, split, args.data_path) for split in ("train", "test"))
    card = make(args.model, train_data, test_data, command, args.out, say, **changes)
    told = {"accuracy": card.accuracy, **{key: card.details[key] for key in ("parameters", "test_images", "seed")}}
    title = f"{card.name}: test accuracy {card.accuracy:.2%}, written to {args.out}"
    show([card.to_dict() if args.json else told], args.json, title)
