"""Helpers of all commands: a flag for each field of the spec, output as tables or JSON lines, and progress bars."""

import argparse
import json
import textwrap
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields
from typing import Any

from rich.box import SIMPLE
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from intrafusion._registry import registry
from intrafusion.errors import IntrafusionError
from intrafusion.models.hub import dataset_of
from intrafusion.models.state_dict import keyed
from intrafusion.options import options_of
from intrafusion.reporting.snippets import flag
from intrafusion.runtime.cancellation import OnProgress
from intrafusion.spec import COUNTS, KINDS, PruneSpec
from intrafusion.studies.ranges import expand_range

HELP = {name: one.help for name, one in options_of(PruneSpec).items()} | {
    "weights_key": "key of the weights in a file that holds several, such as model_ema or model.state_dict",
    "groups": "channel groups to prune: all, or names from `groups`",
    "sparsity": "fractions of each group's channels to remove, in [0, 1): numbers, or ranges start:stop:step like 0.1:0.7:0.1",
    "sparsities": "one sparsity for each group named in --groups, instead of --sparsity",
    "limit": "number of evaluation images, or all",
    "calibration": "number of images for criteria and activation costs, or all",
    "training": "number of images for recoveries that train, or all",
    "device": "device to compute on: auto, cpu, cuda, xpu or mps",
    "download": "download the dataset if it is missing",
    "store": "study store; by default $INTRAFUSION_STORE, or a file in the cache folder",
}
SWEPT = ("criterion", "merge", "sparsity")
_METHODS = ("criterion", "merge", "solver", "recovery")


class _Help(argparse.RawDescriptionHelpFormatter):
    """A help formatter that keeps the line ends of descriptions and shows the defaults of flags."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        value = action.default
        if action.help is None or value is None or isinstance(value, bool) or value in (argparse.SUPPRESS, []):
            return action.help
        text = " ".join(map(str, value)) if isinstance(value, list) else str(value)
        return f"{action.help} (default: {text.replace('%', '%%')})"


def add_command(
    commands: Any, name: str, summary: str, details: str = "", examples: Sequence[str] = ()
) -> argparse.ArgumentParser:
    """Add a command to the subparsers `commands`, and return its parser.

    summary: what it does, in one line. details: more about it. examples: its arguments in commands that show its use.
    """
    parser: argparse.ArgumentParser = commands.add_parser(name, formatter_class=_Help)
    parser.description = f"{summary}.\n\n{textwrap.fill(details, 78)}".rstrip()
    if examples:
        parser.epilog = "\n".join(
            [f"example{'s' if len(examples) > 1 else ''}:", *(f"  {parser.prog} {one}" for one in examples)]
        )
    return parser


def summary_of(parser: argparse.ArgumentParser) -> str:
    """Return the one-line summary of a command."""
    return (parser.description or "").partition(".\n")[0].removesuffix(".")


def add_device(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", default="auto", help=HELP["device"])


def add_download(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--download", action="store_true", help=HELP["download"])


def add_spec_flags(parser: argparse.ArgumentParser) -> None:
    """Add a flag for each field of the spec, so that new fields need no change here."""
    for field in fields(PruneSpec):
        options: dict[str, Any] = {"dest": field.name, "default": field.default, "help": help_of(field.name)}
        kind = KINDS[field.name]
        if field.name in SWEPT:
            default = [0.1, 0.3, 0.5] if field.name == "sparsity" else ["drop", "fusion"] if field.name == "merge" else ["l1"]
            options |= {"nargs": "+", "action": Numbers} if field.name == "sparsity" else {"nargs": "+", "type": kind}
            options["default"] = default
        elif field.name in ("groups", "sparsities"):
            options |= {"nargs": "+", "action": "store" if field.name == "groups" else Numbers}
        elif field.name in COUNTS:
            options["type"] = _limit
        elif kind is bool:
            options["action"] = "store_true"
        elif kind is not type(None):
            options["type"] = kind
        if (one := options_of(PruneSpec).get(field.name)) and one.choices:
            options["metavar"] = f"{{{','.join(one.choices)}}}"
        parser.add_argument(flag(field.name), **options)
    add_weights_key(parser)
    parser.set_defaults(dataset=None)  # None: the dataset on which the model was trained


def help_of(name: str) -> str | None:
    """Return the help of the flag for a field of the spec; for a kind of method, with the methods' names."""
    return f"{HELP[name]}: {registry(name).listed()}" if name in _METHODS else HELP.get(name)


class Numbers(argparse.Action):
    """An argparse action for numbers and ranges start:stop:step. type: float (the default) or int."""

    def __init__(self, *names: Any, type: type[int] | type[float] = float, **options: Any):
        super().__init__(*names, **options)
        self._kind = type

    def __call__(self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, values: Any, flag: Any = None) -> None:
        try:
            found = [number for value in values for number in expand_range(value, self._kind, flag)]
        except IntrafusionError as error:
            parser.error(str(error))
        setattr(namespace, self.dest, found)


def add_weights_key(parser: argparse.ArgumentParser, dest: str = "weights_key") -> None:
    parser.add_argument("--weights-key", dest=dest, metavar="KEY", help=HELP["weights_key"])


def join_key(args: argparse.Namespace) -> None:
    """Combine --weights and --weights-key in place, because specs, permalinks and studies have one text for both."""
    key, weights = getattr(args, "weights_key", None), getattr(args, "weights", None)
    if key is not None:
        if isinstance(weights, list):  # `sweep` takes several values
            args.weights = [keyed(one, key) for one in weights]
        else:
            args.weights = keyed(weights, key)


def single(args: argparse.Namespace, name: str) -> Any:
    """Return the one value of a flag that takes several. Raises IntrafusionError for more or fewer."""
    values = getattr(args, name)
    if len(values) != 1:
        raise IntrafusionError(f"this command takes one value of {flag(name)}, not {len(values)}")
    return values[0]


def _limit(text: str) -> int | None:
    return None if text == "all" else int(text)


def spec_of(args: argparse.Namespace) -> PruneSpec:
    values = {f.name: getattr(args, f.name) for f in fields(PruneSpec) if f.name not in SWEPT}
    groups = values.pop("groups")
    values["dataset"] = args.dataset or dataset_of(args.model)
    values["sparsities"] = values["sparsities"] and tuple(values["sparsities"])
    return PruneSpec(**values, groups="all" if groups in ("all", ["all"]) else tuple(groups))


@contextmanager
def progress() -> Iterator[Progress]:
    """Show a progress bar on stderr if that is a terminal."""
    console = Console(stderr=True)
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    options: dict[str, Any] = {"transient": True, "redirect_stdout": False, "redirect_stderr": False}
    with Progress(*columns, console=console, disable=not console.is_terminal, **options) as bar:
        yield bar


@contextmanager
def decoding_progress() -> Iterator[OnProgress]:
    """Yield a function of (done, total) that shows the progress of decoding images as a bar on stderr.

    Images decoded before a stop by signal are kept.
    """
    with progress() as bar:
        tasks: list[TaskID] = []

        def tell(done: int, total: int) -> None:
            if not tasks:
                tasks.append(bar.add_task("decoding images", total=total))
            bar.update(tasks[0], completed=done)

        yield tell


def show(rows: Iterable[dict[str, Any]], as_json: bool, title: str) -> None:
    rows = list(rows)
    if as_json:
        for row in rows:
            print(json.dumps(row), flush=True)  # flushed, so that printed lines are whole however the command ends
        return
    if not rows:
        print(title)
        return
    table = Table(title=_text(title), title_justify="left", header_style="bold", box=SIMPLE)
    for column in rows[0]:
        table.add_column(column, justify="right" if isinstance(rows[0][column], int | float) else "left")
    for row in rows:
        table.add_row(*(_text("" if value is None else str(value)) for value in row.values()))
    console = Console()
    if not console.is_terminal:  # a file or a pipe has no width, so avoid truncation
        console = Console(width=200)
    console.print(table)


def _text(text: str) -> Text:
    """Return text without interpreting markup; characters that UTF-8 cannot encode are escaped."""
    return Text(text.encode("utf-8", "backslashreplace").decode())
