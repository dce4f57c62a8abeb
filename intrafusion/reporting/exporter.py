"""Export the network of a spec to a folder, which is either complete or not created at all."""

import copy
import io
import json
import shutil
import tempfile
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from intrafusion.errors import IntrafusionError, check_choice
from intrafusion.evaluation.latency import LatencyComparison, compare_latency
from intrafusion.reporting.artifact import Made, making
from intrafusion.reporting.export_formats import FORMATS, Written, write
from intrafusion.reporting.report import Report
from intrafusion.runtime.atomic_write import move_into_place, part_of, plain_errors
from intrafusion.runtime.progress import Progress
from intrafusion.spec import PruneSpec
from intrafusion.studies.session import Session


@dataclass(frozen=True)
class Exported:
    """An exported folder. files: one for each format, including failed ones. speed: None if it was not measured."""

    folder: Path
    made: Made
    files: tuple[Written, ...]
    speed: LatencyComparison | None

    def to_row(self) -> dict[str, Any]:
        """Return a JSON-serialisable row, flat except for `files` and `speed`."""
        made = self.made
        if made.result is not None:
            row = made.result.to_row()
        else:
            spec = made.spec.to_dict()
            row = {"model": spec.pop("model"), "data": spec.pop("dataset"), **spec, "accuracy": None}
            row |= {"params": made.after.params, "macs": made.after.macs, "macs_before": made.before.macs}
        return row | {
            "params_before": made.before.params,
            "macs_left_out": list(made.before.left_out),
            "out": str(self.folder),
            "files": [one.to_row() for one in self.files],
            "speed": self.speed.summary() if self.speed else None,
        }


def export(
    spec: PruneSpec,
    session: Session,
    folder: Path | str,
    formats: Sequence[str] = (),
    speed: bool = False,
    batch: int | None = None,
) -> Iterator[Progress[Exported]]:
    """Prune, measure, write and verify a network; yields progress, and at last what is in the folder.

    formats: of FORMATS, empty for all. speed: whether to time the two networks, at batch 1 and `batch`. The folder must be new
    or empty. It appears only once it is complete, with the formats that were verified, spec.json, report.md and report.html.
    Raises IntrafusionError before any work for an unusable folder or an unknown format, and at the end if no format could be
    written.
    """
    folder, names = Path(folder).expanduser(), tuple(formats) or tuple(FORMATS)
    for name in names:
        check_choice("format", name, FORMATS)
    part = _begin(folder)
    try:
        made = None
        for told in making(spec, session):
            yield Progress(told.doing, 0.5 * told.share)
            made = told.result
        assert made is not None
        compared = None
        if speed:
            for compared in comparing(made, session, batch):
                yield Progress("timing both networks", 0.5 + 0.25 * compared.share)
        files: tuple[Written, ...] = ()
        for wrote in writing(made, part, names):
            files = wrote.result or ()
            yield Progress(wrote.doing, 0.75 + 0.25 * wrote.share)
        if all(one.reason for one in files):
            raise IntrafusionError(f"nothing was written: {files[0].format} failed: {files[0].reason}")
        accompany(Report(made, files, compared, formats), part)
        with plain_errors(folder.parent):
            move_into_place(part, folder)
        yield Progress("done", 1.0, Exported(folder, made, files, compared))
    finally:
        shutil.rmtree(part, ignore_errors=True)


def writing(made: Made, folder: Path, names: Sequence[str]) -> Iterator[Progress[tuple[Written, ...]]]:
    """Write formats into an existing folder, one after the other, and yield the files so far; see `write`."""
    files: tuple[Written, ...] = ()
    for place, name in enumerate(names):
        yield Progress(f"writing {name}", place / len(names), files)
        files = (*files, write(made, folder, name))
    yield Progress("done", 1.0, files)


def _begin(folder: Path) -> Path:
    """Create a temporary folder beside `folder`, to be renamed to it.

    Raises IntrafusionError if `folder` cannot be created or is not empty.
    """
    try:
        str(folder).encode()  # PyTorch's exporter kills the process for a name that cannot be encoded
        folder.parent.mkdir(parents=True, exist_ok=True)
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise IntrafusionError(f"{folder} already exists and is not an empty folder; choose another folder")
        part = part_of(folder)
        part.mkdir()
    except UnicodeEncodeError as error:
        raise IntrafusionError(f"cannot create {folder}: its name is not UTF-8; choose another folder") from error
    except OSError as error:
        raise IntrafusionError(f"cannot create {folder}: {error.strerror}; choose another folder") from error
    return part


def comparing(made: Made, session: Session, batch: int | None = None) -> Iterator[LatencyComparison]:
    """Run `compare_latency` for the dense and the pruned network, both with BatchNorm folded, on the session's device."""
    yield from compare_latency(made.dense, _there(made, session), session.example, batch)


def _there(made: Made, session: Session) -> nn.Module:
    """Return the pruned network on the session's device."""
    return made.network if session.device.type == "cpu" else copy.deepcopy(made.network).to(session.device)


def accompany(report: Report, folder: Path) -> None:
    """Write spec.json, report.md and report.html into a folder."""
    texts = {
        "spec.json": json.dumps(report.made.spec.to_dict(), indent=2) + "\n",
        "report.md": report.markdown(),
        "report.html": report.html(),
    }
    with plain_errors(folder):
        for name, text in texts.items():
            (folder / name).write_text(text)


def archive(report: Report, folder: Path) -> bytes:
    """Return a ZIP of the report's files, which are in `folder`, with spec.json, report.md and report.html."""
    names = [file for one in report.files for file in one.files]
    made = io.BytesIO()
    with zipfile.ZipFile(made, "w", zipfile.ZIP_DEFLATED) as packed, tempfile.TemporaryDirectory() as beside:
        accompany(report, Path(beside))
        for path in (*(folder / name for name in names), *sorted(Path(beside).iterdir())):
            packed.write(path, path.name)
    return made.getvalue()
