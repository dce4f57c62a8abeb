"""Random programs that an attacker might write: each must be refused in one line, or run exactly as verified beforehand.

python tests/program_fuzz.py COUNT [SEED]: COUNT programs in our own format and half as many changed .pt2 files, all in this
process. Prints how many were refused and how many ran. The caller must limit memory and time.
"""

import json
import random
import sys
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import own_files as files
import torch
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st
from torch import Tensor

from intrafusion.errors import IntrafusionError
from intrafusion.models.exported_program import built, describe_program, read_program, tensors_of
from intrafusion.models.exported_program.importer.calls import CALLS
from intrafusion.models.exported_program.operators import DIRECT_CALLS, OPERATORS
from intrafusion.models.exported_program.operators.table import Operator
from intrafusion.models.exported_program.program import Program, Value, Weight
from intrafusion.models.exported_program.shapes import Batch, Shape, at
from intrafusion.models.exported_program.verification import made_by

HOSTILE = (0, -1, -2, 7, 2**16, 2**31 - 1, 2**31, 2**40, 2**40 + 1, 2**63 - 1, -(2**63), 10**30)
WORDS = ("none", "tanh", "same", "valid", "reflect", "replicate", "trunc", "%2000000000d", "")
_TRIES = 12  # attempts to find arguments for one step


class _Writer:
    """A generator of one program in our own format, with random steps: most fit, some have hostile arguments."""

    def __init__(self, rng: random.Random):
        self.rng = rng
        self.image = [rng.randint(1, 4), rng.choice((1, 4, 5, 8)), rng.choice((4, 5, 8))]
        self.shapes: dict[str, Shape] = {"x": Shape((Batch(1), *self.image))}
        self.tensors = self._weights()
        self.layers: dict[str, Any] = {}
        self.steps: list[list[Any]] = []

    def _weights(self) -> dict[str, Tensor]:
        def tensor() -> Tensor:
            sizes = [self.rng.choice((1, 2, 3, 4, self.image[0])) for _ in range(self.rng.randint(0, 4))]
            kind = self.rng.random()
            if kind < 0.1:
                return torch.randint(-1 if kind < 0.03 else 0, 4, sizes)
            return torch.rand(sizes) < 0.5 if kind < 0.2 else torch.randn(sizes).to(torch.float64 if kind > 0.97 else None)

        found = {f"w{number}": tensor() for number in range(8)}
        return found | {"w8": found["w0"], "w9": torch.full((2, 3), float("nan")), "w10": torch.empty(0, 3)}

    def described(self) -> dict[str, Any]:
        for number in range(self.rng.randint(1, 8)):
            self._layer(number) if self.rng.random() < 0.2 else self._step(number)
        last = self.rng.choice(list(self.shapes))
        if self.rng.random() < 0.9:
            self._put("flatten", [{"value": last}, 1], "logits")
        return {
            "format": 1, "image": self.image, "given": "x", "answer": "logits", "layers": self.layers,
            "learned": {name: self.rng.random() < 0.5 for name in self.tensors}, "steps": self.steps,
        }  # fmt: skip

    def _step(self, number: int) -> None:
        for _ in range(_TRIES):
            operator = self.rng.choice(list(OPERATORS.values()))
            args = [self._argument(hint) for hint in operator.takes.values()]
            if self._put(operator.name, args, f"v{number}") or self.rng.random() < 0.01:
                return

    def _layer(self, number: int) -> None:
        name = self.rng.choice(list(self.shapes))
        sizes = self.shapes[name].sizes
        channels, outputs = at(sizes[1], 1) if len(sizes) > 1 else 1, self.rng.randint(1, 4)
        if channels > 4096:  # would need more weights than any file can hold
            return
        channels += self.rng.random() < 0.05
        weights: dict[str, Tensor] = {}
        if self.rng.random() < 0.5:
            kind = "BatchNorm2d" if len(sizes) == 4 else "BatchNorm1d"
            about: dict[str, Any] = {"num_features": channels, "eps": self._near(1e-5), "momentum": 0.1, "whole": True}
            weights = {one: torch.rand(channels) for one in ("weight", "bias", "running_mean", "running_var")}
        else:
            kind = "Conv2d"
            kernel = [self.rng.randint(1, 3), self.rng.randint(1, 3)]
            about = {
                "in_channels": channels, "out_channels": outputs, "kernel_size": kernel,
                "stride": [self._near(1), 1], "padding": [self._near(1), 0], "dilation": [1, self._near(1)],
                "groups": self._near(1), "whole": True,
            }  # fmt: skip
            weights = {"weight": torch.randn(outputs, channels, *kernel), "bias": torch.rand(outputs)}
        if self.rng.random() < 0.1:  # make a tensor too short
            one = self.rng.choice(list(weights))
            weights[one] = weights[one][:1]
        path = f"layer{number}"
        self.layers[path] = {"kind": kind, **about}
        self.tensors |= {f"{path}.{one}": tensor for one, tensor in weights.items()}
        self.steps.append([{"layer": path}, [{"value": name}], [f"v{number}"]])

    def _near(self, number: Any) -> Any:
        return self.rng.choice(HOSTILE) if self.rng.random() < 0.05 else number

    def _put(self, name: str, args: list[Any], gives: str) -> bool:
        """Write a step if it fits, and return whether it does. A step that does not fit is still written in 1 % of cases."""
        try:
            shapes = OPERATORS[name].made([self._shaped(one) for one in args]).shapes
        except IntrafusionError:
            fits, names = False, [gives]
        else:
            fits, names = True, [gives, *(f"{gives}_{place}" for place in range(1, len(shapes)))]
            self.shapes |= dict(zip(names, shapes, strict=True))
        if fits or self.rng.random() < 0.01:
            self.steps.append([name, args, names])
        return fits

    def _shaped(self, raw: Any) -> Any:
        if isinstance(raw, list):
            return tuple(map(self._shaped, raw))
        if isinstance(raw, dict):
            ((kind, about),) = raw.items()
            if kind == "batch":
                return Batch(about)
            return self.shapes[about] if kind == "value" else _shape(self.tensors[about])
        return raw

    def _argument(self, hint: Any) -> Any:
        if self.rng.random() < 0.02:
            return self.rng.choice((*HOSTILE, *WORDS, None, float("nan"), float("inf"), True, 0.5, [], {"weight": "w9"}))
        if hint is Shape:
            values = self.rng.random() < 0.8
            return {"value": self.rng.choice(list(self.shapes))} if values else {"weight": self.rng.choice(list(self.tensors))}
        if hint is int:
            return self._near(self.rng.randint(-3, 4))
        if hint is float:
            return self.rng.choice((0.0, 1.0, -1.0, 0.5, 2, 1e-5, 3.3e38, -1e30))
        if hint is bool:
            return self.rng.random() < 0.5
        if hint is Batch:
            return {"batch": self._near(self.rng.choice((1, 1, 2, 4)))}
        if get_origin(hint) is Literal:
            return self.rng.choice(get_args(hint))
        if get_origin(hint) is tuple:
            inner = get_args(hint)
            length = self.rng.choice((1, 1, 2, 2, 3, 4, 0)) if inner[-1] is ... else len(inner)
            return [self._argument(inner[0]) for _ in range(length)]
        return None if hint is type(None) else self._argument(self.rng.choice(get_args(hint)))


def _shape(tensor: Tensor) -> Shape:
    shape = Shape(tuple(tensor.shape), tensor.dtype)
    whole = tensor.dtype == torch.int64
    return Shape(shape.sizes, shape.dtype, int(tensor.min()), int(tensor.max())) if whole else shape


def one_line(error: IntrafusionError) -> str:
    """Assert that the error message is one line, and return "refused"."""
    assert str(error).isprintable(), repr(str(error))
    assert len(str(error)) < 600, str(error)
    return "refused"


def check_description(rng: random.Random) -> str:
    """Build a random program and, if it is not refused, run it."""
    writer = _Writer(rng)
    try:
        program = built(json.loads(json.dumps(writer.described())), writer.tensors)
    except IntrafusionError as error:
        return one_line(error)
    again = built(json.loads(json.dumps(describe_program(program))), tensors_of(program))
    assert describe_program(again) == describe_program(program)
    check_run(program)
    return "ran"


def check_run(program: Program) -> None:
    """Check that every step gives the inferred shapes and dtypes for several batch sizes, and does not modify its inputs."""
    shapes = {program.plan.given: Shape((Batch(1), *program.plan.image))}
    layers = dict(program.named_modules())

    def shaped(given: Any) -> Any:
        if isinstance(given, tuple):
            return tuple(map(shaped, given))
        if isinstance(given, Weight):
            return _shape(program._tensor(given.path))
        return shapes[given.name] if isinstance(given, Value) else given

    for step in program.plan.steps:
        made = made_by(step.run, [shaped(one) for one in step.args], layers)
        shapes |= {name: shape for name, shape in zip(step.gives, made.shapes, strict=True) if name}
    for images in (1, 2, 3, 7):
        x = torch.rand(images, *program.plan.image)
        values: dict[str, Tensor] = {program.plan.given: x}
        with torch.no_grad():
            for step in program.plan.steps:
                versions = {name: value._version for name, value in (*values.items(), *program.state_dict().items())}
                run: Callable[..., Any] = layers[step.run] if isinstance(step.run, str) else step.run.run
                made = run(*(program._found(one, values, x) for one in step.args))
                several = isinstance(step.run, Operator) and step.run.several
                for place, name in enumerate(step.gives):
                    one = made[place] if several else made
                    if name is not None:
                        expected = tuple(at(size, images) for size in shapes[name].sizes)
                        assert tuple(one.shape) == expected, f"{step}: {tuple(one.shape)} for {images} images, not {expected}"
                        assert one.dtype == shapes[name].dtype, f"{step}: {one.dtype}"
                        values[name] = one
                after = {name: value._version for name, value in (*values.items(), *program.state_dict().items())}
                assert all(after[name] == version for name, version in versions.items()), f"{step} writes"
            torch.testing.assert_close(program(x), values[program.plan.answer], equal_nan=True)


_TARGETS = (
    *(f"torch.ops.aten.{name}" for name in (*DIRECT_CALLS, *CALLS)), "_operator.mul", "_operator.floordiv", "_operator.mod",
    "torch.ops.aten.native_batch_norm.default", "torch.ops.aten.div.Tensor_mode", "torch.ops.aten.add_.Tensor",
)  # fmt: skip


def _changed(about: Any, rng: random.Random) -> None:
    """Change one to three random nodes of a graph in place."""
    nodes = about["graph_module"]["graph"]["nodes"]
    for _ in range(rng.randint(1, 3)):
        node = rng.choice(nodes)
        kind = rng.random()
        if kind < 0.3:
            node["target"] = rng.choice(_TARGETS)
        elif kind < 0.4:
            nodes.append(node)
        elif kind < 0.9 and node.get("inputs"):
            argument = rng.choice(node["inputs"])
            other = rng.choice([one for n in nodes for one in n.get("inputs", ())] or [argument])
            argument["arg"] = rng.choice((
                {"as_int": rng.choice(HOSTILE)}, {"as_ints": [rng.choice(HOSTILE) for _ in range(rng.randint(0, 5))]},
                {"as_float": rng.choice(("NaN", 0.5, 1e300))}, {"as_string": rng.choice(WORDS)}, {"as_none": True},
                {"as_bool": True}, other["arg"], [], None,
            ))  # fmt: skip
        else:
            node.pop(rng.choice(list(node)))


def check_file(source: Path, rng: random.Random) -> str:
    """Read a randomly changed .pt2 file and, if it is not refused, run it."""
    path = files.with_graph(source, source.with_name("changed.pt2"), lambda about: _changed(about, rng))
    try:
        program, _, _ = read_program(path)
    except IntrafusionError as error:
        return one_line(error)
    check_run(program)
    return "ran"


def main(count: int, start: int = 0) -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    told: Counter[str] = Counter()
    quiet = settings(
        max_examples=count, deadline=None, database=None, suppress_health_check=list(HealthCheck), derandomize=False
    )

    with tempfile.TemporaryDirectory() as folder:
        sources = [files.export(files.network(), Path(folder) / f"{core}.pt2", core=core) for core in (False, True)]

        @seed(start)
        @quiet
        @given(st.integers(0, 2**63))
        def descriptions(number: int) -> None:
            told[check_description(random.Random(number))] += 1

        @seed(start)
        @settings(quiet, max_examples=max(1, count // 2))
        @given(st.integers(0, 2**63), st.sampled_from(sources))
        def archives(number: int, source: Path) -> None:
            told[f"file {check_file(source, random.Random(number))}"] += 1

        descriptions()
        archives()
    print(json.dumps(told))


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
