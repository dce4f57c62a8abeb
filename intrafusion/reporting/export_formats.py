"""The export formats. A file is kept only if it can be read back and its logits agree with the network's."""

import copy
import json
import tempfile
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from intrafusion.errors import check_choice, one_line
from intrafusion.models.hub import load_model
from intrafusion.models.serialization import save_network
from intrafusion.models.sources.user import source_of
from intrafusion.reporting.artifact import Made
from intrafusion.runtime.atomic_write import is_full, move_into_place, plain_errors
from intrafusion.runtime.cancellation import beside, checkpoint

TOLERANCE = 1e-4  # largest allowed difference of a logit, as a share of the largest logit
_RANDOM = 16  # number of noise images
_OPSET = 20
_exporting = threading.Lock()  # exporters change global state of the process
Answers = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Format:
    """An export format.

    files: file names, the first of which is the one to open. write: writes into a folder, and returns whether the network
    accepts batches of any size. read: returns a function from images to logits.
    """

    files: tuple[str, ...]
    summary: str
    write: Callable[[Made, Path], bool]
    read: Callable[[Made, Path], Answers]


@dataclass(frozen=True)
class Written:
    """The outcome of writing one format.

    bytes: total size of its files. difference: the largest difference of the logits, as a share of the largest logit; None
    if they could not be compared. any_batch: whether the network accepts batches of any size, else of one image. reason: why
    the format was not written, or None.
    """

    format: str
    files: tuple[str, ...]
    bytes: int
    difference: float | None
    any_batch: bool
    reason: str | None = None

    def to_row(self) -> dict[str, Any]:
        """Return a JSON-serialisable row."""
        return {
            "format": self.format,
            "files": list(self.files),
            "bytes": self.bytes,
            "difference": self.difference,
            "batch": "any" if self.any_batch else 1,
            "reason": self.reason,
        }


def write(made: Made, folder: Path, name: str) -> Written:
    """Write one format into an existing folder, read it back, and compare its logits with the network's.

    A format that fails leaves no files; the result gives the reason. Raises IntrafusionError for an unknown format and for a
    full disk.
    """
    check_choice("format", name, FORMATS)
    kind = FORMATS[name]
    checkpoint()
    with plain_errors(folder), tempfile.TemporaryDirectory(dir=folder, prefix=".part") as part:
        try:
            with _undivided():
                any_batch = kind.write(made, Path(part))
                answers = kind.read(made, Path(part))
            difference = _difference(made, answers, any_batch)
        except Exception as error:  # exporters may raise anything for an arbitrary network
            if is_full(error, folder):
                raise
            return Written(name, (), 0, None, False, f"{type(error).__name__}: {one_line(error)}")
        if not difference <= TOLERANCE:
            reason = f"its logits differ by {difference:.1e} of the largest logit, more than {TOLERANCE:.0e}"
            return Written(name, (), 0, difference, any_batch, reason)
        size = sum((Path(part) / file).stat().st_size for file in kind.files)
        for file in kind.files[1:]:
            (folder / file).unlink(missing_ok=True)  # an old description may be of another network
        for file in kind.files:
            (Path(part) / file).chmod(0o644)
            move_into_place(Path(part) / file, folder / file)
    return Written(name, kind.files, size, difference, any_batch)


@contextmanager
def _undivided() -> Iterator[None]:
    """Run an exporter alone but beside other work, as exporters may take a minute and have no checkpoints."""
    with beside():
        while not _exporting.acquire(timeout=0.1):
            checkpoint()
        try:
            yield
        finally:
            _exporting.release()


def _difference(made: Made, answers: Answers, any_batch: bool) -> float:
    """Return the largest difference of any logit on noise and real images, as a share of the largest logit.

    It is inf if shapes differ or a logit is not finite.
    """
    noise = torch.randn(_RANDOM, *made.example.shape[1:], generator=torch.Generator().manual_seed(0))
    worst = 0.0
    for images in (noise, *([] if made.real is None else [made.real])):
        checkpoint()
        with torch.inference_mode():
            expected = made.network(images)
        batches = [images, images[:1]] if any_batch else images.split(1)
        found = [answers(batch).detach() for batch in batches]
        for told, true in zip(found, [expected, expected[:1]] if any_batch else expected.split(1), strict=True):
            if told.shape != true.shape or not torch.isfinite(told).all():
                return float("inf")
            worst = max(worst, float((told - true).abs().max() / expected.abs().max()))
    return worst


def _write_safetensors(made: Made, folder: Path) -> bool:
    base, _ = source_of(made.card.name).blank(made.card.name, made.network.state_dict())
    card = save_network(made.network, base, made.card, folder / "model")
    (folder / "model.json").write_text(json.dumps(card.to_dict(), indent=2) + "\n")
    return True


def _read_safetensors(made: Made, folder: Path) -> Answers:
    return load_model(made.card.name, weights=folder / "model.safetensors")


@contextmanager
def _quiet() -> Iterator[None]:
    """Suppress the warnings that exporters raise about their own code."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _trace(made: Made) -> tuple[torch.export.ExportedProgram, bool]:
    """Trace the network for batches of any size or, if that fails, for one image; returns whether any size works."""
    images = torch.zeros(2, *made.example.shape[1:])
    network = copy.deepcopy(made.network)  # the exporter puts fake tensors into it while others may run the network
    try:
        any_size = ({0: torch.export.Dim("batch", min=1)},)
        return torch.export.export(network, (images,), dynamic_shapes=any_size), True
    except Exception:  # the code may fix a shape or branch on one; the second try reports any other error
        return torch.export.export(network, (images[:1],)), False


def _write_program(made: Made, folder: Path) -> bool:
    with _quiet():
        program, any_batch = _trace(made)
        torch.export.save(program, folder / "model.pt2")
    return any_batch


def _read_program(made: Made, folder: Path) -> Answers:
    with _quiet():
        return torch.export.load(folder / "model.pt2").module()


def _write_onnx(made: Made, folder: Path) -> bool:
    with _quiet():
        program, any_batch = _trace(made)
        torch.onnx.export(
            program,
            f=folder / "model.onnx",
            input_names=["images"],
            output_names=["logits"],
            opset_version=_OPSET,
            external_data=False,
            verbose=False,
            dynamo=True,
        )
    return any_batch


def _read_onnx(made: Made, folder: Path) -> Answers:
    import onnx
    import onnxruntime

    path = str(folder / "model.onnx")
    onnx.checker.check_model(path)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return lambda images: torch.from_numpy(session.run(["logits"], {"images": images.numpy()})[0])


FORMATS = {
    "safetensors": Format(
        ("model.safetensors", "model.json"), "weights, with a card of the layers, for `load_model`",
        _write_safetensors, _read_safetensors,
    ),
    "torch.export": Format(
        ("model.pt2",), "the graph with its weights, for torch.export.load and AOTInductor", _write_program, _read_program
    ),
    "onnx": Format(("model.onnx",), f"opset {_OPSET}, input images, output logits", _write_onnx, _read_onnx),
}  # fmt: skip
