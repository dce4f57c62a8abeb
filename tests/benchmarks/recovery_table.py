"""Print the tables of recoveries for assets/docs/results.md from exported studies.

Accuracies are in percent, as mean and standard deviation over the seeds.

python -m intrafusion studies export recovery-digits-resnet --out a.csv; python tests/benchmarks/recovery_table.py a.csv ...
"""

import sys

import pandas as pd

ORDER = ("none", "bn-reset", "repair", "perp", "finetune", "similarity", "overparam", "overparam-sp")


def main(*files: str) -> None:
    table = pd.concat([pd.read_csv(file) for file in files])
    table = table[table["count"] == table["total"]]
    table["accuracy"] *= 100
    names = [name for name in ORDER if name in set(table["recovery"])]
    print("| model | channels gone | merge |", " | ".join(f"`{name}`" for name in names), "|")
    print("|---|---|---|" + "---|" * len(names))
    merges = list(dict.fromkeys(table["merge"]))
    for (model, sparsity), part in table.groupby(["model", "sparsity"], sort=False):
        for merge in merges:
            cells = []
            for name in names:
                values = part[(part["merge"] == merge) & (part["recovery"] == name)]["accuracy"]
                spread = f" ± {values.std():.1f}" if len(values) > 1 and name not in ("none", "bn-reset", "repair") else ""
                cells.append(f"{values.mean():.1f}{spread}" if len(values) else "")
            print(f"| {model} | {sparsity:.0%} | `{merge}` |", " | ".join(cells), "|")


if __name__ == "__main__":
    main(*sys.argv[1:])
