"""The command `doctor`: check what works on this machine, and say what to do about the rest."""

import argparse
import json
from dataclasses import asdict
from typing import Any

from intrafusion.cli.options import HELP, add_command


def add_doctor(commands: Any) -> argparse.ArgumentParser:
    """Add the command to `commands`, and return its parser."""
    doctor = add_command(
        commands,
        "doctor",
        "Check that this installation works",
        "Checks versions, devices, the cache folder, the store and the embedded models, and says how to fix what is missing or "
        "broken. Exits with status 1 if a required check fails.",
    )
    doctor.add_argument("--data-path", help=HELP["data_path"])
    doctor.add_argument("--data", default="own", help="dataset in --data-path: a name from `data`")
    doctor.set_defaults(command=_doctor)
    return doctor


def _doctor(args: argparse.Namespace) -> int:
    from intrafusion.cli.health_checks import examine, is_well

    findings = []
    for found in examine(args.data_path, args.data):  # print each line as soon as it is known
        findings.append(found)
        if args.json:
            print(json.dumps(asdict(found)), flush=True)
        else:
            print(
                f"{found.state:8}{found.name:24}{found.said}" + (f"  ->  {found.todo}" if found.todo else ""),
                flush=True,
            )
    well = is_well(findings)
    if not args.json:
        print("\nAll required checks passed." if well else "\nA required check failed.")
    return 0 if well else 1
