"""The command `lab`: train a network with a method of the lab, list runs, and keep a network."""

import argparse
import json
from dataclasses import asdict, fields
from typing import TYPE_CHECKING, Any

from intrafusion._registry import TRAINERS
from intrafusion.cli.options import Numbers, add_command, add_device, show
from intrafusion.errors import IntrafusionError, one_line
from intrafusion.runtime.log import say
from intrafusion.training.methods.spec import TrainSpec

if TYPE_CHECKING:
    from intrafusion.training.methods.runs import LabRun

_HELP = {
    "model": "architecture to train, such as digits-vgg",
    "method": f"training method: {TRAINERS.listed()}; `methods trainer` describes them",
    "data_path": "test images, such as cifar10_test.npz with cifar10_train.npz beside it",
    "training": "number of training images; by default all",
    "epochs": "training epochs",
    "lr": "peak learning rate; by default the method's",
    "batch": "batch size; by default the method's",
    "seed": "random seed of weights, data order and masks",
    "reach": "final threshold of sdprun and grda, in units of the median norm of the shrunk weights",
    "c": "strength of sdprun and grda as in the papers, instead of --reach",
    "mu": "growth rate of the threshold of sdprun and grda, between 0 and 1",
    "drawn": "frozen weights of subnetworks: kaiming, signed, or keep for the model's own initialisation",
    "penalty": "penalty of smooth compression: nuclear, first or second; by default the method's",
    "strength": "weight of the penalty in the loss; by default the method's",
    "energy": "fraction of squared singular values that truncation keeps",
    "sparsity": "fraction of channels to remove",
    "criterion": "importance criterion for pruning",
    "merge": "how to merge the removed channels",
    "rounds": "number of pruning rounds",
    "tune": "epochs of fine-tuning after each round",
    "folds": "number of folds in split-data training; even",
    "by": "how to align networks: activations or weights",
    "part": "folds to train on, such as 0 1; by default all",
}
_OPEN = {"data_path": str, "training": int, "lr": float, "batch": int, "c": float, "penalty": str, "strength": float}


def add_lab(commands: Any) -> argparse.ArgumentParser:
    """Add the `lab` command to `commands`, and return its parser."""
    lab = add_command(
        commands,
        "lab",
        "Train a network with a training method, or list the runs",
        examples=["--model digits-vgg --method sdprun --epochs 10 --keep mine", "--list"],
    )
    for field in fields(TrainSpec):
        kind: Any = _OPEN.get(field.name, type(field.default))
        many: dict[str, Any] = {"nargs": "*", "action": Numbers, "type": int} if field.name == "part" else {"type": kind}
        usual = "" if field.default in (None, ()) else f" (default: {field.default})"
        lab.add_argument(f"--{field.name.replace('_', '-')}", default=None, help=_HELP[field.name] + usual, **many)
    lab.add_argument("--spec", help="the whole spec as JSON, instead of flags")
    add_device(lab)
    lab.add_argument("--list", action="store_true", help="list the runs on this machine")
    lab.add_argument("--keep", metavar="NAME", help="save the network, for use as --model kept/NAME")
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
            say("no runs yet")
        return
    for told in run_training(_spec(args), args.device):
        if isinstance(told, LabRun):
            show([_row(told, args.json)], args.json, f"{told.spec.method} on {told.spec.model}")
            if args.keep:
                say(f"saved as {keep(told.model, args.keep)}")
        elif args.json:
            print(json.dumps(told.to_dict()), flush=True)
        else:
            say(f"{told.phase}: {told.moment}")


def _spec(args: argparse.Namespace) -> TrainSpec:
    """Return the spec of the flags. Raises IntrafusionError for bad values and for a flag that the method does not read."""
    given = {f.name: value for f in fields(TrainSpec) if (value := getattr(args, f.name)) is not None}
    if args.spec is not None:
        if given:
            raise IntrafusionError(f"--spec replaces all other flags; leave out --{next(iter(given)).replace('_', '-')}")
        try:
            raw = json.loads(args.spec)
        except (ValueError, RecursionError) as error:
            raise IntrafusionError(f"--spec is not JSON: {one_line(error)}") from error
        return TrainSpec.from_dict(raw)
    spec = TrainSpec(**given)
    for name, value in given.items():
        if getattr(spec, name) != (tuple(value) if name == "part" else value):
            knobs = ", ".join(f"--{knob}" for knob in TRAINERS[spec.method].knobs) or "none"
            raise IntrafusionError(f"{spec.method} does not use --{name.replace('_', '-')}; its own flags are: {knobs}")
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
