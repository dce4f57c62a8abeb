"""The command `doctor`: check what works on this machine, and say what to do about the rest."""

import argparse
import json
from dataclasses import asdict
from typing import Any

from intrafusion.cli.options import HELP


def add_doctor(commands: Any) -> argparse.ArgumentParser:
    """Add the command to `commands`, and return its parser."""
    doctor = commands.add_parser("doctor", help="look at versions, devices, store, disk and models; exit 1 where one is broken")
    doctor.add_argument("--data-path", help=HELP["data_path"])
    doctor.add_argument("--data", default="own", help="what --data-path holds: a name from `data`")
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
        print("\nEverything that is needed works." if well else "\nSomething that is needed does not work.")
    return 0 if well else 1
