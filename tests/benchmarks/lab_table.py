"""Print the tables of training methods for assets/docs/results.md, from `python -m intrafusion lab --list --json > runs.jsonl`.

python tests/benchmarks/lab_table.py runs.jsonl: means and standard deviations over the seeds, with accuracies in percent.
"""

import json
import sys
from collections import defaultdict
from pathlib import Path
from statistics import fmean, stdev

_SAID = ("model", "method", "seed", "data_path", "part", "folds")


def settings(spec: dict, default: dict) -> str:
    """Return the settings of a run that differ from the defaults, as text."""
    return ", ".join(f"{name} {value}" for name, value in spec.items() if value != default.get(name) and name not in _SAID)


def main(path: str) -> None:
    from intrafusion.training.methods.spec import TrainSpec

    default = TrainSpec().to_dict()
    rows: dict[tuple[str, str, str], list[dict]] = defaultdict(list)
    for line in Path(path).read_text().splitlines():
        row = json.loads(line)
        if not row["spec"]["part"]:
            rows[row["model"], row["method"], settings(row["spec"], default)].append(row)
    print("| model | method | settings | accuracy | weights zero | parameters left | MACs left | seconds |")
    print("|---|---|---|---|---|---|---|---|")
    for (model, method, said), found in rows.items():
        right = [100 * row["accuracy"] for row in found]
        spread = f" ± {stdev(right):.1f}" if len(right) > 1 else ""
        zero, params, macs = (
            100 * fmean(row[of] / row.get(f"dense_{of}", 1) for row in found) for of in ("zero", "params", "macs")
        )
        seconds = fmean(row["seconds"] for row in found)
        print(
            f"| {model} | `{method}` | {said} | {fmean(right):.1f}{spread} | {zero:.0f} % | {params:.0f} % | {macs:.0f} % "
            f"| {seconds:.0f} |"
        )


if __name__ == "__main__":
    main(*sys.argv[1:])
