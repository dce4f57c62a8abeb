"""Command lines and Python snippets that reproduce a figure or a file from its spec."""

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import TYPE_CHECKING

from intrafusion.data.datasets import KEPT, OWN
from intrafusion.pruning.importance import needs_images
from intrafusion.spec import MERGE_FIELDS, PLAN_FIELDS, PruneSpec

if TYPE_CHECKING:
    from intrafusion.studies.study_file import Study
    from intrafusion.training.methods.spec import TrainSpec

FLAGS = {"dataset": "data"}  # fields with another name on the command line
_DEFAULT = {field.name: field.default for field in fields(PruneSpec)}


def flag(name: str) -> str:
    """Return the command line's flag for a spec field."""
    return "--" + FLAGS.get(name, name).replace("_", "-")


def curve_line(base: PruneSpec, **swept: Sequence[object]) -> str:
    """Return `python -m intrafusion curve ...` for `base` with the swept fields' values; defaults are omitted."""
    return _line("curve", base, swept)


def sweep_line(study: "Study", **options: str) -> str:
    """Return `python -m intrafusion sweep ...` for a study; defaults are omitted.

    options: further flags, such as executor="ray".
    """
    words = ["--name", study.name, *(["--decide"] if study.decide else [])]
    words += [word for name, value in options.items() for word in (flag(name), value)]
    return f"{_line('sweep', study.base, study.axes)} {shlex.join(words)}"


def study_snippet(study: "Study") -> str:
    """Return Python code that measures a study and stores its results."""
    base = "".join(f", {n}={v!r}" for n, v in vars(study.base).items() if v != _DEFAULT[n] and n not in study.axes)
    return "\n".join(
        [
            "import intrafusion as itf",
            "from intrafusion.studies import Study",
            "",
            f"base = itf.PruneSpec({base.removeprefix(', ')})",
            f"study = Study({study.name!r}, base, {dict(study.axes)!r})",
            "session = itf.open_session(base)",
            "with itf.Store() as store:",
            f"    for result in itf.sweep(study.specs(session.groups), session, store, decide={study.decide}):",
            "        print(result)",
        ]
    )


def scores_line(base: PruneSpec, criteria: Sequence[str]) -> str:
    """Return `python -m intrafusion scores ...`: one row per channel, with its score and rank by each criterion."""
    return _line("scores", base, {"criterion": criteria, "sparsity": [base.sparsity]})


def plan_line(base: PruneSpec) -> str:
    """Return `python -m intrafusion plan ...`: one row for each channel and target between which mass moves."""
    return _line("plan", base, {"criterion": [base.criterion], "sparsity": [base.sparsity]})


def _line(command: str, base: PruneSpec, swept: Mapping[str, Sequence[object]]) -> str:
    words = ["python", "-m", "intrafusion", command]
    for name in _DEFAULT:
        value = getattr(base, name)
        if name in swept:
            words += [flag(name), *(str(v) for v in swept[name])]
        elif name in ("model", "dataset") or value != _DEFAULT[name]:
            words.append(flag(name))
            if value is not True:
                words += map(str, value) if isinstance(value, tuple) else ["all" if value is None else f"{value}"]
            elif command == "sweep":  # its flags all take one or several values
                words.append("true")
    return shlex.join(words)


def _load_lines(base: PruneSpec) -> list[str]:
    weights = f", weights={base.weights!r}" if base.weights else ""
    return ["import intrafusion as itf", "", f"model = itf.load_model({base.model!r}{weights})"]


def _calibration_lines(base: PruneSpec) -> list[str]:
    path = f", path={base.data_path!r}" if base.data_path else ""
    size = ", input_size=model.card.input_size" if _is_cropped(base) else ""
    return [f"calibration = itf.load_calibration({base.dataset!r}{path}, limit={base.calibration}, seed={base.seed}{size})"]


def _is_cropped(base: PruneSpec) -> bool:
    """Return whether the data are images of any size, of which a part is decoded at the network's input size."""
    return base.dataset.startswith(("imagenet", OWN, KEPT))


def _group_lines(base: PruneSpec, group: str, sees: bool) -> list[str]:
    return [
        *_load_lines(base),
        *(_calibration_lines(base) if sees else []),
        "groups = itf.find_groups(model, model.card.example())",
        f"group = next(g for g in groups if g.name == {group!r})",
    ]


def scores_snippet(base: PruneSpec, group: str, criteria: Sequence[str]) -> str:
    """Return Python code that scores one group's channels by several criteria."""
    sees = any(needs_images(base.but(criterion=criterion, cost="weights")) for criterion in criteria)
    data = ", data=calibration" if sees else ""
    return "\n".join(
        [
            *_group_lines(base, group, sees),
            f"for criterion in {list(criteria)!r}:",
            f"    print(criterion, itf.score(model, group, criterion{data}{_knobs(base, 'seed', 'calibration')}))",
        ]
    )


def plan_snippet(base: PruneSpec, group: str) -> str:
    """Return Python code that computes one group's scores and transport plan."""
    sees = needs_images(base)
    data = ", data=calibration" if sees else ""
    return "\n".join(
        [
            *_group_lines(base, group, sees),
            f"scores = itf.score(model, group, criterion={base.criterion!r}{data}{_knobs(base, 'seed', 'calibration')})",
            f"plan = itf.plan(model, group, scores, sparsity={base.sparsity!r}{_knobs(base, *PLAN_FIELDS)}{data})",
            "plan.kept, plan.matrix, plan.cost",
        ]
    )


def curve_snippet(
    base: PruneSpec, merges: Sequence[str], sparsities: Sequence[float], criteria: Sequence[str] = ("l1",)
) -> str:
    """Return Python code that computes a curve."""
    path = f", path={base.data_path!r}" if base.data_path else ""
    size = f", input_size=model.card.input_size, limit={base.limit}" if _is_cropped(base) else ""
    sees = any(needs_images(base.but(criterion=criterion)) for criterion in criteria)
    knobs = (", data=calibration" if sees else "") + _knobs(base, *PLAN_FIELDS, *MERGE_FIELDS)
    groups = list(base.groups) if isinstance(base.groups, tuple) else base.groups
    values = ", ".join(repr(s) for s in sparsities)
    return "\n".join(
        [
            *_load_lines(base),
            "example = model.card.example()",
            f"data = itf.load_data({base.dataset!r}{path}{size})",
            *(_calibration_lines(base) if sees else []),
            f"for sparsity in [{values}]:",
            f"    for criterion, merge in {[(c, m) for c in criteria for m in merges]!r}:",
            f"        small = itf.prune(model, example, sparsity, criterion, merge, groups={groups!r}{knobs})",
            f"        result = itf.evaluate(small, data, limit={base.limit}, seed={base.seed})",
            "        print(sparsity, criterion, merge, result.accuracy, result.interval)",
        ]
    )


def recovery_snippet(base: PruneSpec) -> str:
    """Return Python code that prunes one network, recovers it and measures it."""
    base_ = "".join(f", {n}={v!r}" for n, v in vars(base).items() if v != _DEFAULT[n])
    return "\n".join(
        [
            "import intrafusion as itf",
            "from intrafusion.studies import merged, recovery",
            "",
            f"spec = itf.PruneSpec({base_.removeprefix(', ')})",
            "session = itf.open_session(spec)",
            "made = merged(spec, session)",
            "for told in recovery(spec, session, made):",
            "    print(told)",
            "made.small.card = session.card",
            "print(itf.evaluate(made.small, session.images(), limit=spec.limit, seed=spec.seed).accuracy)",
        ]
    )


def _knobs(base: PruneSpec, *names: str) -> str:
    return "".join(f", {name}={getattr(base, name)!r}" for name in names if getattr(base, name) != _DEFAULT[name])


def lab_line(spec: "TrainSpec") -> str:
    """Return `python -m intrafusion lab ...` for a run of the training lab; defaults are omitted."""
    words = []
    for name, value in _changed(spec).items():
        words += [flag(name), *(map(str, value) if isinstance(value, tuple) else [str(value)])]
    return shlex.join(["python", "-m", "intrafusion", "lab", *words])


def lab_snippet(spec: "TrainSpec") -> str:
    """Return Python code that trains a run of the lab and opens its network."""
    told = ", ".join(f"{name}={value!r}" for name, value in _changed(spec).items())
    return "\n".join(
        [
            "from intrafusion.training import TrainSpec, open_run, run_training",
            "",
            f"spec = TrainSpec({told})",
            "for told in run_training(spec):",
            "    print(told)",
            "model = open_run(spec).model",
        ]
    )


def _changed(spec: "TrainSpec") -> dict[str, object]:
    """Return the fields that differ from their defaults, and always method and model."""
    default = {field.name: field.default for field in fields(spec)}
    return {name: value for name, value in vars(spec).items() if value != default[name] or name in ("method", "model")}


def landscape_line(base: PruneSpec, size: int) -> str:
    """Return `python -m intrafusion landscape ...`: a row for each grid point and for each of the three networks."""
    line = _line("landscape", base, {"criterion": [base.criterion], "sparsity": [base.sparsity]})
    return f"{line} --size {size}"


def landscape_snippet(base: PruneSpec, size: int) -> str:
    """Return Python code that measures the slice through the dense, dropped and fused weights."""
    given = ", ".join(f"{name}={value!r}" for name, value in vars(base).items() if value != _DEFAULT[name])
    return "\n".join(
        [
            "import intrafusion as itf",
            "from intrafusion.studies import Solutions, slices",
            "",
            f"spec = itf.PruneSpec({given})",
            "solutions = Solutions(spec, itf.open_session(spec))",
            f"for found in slices(solutions, size={size}):",
            '    print(f"{found.surface.share:.0%} of the grid")',
            "for mark in found.marks:",
            "    print(mark.name, mark.accuracy, mark.loss)",
            "found.surface.x, found.surface.y, found.surface.accuracy, found.surface.loss",
        ]
    )


def prune_line(base: PruneSpec, out: str, formats: Sequence[str] = (), speed: bool = False) -> str:
    """Return `python -m intrafusion prune ...`, which writes one network into a folder. formats: empty for all."""
    swept: dict[str, Sequence[object]] = {
        "criterion": [base.criterion],
        "merge": [base.merge],
        "sparsity": [base.sparsity],
    }
    words = ["--out", out, *(["--formats", *formats] if formats else []), *(["--speed"] if speed else [])]
    return f"{_line('prune', base, swept)} {shlex.join(words)}"


def prune_snippet(base: PruneSpec, out: str, formats: Sequence[str] = (), speed: bool = False) -> str:
    """Return Python code that prunes one network and writes it into a folder."""
    given = "".join(f", {name}={value!r}" for name, value in vars(base).items() if value != _DEFAULT[name])
    options = (f", {list(formats)!r}" if formats else "") + (", speed=True" if speed else "")
    return "\n".join(
        [
            "import intrafusion as itf",
            "",
            f"spec = itf.PruneSpec({given.removeprefix(', ')})",
            f"for told in itf.export(spec, itf.open_session(spec), {out!r}{options}):",
            "    print(told.doing)",
            "for file in told.result.files:",
            "    print(file.format, file.difference, file.reason)",
        ]
    )
