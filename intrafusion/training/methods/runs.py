"""The training lab: train a network by a method, report progress, evaluate on test images, and save the run to files."""

import logging
import shutil
from collections.abc import Generator, Iterator
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import nn

from intrafusion._registry import TRAINERS
from intrafusion.data.datasets import ImageData, load_calibration, load_data
from intrafusion.errors import IntrafusionError, one_line
from intrafusion.evaluation.accuracy import evaluate, logits, size
from intrafusion.models.card import ModelCard, card_of
from intrafusion.models.fingerprint import of_images, of_text
from intrafusion.models.hub import architecture_of, dataset_of, load_saved
from intrafusion.models.serialization import save_network, saved_card
from intrafusion.models.sources.builtin import ARCHITECTURES
from intrafusion.runtime.atomic_write import remove_path
from intrafusion.runtime.code_digest import lab_version
from intrafusion.runtime.devices import choose_device
from intrafusion.runtime.paths import home, is_name
from intrafusion.training.methods import split_data as _trainers  # noqa: F401  (they register)
from intrafusion.training.methods.parallel import rows_of_part
from intrafusion.training.methods.sdprun import without_zeroed
from intrafusion.training.methods.spec import TrainSpec
from intrafusion.training.methods.task import PhaseProgress, Task, layer_weights
from intrafusion.training.recovery.finetune import hold_out

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Outcome:
    """Outcome of a run.

    accuracy: fraction correct of `count` test images. interval: its 95 % interval. zero: share of weights that are zero.
    params, macs: of the network without the channels that nothing writes. difference: largest change of a logit by removing
    those channels, as a share of the largest logit. dense_params, dense_macs: of the architecture. seconds: of training, by
    phase. where: precision and device of training, such as "fp32 on cpu".
    """

    accuracy: float
    interval: tuple[float, float]
    count: int
    zero: float
    params: int
    macs: int
    difference: float
    dense_params: int
    dense_macs: int
    seconds: dict[str, float]
    where: str = ""


@dataclass(frozen=True, eq=False)
class LabRun:
    """A complete run: its spec, its steps, its outcome, and its network with a card.

    path: the file of the run. older: whether another version of the code made it; such a run is listed but not reused.
    """

    spec: TrainSpec
    steps: tuple[PhaseProgress, ...]
    outcome: Outcome
    path: Path
    older: bool = False

    @property
    def model(self) -> nn.Module:
        """The network, read from its file, in eval mode on the CPU. Raises IntrafusionError if that fails."""
        model = load_saved(self.path, architecture_of(self.spec.model))
        model.card = replace(card_of(model), source="trained in the lab", details={"run": self.spec.to_dict()})  # type: ignore[assignment]
        return model


def run_training(spec: TrainSpec, device: str | torch.device = "auto") -> Iterator[PhaseProgress | LabRun]:
    """Train as `spec` says; yield each step, and at the end the run. The steps of an earlier run are yielded at once.

    A stopped run resumes at the next call. Raises IntrafusionError if images are missing, the disk is full, or the training
    diverges.
    """
    path = _path(spec)
    if (found := read_run(path)) is not None:
        yield from found.steps
        yield found
        return
    remove_path(path)  # a file that cannot be read
    learned, held = hold_out(_images(spec, choose_device(device)))
    rows = rows_of_part(len(learned), spec).to(learned.labels.device)
    learned = replace(learned, images=learned.images[rows], labels=learned.labels[rows])
    card = ARCHITECTURES[architecture_of(spec.model)].card
    folder = path.with_suffix(".phases")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise IntrafusionError(f"cannot write {folder}: {one_line(error)}") from error
    task = Task(spec, card, learned, held, folder, {}, run_training)
    steps: list[PhaseProgress] = []
    training: Generator[PhaseProgress, None, nn.Module] = TRAINERS[spec.method](task)
    try:
        while True:
            try:
                step = next(training)
            except StopIteration as ended:
                model = ended.value
                break
            steps.append(step)
            yield step
    finally:
        training.close()
    found = _finish(task, model, steps, path)
    shutil.rmtree(folder, ignore_errors=True)
    yield found


def check_architecture(model: str) -> None:
    """Raise IntrafusionError unless the lab can create this model's architecture from scratch."""
    if architecture_of(model) not in ARCHITECTURES:
        raise IntrafusionError(
            f"cannot train {model}: it is not a built-in architecture; choose one of `models`, such as digits-vgg"
        )


def _images(spec: TrainSpec, device: str | torch.device) -> ImageData:
    """Return the training images of a spec. Raises IntrafusionError if only a test split is available."""
    dataset = dataset_of(spec.model)
    check_architecture(spec.model)
    size = ARCHITECTURES[architecture_of(spec.model)].card.input_size
    data = load_calibration(dataset, spec.data_path, device, spec.training, 0, size)
    if data.split != "train":
        raise IntrafusionError(
            f"training needs training images of {dataset}, but only the {data.split} split was found; add {dataset}_train.npz "
            "next to it"
        )
    return data.labelled()


def _path(spec: TrainSpec) -> Path:
    """Return the file of a run, whose name is a digest of everything that the run depends on."""
    stamp = None if spec.data_path is None else Path(spec.data_path).expanduser()
    changed = stamp.stat().st_mtime_ns if stamp is not None and stamp.exists() else 0
    seen = _fingerprint(TrainSpec(spec.model, "sgd", spec.data_path, spec.training), changed)
    return home() / "lab" / f"{of_text(spec.but(data_path=None).key(), seen, lab_version())[:24]}.safetensors"


@lru_cache(maxsize=64)
def _fingerprint(spec: TrainSpec, changed: int) -> str:
    return of_images(_images(spec, "cpu"))


def _finish(task: Task, model: nn.Module, steps: list[PhaseProgress], path: Path) -> LabRun:
    """Evaluate the network on the test images, and save the run."""
    spec, device = task.spec, task.device
    model = model.eval().requires_grad_(False)
    card = replace(task.card, source="trained in the lab", details={"run": spec.to_dict()})
    _with_card(model, card)
    test = load_data(task.card.dataset, path=spec.data_path, device=device, input_size=task.card.input_size)
    result = evaluate(model, test, None)
    small = without_zeroed(model, task.example)
    dense, ours = (size(one, task.example) for one in (task.network(), small))
    before, after = (logits(one, task.held) for one in (model, _with_card(small, card)))
    moved = float((after - before).abs().max() / before.abs().max().clamp(min=1e-12))
    weights = torch.cat([weight.flatten() for weight in layer_weights(model).values()])
    zero = float((weights == 0).float().mean())
    outcome = Outcome(
        result.accuracy,
        result.interval,
        result.count,
        zero,
        ours.params,
        ours.macs,
        moved,
        dense.params,
        dense.macs,
        dict(task.seconds),
        task.recipe().where(device),
    )
    told = {
        "run": spec.to_dict(),
        "code": lab_version(),
        "outcome": asdict(outcome),
        "steps": [step.to_dict() for step in steps],
    }
    base = ARCHITECTURES[architecture_of(spec.model)].make(model.state_dict())
    save_network(model, base, replace(card, accuracy=result.accuracy, details=told), path.with_suffix(""))
    return LabRun(spec, tuple(steps), outcome, path)


def _with_card(model: nn.Module, card: Any) -> nn.Module:
    model.card = card
    return model


def read_run(path: Path) -> LabRun | None:
    """Read the run in a file; None if there is no file, or it cannot be read (the run will be trained again)."""
    try:
        return _read(path) if path.exists() else None
    except IntrafusionError as error:
        _log.warning("%s", error)
        return None


def _read(path: Path) -> LabRun:
    """Read the run in a file. Raises IntrafusionError if the file holds no run."""
    try:
        details = saved_card(path, ModelCard("", (0.0,), (1.0,), (1, 1, 1), 1, "own")).details
        outcome = Outcome(**details["outcome"] | {"interval": tuple(details["outcome"]["interval"])})
        steps, older = tuple(PhaseProgress.from_dict(raw) for raw in details["steps"]), details.get("code") != lab_version()
        return LabRun(TrainSpec.from_dict(details["run"]), steps, outcome, path, older)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise IntrafusionError(f"{path} is not a training run: {one_line(error)}") from error


def known(spec: TrainSpec) -> LabRun | None:
    """Return the earlier run of this spec; None if there is none. Raises IntrafusionError if images are missing."""
    return read_run(_path(spec))


def open_run(spec: TrainSpec) -> LabRun:
    """Return the earlier run of this spec. Raises IntrafusionError if there is none."""
    found = known(spec)
    if found is None:
        raise IntrafusionError(f"this run of {spec.method} does not exist; train it first")
    return found


def runs() -> list[LabRun]:
    """Return all runs saved on this machine, the newest first."""
    return [found for path in _paths() if (found := read_run(path)) is not None]


def damaged() -> dict[str, str]:
    """Return the runs that cannot be read, as "lab/NAME" -> reason; `staging.remove` removes them."""
    found = {}
    for path in _paths():
        try:
            _read(path)
        except IntrafusionError as error:
            if path.exists() and is_name(path.stem):
                found[f"lab/{path.stem}"] = f"damaged: {error}"
    return found


def _paths() -> list[Path]:
    return sorted((home() / "lab").glob("[!.]*.safetensors"), key=_written, reverse=True)


def _written(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except OSError:  # deleted in the meantime
        return 0.0
