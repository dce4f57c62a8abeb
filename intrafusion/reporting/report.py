"""The report on an exported network, in Markdown and as one self-contained HTML file."""

import html
import platform
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING

from intrafusion._registry import MERGES
from intrafusion.evaluation.latency import LatencyComparison, Speed
from intrafusion.reporting.artifact import Made
from intrafusion.reporting.export_formats import TOLERANCE, Written
from intrafusion.reporting.snippets import prune_line, prune_snippet
from intrafusion.runtime.escaping import block, markdown, sentence

if TYPE_CHECKING:
    import plotly.graph_objects as go

_VERSIONS = ("torch", "torchvision", "timm", "onnx", "onnxruntime", "onnxscript", "safetensors", "numpy")
_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; color: #1f2933; background: #fff }
body { max-width: 60rem; margin: 2rem auto; padding: 0 1rem }
table { border-collapse: collapse; margin: 1rem 0 }
th, td { padding: .3rem .8rem; border-bottom: 1px solid #e3e7eb; text-align: left }
pre { background: #f4f6f8; padding: .8rem; white-space: pre-wrap }
h1 { font-size: 1.6rem }
h2 { font-size: 1.2rem; margin-top: 2rem }
"""


@dataclass(frozen=True)
class _Section:
    title: str
    words: str = ""
    rows: Sequence[Sequence[str]] = ()  # the first is the header
    code: str = ""
    figure: "go.Figure | None" = None


@dataclass(frozen=True, eq=False)
class Report:
    """A report on an exported network: how it was made, its accuracy, its files and, if measured, its speed."""

    made: Made
    files: Sequence[Written] = ()
    speed: LatencyComparison | None = None
    formats: Sequence[str] = ()
    when: datetime = field(default_factory=lambda: datetime.now(UTC))

    @property
    def title(self) -> str:
        spec = self.made.spec
        how = "a sparsity per group" if spec.sparsities else f"{spec.sparsity:.0%} sparsity"
        return f"{spec.model} pruned by {spec.criterion} and {spec.merge} with {how}"

    def markdown(self) -> str:
        """Return the report as Markdown: text, tables and code."""
        parts = [f"# {markdown(self.title)}"]
        for section in self._sections():
            parts.append(f"## {section.title}")
            parts += [sentence(section.words)] if section.words else []
            parts += [_table(section.rows)] if section.rows else []
            parts += [block(section.code)] if section.code else []
        return "\n\n".join(parts) + "\n"

    def html(self) -> str:
        """Return the report as one HTML page with its figures; it loads nothing from the network."""
        parts, first = [f"<h1>{html.escape(self.title)}</h1>"], True
        for section in self._sections():
            parts.append(f"<h2>{html.escape(section.title)}</h2>")
            parts += [f"<p>{html.escape(section.words)}</p>"] if section.words else []
            if section.figure is not None:
                options = {"displaylogo": False, "displayModeBar": False, "responsive": True}
                parts.append(section.figure.to_html(full_html=False, include_plotlyjs=first, config=options))
                first = False
            parts += [_html_table(section.rows)] if section.rows else []
            parts += [f"<pre>{html.escape(section.code)}</pre>"] if section.code else []
        head = f'<meta charset="utf-8"><title>{html.escape(self.title)}</title><style>{_STYLE}</style>'
        return f'<!doctype html>\n<html lang="en"><head>{head}</head><body>{"".join(parts)}</body></html>\n'

    def _sections(self) -> Iterable[_Section]:
        from intrafusion.reporting.figures import latency as figures  # imports Plotly

        made = self.made
        yield _Section("Before and after", self._about(), before_and_after(made))
        rows = [("group", "before", "after"), *((w.group, str(w.before), str(w.after)) for w in made.widths)]
        yield _Section("Channel groups", "", rows, figure=figures.widths(made.widths, made.spec.merge))
        if self.speed is not None:
            yield _Section("Speed", speed_words(self.speed), speed_rows(self.speed), figure=figures.latencies(self.speed))
        if self.files:
            yield _Section("Files", self._verified(), file_rows(self.files))
        speed = self.speed is not None
        yield _Section("Reproduce from the command line", code=prune_line(made.spec, "FOLDER", self.formats, speed))
        yield _Section("Reproduce in Python", code=prune_snippet(made.spec, "FOLDER", self.formats, speed))
        yield _Section("Load the files", code=self._opening())
        yield _Section("Versions", f"Created on {self.when:%Y-%m-%d} (UTC).", [("package", "version"), *_versions()])

    def _about(self) -> str:
        spec, result = self.made.spec, self.made.result
        parts = [f"BatchNorm is folded into the weights of both networks. Recovery: {spec.recovery}."]
        if spec.weights == "random":
            parts.append("Its weights are random and differ each time.")
        if spec.round_to > 1:
            parts.append(f"The number of kept channels of each group is a multiple of {spec.round_to}.")
        if spec.fold_norms != "none" and "fold_norms" in MERGES[spec.merge].knobs:
            parts.append(f"Folding used BatchNorm as {spec.fold_norms}.")
        if result is None:
            parts.append("Accuracy was not measured, because no images were loaded.")
        else:
            parts.append(f"Accuracy is top-1 on {result.count:,} {spec.dataset} test images, with 95 % intervals.")
            parts += [f"{self.made.note}."] if self.made.note else []
        return " ".join(parts)

    def _verified(self) -> str:
        real = "" if self.made.real is None else f" and {len(self.made.real)} real"
        return (
            f"Every file was read back, and its logits were compared with the network's on 16 random{real} images. Only files "
            f"whose logits differ by at most {TOLERANCE:g} of the largest logit are included."
        )

    def _opening(self) -> str:
        card = self.made.card
        return "\n".join(
            [
                "import intrafusion as itf",
                "",
                f'model = itf.load_model({card.name!r}, weights="model.safetensors")  # with model.json beside it',
                "",
                "import torch",
                "",
                'model = torch.export.load("model.pt2").module()',
                "",
                "import onnxruntime",
                "",
                'session = onnxruntime.InferenceSession("model.onnx")',
                f"# images: float32 (batch, {', '.join(map(str, card.input_size))}), (pixels / 255 - mean) / std",
                f"# mean {card.mean}, std {card.std}",
            ]
        )


def before_and_after(made: Made) -> list[tuple[str, ...]]:
    """Return accuracy, parameters, MACs and channels of the dense and the pruned network, as text with a header row."""
    rows: list[tuple[str, ...]] = [("", "dense", "pruned", "remaining")]
    if (result := made.result) is not None:
        dense, pruned = (
            f"{accuracy:.1%} ± {50 * (high - low):.1f}"
            for accuracy, (low, high) in (
                (result.dense_accuracy, result.dense_interval),
                (result.accuracy, result.interval),
            )
        )
        rows.append(("accuracy", dense, pruned, ""))
    channels = sum(w.before for w in made.widths), sum(w.after for w in made.widths)
    left_out = "".join(f", not counting {operator}" for operator in made.before.left_out)
    numbers = {
        "parameters": (made.before.params, made.after.params),
        f"MACs{left_out}": (made.before.macs, made.after.macs),
        "prunable channels": channels,
    }
    return rows + [(name, f"{before:,}", f"{after:,}", f"{after / before:.0%}") for name, (before, after) in numbers.items()]


def speed_words(found: LatencyComparison) -> str:
    """Return the result of a latency comparison and how it was measured, as text."""
    turns = min((one.turns for one in found.ratios), default=0)
    return (
        f"{found.sentence()}. Both networks ran in {found.kind} on {found.device} and were timed in at least {turns} turns; "
        "the ratio is the median of the turns' ratios, with its 95 % interval."
    )


def speed_rows(found: LatencyComparison) -> list[tuple[str, ...]]:
    """Return latency, file size and memory of both networks, as text with a header row."""
    rows: list[tuple[str, ...]] = [("", "dense", "pruned", "speed-up")]
    for one, first, second in zip(found.ratios, found.before.latencies, found.after.latencies, strict=True):
        low, high = one.interval
        rows.append(
            (
                f"forward pass at batch {one.batch:,}, median (quartiles)",
                _time(first.median, first.quartiles),
                _time(second.median, second.quartiles),
                f"{one.times:.2f} ({low:.2f} to {high:.2f})",
            )
        )

    def pair(name: str, value: str) -> None:
        before, after = (getattr(speed, value) for speed in (found.before, found.after))
        rows.append((name, _bytes(before), _bytes(after), ""))

    pair("file size as safetensors", "bytes")
    pair(f"memory of a pass at batch {_large(found.before):,}, without weights and images", "memory")
    return rows


def _large(speed: Speed) -> int:
    return speed.latencies[-1].batch if speed.latencies else 1


def file_rows(files: Sequence[Written]) -> list[tuple[str, ...]]:
    """Return a row for each written format, as text with a header row."""
    rows: list[tuple[str, ...]] = [("format", "files", "size", "largest difference", "batch")]
    for one in files:
        if one.reason is None:
            batch = "any" if one.any_batch else "1"
            rows.append((one.format, ", ".join(one.files), _bytes(one.bytes), f"{one.difference:.1e}", batch))
        else:
            rows.append((one.format, f"not written: {one.reason}", "", "", ""))
    return rows


def _time(middle: float, quartiles: tuple[float, float]) -> str:
    scale, unit = (1, "s") if middle >= 1 else (1e3, "ms") if middle >= 1e-3 else (1e6, "µs")
    low, high = (_short(quartile * scale) for quartile in quartiles)
    return f"{_short(middle * scale)} {unit} ({low} to {high})"


def _short(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _bytes(count: int) -> str:
    return f"{count / 1e6:,.2f} MB" if count >= 1e5 else f"{count / 1e3:,.1f} kB"


def _versions() -> list[tuple[str, str]]:
    from intrafusion import __version__  # imported here, because the package imports this module

    found = [("intrafusion", __version__), ("python", platform.python_version())]
    for name in _VERSIONS:
        try:
            found.append((name, version(name)))
        except PackageNotFoundError:
            continue
    return found


def _table(rows: Sequence[Sequence[str]]) -> str:
    lines = [f"| {' | '.join(map(markdown, row))} |" for row in rows]
    return "\n".join([lines[0], "|" + "---|" * len(rows[0]), *lines[1:]])


def _html_table(rows: Sequence[Sequence[str]]) -> str:
    def line(row: Sequence[str], kind: str) -> str:
        return f"<tr>{''.join(f'<{kind}>{html.escape(cell)}</{kind}>' for cell in row)}</tr>"

    return f"<table>{line(rows[0], 'th')}{''.join(line(row, 'td') for row in rows[1:])}</table>"
