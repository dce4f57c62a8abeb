"""What a version of the code is of: all that a result depends on, nothing that only shows it, wherever it is installed."""

import ast
import py_compile
import shutil
import sys
import textwrap
import zipfile
from collections.abc import Callable
from importlib.machinery import PathFinder
from pathlib import Path

import pytest

import intrafusion as itf
from intrafusion.runtime import code_digest
from intrafusion.runtime.code_digest import LIBRARIES, code_version, lab_version, modules, recovery_version

PACKAGE = Path(itf.__file__).parent
IMPORTED_AS = {"pot": "ot", "scikit-learn": "sklearn", "torch-pruning": "torch_pruning"}
NO_MATTER = {"PIL", "safetensors", "timm"}  # what they read is told by itself: pixels, weights, the code of a forward


@pytest.fixture(scope="module")
def found() -> dict[str, str]:
    return modules("intrafusion.studies.measurement")


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, found: dict[str, str]) -> Callable[..., str]:
    """The version of a copy of the package: `change` does what it likes to the copy, and says where Python is to look."""

    def version(change: Callable[[Path], Path] = lambda copy: copy) -> str:
        copy = tmp_path / "copy"
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(PACKAGE, copy / "intrafusion", ignore=shutil.ignore_patterns("__pycache__"))
        where = change(copy)

        def find(name: str):
            return PathFinder.find_spec(name, [str(where.joinpath(*name.split(".")[:-1]))])

        monkeypatch.setattr(code_digest, "find_spec", find)
        return code_digest.version_of.__wrapped__("intrafusion.studies.measurement")

    return version


def edited(*names: str, new: bytes = b"\n") -> Callable[[Path], Path]:
    """A copy in which some files end in something new."""

    def change(copy: Path) -> Path:
        for name in names:
            with open(copy / "intrafusion" / name, "rb+") as file:
                file.seek(0, 2)
                file.write(new)
        return copy

    return change


def with_carriage_returns(copy: Path) -> Path:
    for file in copy.rglob("*.py"):
        file.write_bytes(file.read_bytes().replace(b"\n", b"\r\n"))
    return copy


def zipped(copy: Path) -> Path:
    with zipfile.ZipFile(copy.parent / "whole.zip", "w") as archive:
        for file in sorted(copy.rglob("*.py"), reverse=True):
            archive.write(file, file.relative_to(copy))
    return copy.parent / "whole.zip"


def compiled(copy: Path) -> Path:
    """Compiled files alone; of what does not matter, some."""
    for file in copy.rglob("*.py"):
        if file.stem == "main" or file.parent.name not in ("figures", "reporting", "uploads"):
            py_compile.compile(str(file), str(file.with_suffix(".pyc")))
        file.unlink()
    return copy


def test_all_that_is_registered_counts(found):
    for kind in ("criterion", "merge", "solver", "recovery"):
        own = {entry.function.__module__ for entry in itf.registry(kind).values()}
        own |= {entry.fit.__module__ for entry in itf.registry(kind).values() if entry.fit}
        assert own <= set(found)
    trainers = {entry.function.__module__ for entry in itf.registry("trainer").values()}
    assert trainers <= set(modules("intrafusion.training.methods.runs"))


@pytest.mark.parametrize(
    "name",
    ["data.datasets", "data.decode_cache", "data._decode_worker", "data.image_folder", "models.state_dict",
     "models.sources.builtin", "models.sources.torchvision", "models.exported_program.importer", "pruning.groups.find",
     "pruning.groups.dependency", "pruning.groups.norms", "pruning.transport.cost", "pruning.transport.planning",
     "pruning.transport.solvers", "pruning.pruner", "pruning.groups.surgery", "studies.session", "studies.measurement",
     "evaluation.incremental", "evaluation.bf16_screening", "evaluation.output_mixing", "models.fx.partition",
     "evaluation.accuracy", "models.precision", "models.architectures", "training.loop", "training.augment",
     "pruning.merge.least_squares", "pruning.merge.lockstep", "training.recovery.distillation"],
)  # fmt: skip
def test_the_road_from_data_to_a_number_counts(found, name):
    assert f"intrafusion.{name}" in found


def test_what_shows_results_does_not_count(found):
    names = {name.removeprefix("intrafusion.") for name in found}
    assert not {f"runtime.{name}" for name in ("log", "shutdown", "jobs", "progress", "scheduling")} & names
    shown = ("toy_network", "sweeps", "study_file", "store", "cluster", "uploads", "weight_space", "sensitivity")
    others = (*(f"studies.{part}" for part in shown), "reporting", "cli", "pruning.transport.provenance", "evaluation.latency")
    assert not [name for name in names if name.startswith(others)]
    assert not names & {"runtime", "data", "models", "pruning", "evaluation", "training", "studies"}  # they only offer
    assert all(name.startswith("intrafusion.") for name in found)


def test_recoveries_depend_on_less():
    found = set(modules("intrafusion.training.recovery.cache"))
    needed = ("training.recovery.methods", "training.loop", "pruning.pruner", "pruning.importance.magnitude")
    assert {f"intrafusion.{name}" for name in needed} <= found
    others = ("studies", "evaluation.incremental", "evaluation.bf16_screening", "models.hub", "models.state_dict")
    assert not [name for name in found if name.removeprefix("intrafusion.").startswith(others)]
    assert len({code_version(), recovery_version(), lab_version()}) == 3


def test_libraries_that_compute_count(found, monkeypatch):
    named = {
        imported.partition(".")[0]
        for name, text in found.items()
        for imported in code_digest.imports(compile(text, name, "exec"), "intrafusion")
    }
    others = named - {*sys.stdlib_module_names, "intrafusion"}
    assert others - NO_MATTER == {IMPORTED_AS.get(name, name.replace("-", "_")) for name in LIBRARIES}


def test_imports_are_found_wherever_they_stand_but_not_those_of_type_checkers():
    many = "\n".join(f"name_{number}" for number in range(300))  # numbers above 255 take two instructions
    text = f"""
import a, b.c as d
from typing import TYPE_CHECKING
if TYPE_CHECKING:
    import no_1
    from .no_2 import thing
else:
    import e
import typing
if typing.TYPE_CHECKING:
    import no_3
if a:
    from . import f
def function():
{textwrap.indent(many, "    ")}
    from ..above.g import h, i
    class Inner:
        from j import k
"""
    found = list(code_digest.imports(compile(text, "text", "exec"), "one.two"))
    assert found == [
        "a", "b.c", "typing", "typing.TYPE_CHECKING", "e", "typing", "one.two", "one.two.f",
        "one.above.g", "one.above.g.h", "one.above.g.i", "j", "j.k",
    ]  # fmt: skip


def test_the_version_needs_no_parser_that_threads_cannot_share(monkeypatch):
    def fails(*_: object, **__: object) -> None:
        raise SystemError("AST constructor recursion depth mismatch (before=60, after=44)")

    monkeypatch.setattr(ast, "parse", fails)
    assert code_digest.version_of.__wrapped__("intrafusion.pruning.merge") == code_digest.version_of(
        "intrafusion.pruning.merge"
    )


@pytest.mark.parametrize(
    ("library", "release", "same"),
    [("torch", "2.13.9+cu130", True), ("torch", "2.14.0", False), ("torch", "3.13.0", False), ("pot", "0.8.1", False)],
)
def test_minor_releases_count_and_builds_do_not(monkeypatch, library, release, same):
    before, known = code_version(), code_digest.version
    monkeypatch.setattr(code_digest, "version", lambda name: release if name == library else known(name))
    if library == "torch" and not known("torch").startswith("2.13."):
        pytest.skip("for torch 2.13")
    assert (code_digest.version_of.__wrapped__("intrafusion.studies.measurement") == before) == same


def test_another_place_or_another_end_of_lines_is_the_same_code(installed):
    assert {installed(), installed(with_carriage_returns), installed(zipped)} == {code_version()}


def test_a_byte_makes_other_code(installed):
    counted = ("pruning/importance/magnitude.py", "data/_decode_worker.py")
    assert len({code_version(), *(installed(edited(name)) for name in counted)}) == 3
    others = ("reporting/figures/theme.py", "cli/main.py", "runtime/log.py", "pruning/__init__.py", "__init__.py")
    assert installed(edited(*others)) == code_version()


def test_what_is_imported_for_types_alone_does_not_count(installed):
    types = b"from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from intrafusion.reporting.figures import theme\n"
    lazily = b"def draw():\n    from ...reporting.figures import theme\n"
    for lines, same in ((types, True), (lazily, False)):
        plain = installed(edited("pruning/transport/solvers.py", new=lines))
        both = edited("reporting/figures/theme.py"), edited("pruning/transport/solvers.py", new=lines)
        also = installed(lambda copy, both=both: both[0](both[1](copy)))
        assert (plain == also) == same


def test_code_that_cannot_be_read_is_one_line(installed):
    with pytest.raises(itf.IntrafusionError, match=r"cannot read the code of intrafusion.studies.measurement"):
        installed(lambda copy: copy / "nowhere")


def test_compiled_files_alone_will_do(installed, tmp_path):
    first = installed(compiled)
    elsewhere = installed(lambda copy: compiled(edited("cli/main.py", new=b"import os")(copy)).rename(tmp_path / "elsewhere"))
    assert elsewhere == first
    assert installed(lambda copy: compiled(edited("pruning/transport/solvers.py", new=b"_ITERATIONS = {}")(copy))) != first
