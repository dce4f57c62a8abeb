"""The command `lab`: train a network with a method of the lab, list runs, and keep a network."""

import argparse
import json
from dataclasses import asdict, fields
from typing import TYPE_CHECKING, Any

from intrafusion._registry import TRAINERS
from intrafusion.cli.options import Numbers, show
from intrafusion.errors import IntrafusionError, one_line
from intrafusion.runtime.log import say
from intrafusion.training.methods.spec import TrainSpec

if TYPE_CHECKING:
    from intrafusion.training.methods.runs import LabRun

_HELP = {
    "model": "architecture to train, as digits-vgg",
    "method": f"{TRAINERS.listed()}; `methods trainer` says what each does",
    "data_path": "images, as cifar10_test.npz with cifar10_train.npz beside it",
    "training": "training images (all)",
    "epochs": "passes over them",
    "lr": "peak learning rate (the method's own)",
    "batch": "images a step (the method's own)",
    "seed": "of weights, order and masks",
    "reach": "threshold of sdprun and grda at the end, in units of the median norm of what is shrunk",
    "c": "the paper's strength of sdprun and grda, instead of --reach",
    "mu": "how fast the threshold of sdprun and grda grows, between 0 and 1",
    "drawn": "frozen weights of subnetworks: kaiming, signed, or keep for the model's own",
    "penalty": "of smooth compression: nuclear, first or second (the method's own)",
    "strength": "weight of a penalty in the loss (the method's own)",
    "energy": "share of squared singular values that truncation keeps",
    "sparsity": "share of the channels that go",
    "criterion": "importance criterion of pruning",
    "merge": "what becomes of the channels that go",
    "rounds": "of pruning",
    "tune": "epochs of fine-tuning after each round",
    "folds": "of split-data training; even",
    "by": "what networks are aligned by: activations or weights",
    "part": "folds to learn from, as 0 1 (all)",
}
_OPEN = {"data_path": str, "training": int, "lr": float, "batch": int, "c": float, "penalty": str, "strength": float}


def add_lab(commands: Any) -> argparse.ArgumentParser:
    """Add the `lab` command to `commands`, and return its parser."""
    lab = commands.add_parser("lab", help="train by a method of the lab, or list what was trained")
    for field in fields(TrainSpec):
        kind: Any = _OPEN.get(field.name, type(field.default))
        many: dict[str, Any] = {"nargs": "*", "action": Numbers, "type": int} if field.name == "part" else {"type": kind}
        lab.add_argument(f"--{field.name.replace('_', '-')}", default=None, help=_HELP[field.name], **many)
    lab.add_argument("--spec", help="all of it as JSON, instead of the flags")
    lab.add_argument("--device", default="cpu", help="cpu or cuda")
    lab.add_argument("--list", action="store_true", help="list the runs that are kept on this machine")
    lab.add_argument("--keep", metavar="NAME", help="keep the network, so that --model kept/NAME opens it")
    lab.set_defaults(command=_lab)
    return lab


def _lab(args: argparse.Namespace) -> None:
    from intrafusion.models.hub import keep
    from intrafusion.training.methods.runs import LabRun, run_training, runs

    if args.list:
        found = runs()
        if found or args.json:
            show([_row(one, args.json) for one in found], args.json, "Runs of the lab")
        else:
            say("nothing was trained yet")
        return
    for told in run_training(_spec(args), args.device):
        if isinstance(told, LabRun):
            show([_row(told, args.json)], args.json, f"{told.spec.method} on {told.spec.model}")
            if args.keep:
                say(f"kept as {keep(told.model, args.keep)}")
        elif args.json:
            print(json.dumps(told.to_dict()), flush=True)
        else:
            say(f"{told.phase}: {told.moment}")


def _spec(args: argparse.Namespace) -> TrainSpec:
    """Return the spec of the flags. Raises IntrafusionError for bad values and for a flag that the method does not read."""
    given = {f.name: value for f in fields(TrainSpec) if (value := getattr(args, f.name)) is not None}
    if args.spec is not None:
        if given:
            raise IntrafusionError(f"--spec says it all: leave out --{next(iter(given)).replace('_', '-')}")
        try:
            raw = json.loads(args.spec)
        except (ValueError, RecursionError) as error:
            raise IntrafusionError(f"--spec is no JSON: {one_line(error)}") from error
        return TrainSpec.from_dict(raw)
    spec = TrainSpec(**given)
    for name, value in given.items():
        if getattr(spec, name) != (tuple(value) if name == "part" else value):
            knobs = ", ".join(f"--{knob}" for knob in TRAINERS[spec.method].knobs) or "none"
            raise IntrafusionError(f"--{name.replace('_', '-')} means nothing to {spec.method}, whose own flags are: {knobs}")
    return spec


def _row(found: "LabRun", whole: bool) -> dict[str, Any]:
    """Return a run as one row: the whole run as JSON-serialisable values, or a short row."""
    outcome = asdict(found.outcome)
    seconds = outcome.pop("seconds")
    row = {
        "model": found.spec.model,
        "method": found.spec.method,
        **outcome,
        "seconds": round(sum(seconds.values()), 1),
        "code": "another version" if found.older else "this version",
    }
    if not whole:
        short = ("model", "method", "accuracy", "count", "zero", "params", "macs", "seconds", "code")
        return {key: round(row[key], 4) if isinstance(row[key], float) else row[key] for key in short}
    path = found.path.with_suffix(".safetensors")
    return row | {"phases": seconds, "spec": found.spec.to_dict(), "weights": str(path)}
