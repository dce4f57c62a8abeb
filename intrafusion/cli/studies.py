"""The commands `curve` and `sweep`, which measure, and `studies`, which manages stored studies.

`curve` and `sweep` exit with status 1 if a point failed.
"""

import argparse
import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from intrafusion.cli.options import (
    HELP,
    add_command,
    add_device,
    add_download,
    add_spec_flags,
    add_weights_key,
    decoding_progress,
    help_of,
    progress,
    show,
    spec_of,
)
from intrafusion.errors import IntrafusionError, one_line
from intrafusion.models.hub import dataset_of
from intrafusion.reporting.snippets import flag
from intrafusion.runtime.atomic_write import atomic_path
from intrafusion.runtime.escaping import csv
from intrafusion.runtime.log import say, where
from intrafusion.spec import PruneSpec

if TYPE_CHECKING:
    from intrafusion.studies.measurement import Result
    from intrafusion.studies.session import Session
    from intrafusion.studies.store.sqlite import Store
    from intrafusion.studies.study_file import Study

EXECUTORS = ("local", "ray")


def add_commands(commands: Any) -> list[argparse.ArgumentParser]:
    """Add these commands to `commands`, and return their parsers."""
    curve = add_command(
        commands,
        "curve",
        "Measure accuracy against sparsity, for each criterion and merge",
        examples=["--criterion l1 taylor --sparsity 0.1:0.7:0.1"],
    )
    add_spec_flags(curve)
    curve.set_defaults(command=_curve)

    sweep = add_command(
        commands,
        "sweep",
        "Measure a study: every combination of the given values",
        "Each point is measured once and stored. The flags of pruning take several values, or a range start:stop:step for "
        "numbers; flags that are left out have the defaults of `curve`, or the values in --file. --groups takes each (the "
        "default: one point for each group), all, names, and names joined by +.",
        ["--merge drop fusion --sparsity 0.1:0.7:0.1 --seed 0 1 2", "--file study.toml"],
    )
    for field in fields(PruneSpec):
        if field.name != "sparsities":
            sweep.add_argument(
                flag(field.name), dest=field.name, nargs="+", default=argparse.SUPPRESS, help=help_of(field.name)
            )
    add_weights_key(sweep)
    sweep.add_argument("--file", help="study file (TOML); other flags override it")
    sweep.add_argument("--name", default=argparse.SUPPRESS, help="name of the study in the store")
    sweep.add_argument("--decide", action="store_true", help="stop points whose difference between merges is decided")
    sweep.add_argument("--resume", action=argparse.BooleanOptionalAction, default=True, help="reuse stored results")
    sweep.add_argument("--executor", default="local", choices=EXECUTORS, help="compute in this process or on a Ray cluster")
    sweep.add_argument("--address", help="address of the Ray cluster; by default $RAY_ADDRESS, or a cluster on this machine")
    sweep.set_defaults(command=_sweep)

    for command in (curve, sweep):
        add_device(command)
        add_download(command)
        command.add_argument("--memory", type=int, default=1024, help="MiB of activations to cache")
        command.add_argument("--store", help=HELP["store"])

    studies = add_command(
        commands, "studies", "List, show, export or delete stored studies", examples=["list", "export NAME --out results.csv"]
    )
    studies.add_argument("action", choices=("list", "show", "export", "delete"), help="what to do")
    studies.add_argument("name", nargs="?", metavar="NAME", help="name of the study, for all actions but list")
    studies.add_argument("--store", help=HELP["store"])
    studies.add_argument("--out", type=Path, help="export: a .csv, .parquet or .toml file; by default CSV to stdout")
    studies.set_defaults(command=_studies)
    return [curve, sweep, studies]


def _curve(args: argparse.Namespace) -> int:
    from intrafusion.studies.session import open_session
    from intrafusion.studies.store.sqlite import Store
    from intrafusion.studies.sweeps import grid

    specs = grid(spec_of(args), criterion=args.criterion, merge=args.merge, sparsity=args.sparsity)
    with decoding_progress() as tell:
        session = open_session(specs[0], args.device, download=args.download, limit=args.limit, progress=tell)
    with Store(args.store) as store:
        found, failed = _measured(specs, session, store, args)
    if found and not args.json:
        first = found[0]
        title = f"{args.model} on {first.count:,} {first.spec.dataset} images: dense {first.dense_accuracy:.1%}"
        show(_readable(found), False, title)
    return int(failed > 0)


def _sweep(args: argparse.Namespace) -> int:
    from intrafusion.studies.session import open_session
    from intrafusion.studies.store.sqlite import Store
    from intrafusion.studies.sweeps import checked_specs, origin

    study = _study_of(args)
    with decoding_progress() as tell:
        session = open_session(study.base, args.device, download=args.download, limit=study.base.limit, progress=tell)
    specs = study.specs(session.groups)
    checked_specs(specs, session)  # before results are deleted or the study is stored
    with Store(args.store) as store:
        points = [(spec, origin(spec, session)) for spec in specs]
        if not args.resume:
            store.forget(points)
        store.save_study(study.name, study.to_toml(), points)
        found, failed = _measured(specs, session, store, args, study.decide)
        if not args.json:
            show(_readable(found), False, f"study {study.name!r} in {store.path}")
    return int(failed > 0)


def _study_of(args: argparse.Namespace) -> "Study":
    """Return the study of a file, of flags, or of both; flags take precedence."""
    from intrafusion.studies.study_file import FIXED, Study, parse

    given = {field.name: getattr(args, field.name) for field in fields(PruneSpec) if hasattr(args, field.name)}
    for name in FIXED:
        if len(given.get(name, ())) > 1:
            raise IntrafusionError(f"{flag(name)} takes one value; a study has one model and one dataset")
    fixed = {name: given.pop(name)[0] for name in FIXED if name in given}
    values = {name: parse(name, value) for name, value in given.items()}
    if args.file:
        study = Study.read(args.file)
    else:
        axes = {"groups": ("each",), "criterion": ("l1",), "sparsity": (0.1, 0.3, 0.5), "merge": ("drop", "fusion")}
        model = fixed.get("model", PruneSpec.model)
        study = Study("unnamed", PruneSpec(model=model, dataset=dataset_of(model)), axes)
    several = {k: found for k, found in values.items() if k in study.axes or k == "groups" or len(found) > 1}
    base = study.base.but(**fixed, **{name: found[0] for name, found in values.items() if name not in several})
    study = replace(study, base=base, axes={**study.axes, **several}, decide=study.decide or args.decide)
    if hasattr(args, "name"):
        return replace(study, name=args.name)
    if args.file:
        return study
    return replace(study, name=f"{base.model}-{hashlib.sha256(study.to_toml().encode()).hexdigest()[:6]}")


def _measured(
    specs: Sequence[PruneSpec], session: "Session", store: "Store", args: argparse.Namespace, decide: bool = False
) -> tuple[list["Result"], int]:
    """Measure the specs; with --json, print each result once it is final.

    Returns all results in the order of the specs, and the number of failures.
    """
    from intrafusion.studies.store.sqlite import point_key
    from intrafusion.studies.sweeps import Failure, origin

    if args.memory < 0:
        raise IntrafusionError(f"--memory must be at least 0 MiB, not {args.memory}")
    if session.size.note:
        say(session.size.note)
    known = store.get((spec, origin(spec, session)) for spec in specs)
    last: dict[PruneSpec, Result] = {}
    failures = []
    with progress() as bar:
        task = bar.add_task(session.card.name, total=len(specs))
        for result in _executed(specs, session, store, args, decide):
            if isinstance(result, Failure):
                failures.append(result)
                why = result.reason if result.id is None else f"{result.reason} (id {result.id}; its traceback {where()})"
                bar.console.print(_failed(result.spec, why), soft_wrap=True, markup=False, highlight=False)
                continue
            last[result.spec] = result
            if args.json and result.complete:
                print(json.dumps(result.to_row()), flush=True)
            done = sum(found.count / found.total for found in last.values()) + len(failures)
            bar.update(task, completed=round(done, 1), description=f"{result.spec.merge} {result.spec.sparsity:.0%}")
    if args.json:
        for result in last.values():
            if not result.complete:
                print(json.dumps(result.to_row()), flush=True)
    reused = sum(last[spec].count == found.count for spec, found in known.items() if spec in last)
    ours = sum(store.measured.get(point_key(spec, origin(spec, session))) == found.count for spec, found in last.items())
    counts = {
        "measured by other processes": len(last) - reused - ours,
        "decided early": sum(not found.complete for found in last.values()),
        "failed": len(failures),
    }
    say(
        f"{len(specs)} points: {reused} from the store, {ours} measured"
        + "".join(f", {count} {what}" for what, count in counts.items() if count)
    )
    return [last[spec] for spec in specs if spec in last], len(failures)


def _executed(
    specs: Sequence[PruneSpec], session: "Session", store: "Store", args: argparse.Namespace, decide: bool
) -> Iterator[Any]:
    options = {"decide": decide, "memory": args.memory << 20}
    if getattr(args, "executor", "local") == "ray":
        from intrafusion.studies.cluster import driver

        return driver.sweep_on_cluster(specs, session, store, address=args.address, **options)
    from intrafusion.studies.sweeps import sweep

    return sweep(specs, session, store, **options)


def _readable(results: Sequence["Result"]) -> list[dict[str, str]]:
    """Return rows of text for a table; other fields and the version of the code have a column only if they vary."""
    rows = [result.to_row() for result in results]
    usual = {"model", "dataset", "groups", "criterion", "sparsity", "merge"}
    varied = [f.name for f in fields(PruneSpec) if f.name not in usual and len({str(r.get(f.name)) for r in rows}) > 1]
    codes = {True: "another version", False: "this version"}
    marks = [{"code": codes[row["older_code"]]} if any(r["older_code"] for r in rows) else {} for row in rows]
    told = [{n: str(row[n]) for n in varied} | _told(row) | mark for row, mark in zip(rows, marks, strict=True)]
    return told or [{"points": "none yet"}]


def _told(row: dict[str, Any]) -> dict[str, str]:
    return {
        "groups": _names(row["groups"]),
        "criterion": row["criterion"],
        "sparsity": f"{row['sparsity']:.0%}",
        "merge": row["merge"],
        "accuracy": f"{row['accuracy']:.1%}" if row["channels"] < row["channels_before"] else "nothing pruned",
        "95 %": f"{row['low']:.1%}-{row['high']:.1%}",
        "images": f"{row['count']:,}",
        "channels": f"{row['channels']:,}/{row['channels_before']:,}",
        "params": f"{row['params'] / row['params_before']:.0%}",
        "MACs": f"{row['macs'] / row['macs_before']:.0%}",
    }


def _studies(args: argparse.Namespace) -> None:
    from intrafusion.studies.store.sqlite import Store

    with Store(args.store) as store:
        if args.action == "list":
            rows = [_study_row(row) for row in store.studies()]
            if rows or args.json:
                show(rows, args.json, f"Studies in {store.path}")
            else:
                say(f"no studies in {store.path}; `sweep` creates one")
            return
        if args.name is None:
            raise IntrafusionError(f"studies {args.action} needs the name of a study; `studies list` lists them")
        row = store.study(args.name)
        if args.action == "delete":
            gone = store.delete(args.name)
            say(f"deleted {args.name!r} and {gone} points that no other study uses")
            return
        results = store.results(args.name)
        if args.action == "export":
            _export([result.to_row() for result in results], row.text, args)
        elif args.json:
            show([result.to_row() for result in results], True, "")
        else:
            say(row.text)
            for spec, reason in store.failures(args.name).items():
                say(_failed(spec, reason))
            title = f"{args.name}: {row.done} of {row.points} points complete, {row.partial} partial, {row.failed} failed"
            if row.older:
                title += f", {row.older} measured by another version of the code"
                say("results of another version of the code are listed but not reused; `sweep` measures their points again")
            show(_readable(results), False, title)


def _failed(spec: PruneSpec, reason: str) -> str:
    return f"failed: {_names(spec.groups)}, {spec.criterion}, {spec.sparsity:.0%}, {spec.merge}: {reason}"


def _names(groups: str | Sequence[str]) -> str:
    return groups if isinstance(groups, str) else "+".join(groups)


def _study_row(row: Any) -> dict[str, Any]:
    return {
        "name": row.name,
        "created": row.created,
        "points": row.points,
        "done": row.done,
        "partial": row.partial,
        "failed": row.failed,
        "other_code": row.older,
        "seconds": round(row.seconds, 1),
        "devices": ", ".join(row.devices),
    }


def _export(rows: list[dict[str, Any]], text: str, args: argparse.Namespace) -> None:
    """Write a study's results, or its study file, to --out; without --out, write the results to stdout as CSV."""
    import pandas as pd

    table = pd.DataFrame(
        [row | {"groups": row["groups"] if row["groups"] == "all" else "+".join(row["groups"])} for row in rows]
    )
    if args.out is None:
        print(csv(table), end="")
        return
    write = {
        ".csv": lambda path: path.write_text(csv(table), encoding="utf-8", newline=""),
        ".parquet": lambda path: table.to_parquet(path, index=False),
        ".toml": lambda path: path.write_text(text, encoding="utf-8"),
    }
    if args.out.suffix not in write:
        raise IntrafusionError(f"cannot write {args.out}: its name must end in {', '.join(write)}")
    if not args.out.parent.is_dir():
        raise IntrafusionError(f"cannot write {args.out}: {args.out.parent} is not a folder")
    try:
        with atomic_path(args.out) as part:
            write[args.out.suffix](part)
    except ValueError as error:
        raise IntrafusionError(f"cannot write {args.out}: {one_line(error)}") from error
