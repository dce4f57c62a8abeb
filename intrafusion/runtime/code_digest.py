"""Version of the code that produced a result: a digest of the modules and libraries that the result depends on.

A release number is not precise enough: results from a checkout outlive many changes between two releases.
"""

import dis
import hashlib
from collections.abc import Iterator
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec, resolve_name
from types import CodeType
from typing import Any

from intrafusion.errors import IntrafusionError
from intrafusion.runtime.canonical import described

_PACKAGE = __name__.partition(".")[0]
_NO_PART = {  # modules that affect no result: they only log and end processes
    f"{_PACKAGE}.runtime.{name}" for name in ("shutdown", "_shutdown_watcher", "log")
}
LIBRARIES = ("captum", "numpy", "pot", "scikit-learn", "scipy", "torch", "torch-pruning", "torchvision")


def code_version() -> str:
    """Return the SHA-256 (hex) of the code that measured points depend on; results of another version are never reused."""
    return version_of(f"{_PACKAGE}.studies.measurement")


def recovery_version() -> str:
    """Return the digest of the code that a recovery depends on, starting from the dense network.

    It does not cover the code that measures or loads networks.
    """
    return version_of(f"{_PACKAGE}.training.recovery.cache")


def lab_version() -> str:
    """Return the digest of the code that the runs of the training lab depend on."""
    return version_of(f"{_PACKAGE}.training.methods.runs")


@cache
def version_of(*roots: str) -> str:
    """Return the SHA-256 (hex) of all modules that `roots` import, and of the major and minor versions of LIBRARIES.

    Imports count whether direct or indirect. File locations and line endings do not count. Patch releases and builds of the
    libraries ("+cu130") are assumed to compute the same; a minor release may change algorithms or defaults.
    """
    digest = hashlib.sha256()
    for name, source in sorted(modules(*roots).items()):
        digest.update(f"{name} {len(source)} {source}".encode())
    for library in LIBRARIES:
        digest.update(f"{library} {_minor(library)}".encode())
    return digest.hexdigest()


def modules(*roots: str) -> dict[str, str]:
    """Return the source, by name, of each of the package's modules that `roots` import, directly or not.

    Imports inside functions count too. The `__init__` of the package and those of its direct subpackages are left out, because
    they only re-export. So are the modules that log and that end a process. If an installation holds only compiled files, a
    description of the code replaces the source. Raises IntrafusionError if a root has no readable code.
    """
    found: dict[str, str] = {}
    waiting = list(roots)
    while waiting:
        name = waiting.pop()
        if name in found or name in _NO_PART or not name.startswith(f"{_PACKAGE}."):
            continue
        if (loader := _loader(name)) is None:
            if name in roots:
                raise IntrafusionError(f"cannot read the code of {name}, which identifies results; reinstall it")
            continue
        if name.count(".") == 1 and loader.is_package(name):
            continue
        source = loader.get_source(name)
        if source is None:
            code = loader.get_code(name)
            found[name] = described(code)
        else:
            found[name] = source.replace("\r\n", "\n").replace("\r", "\n")
            code = compile(source, name, "exec", dont_inherit=True)
        named = imports(code, name if loader.is_package(name) else name.rpartition(".")[0])
        waiting += [part for one in (name, *named) for part in _with_parents(one)]
    return found


def _loader(name: str) -> Any:
    """Return the InspectLoader of a module, or None if there is no such module. Only parent packages are imported."""
    parent = name.rpartition(".")[0]
    if parent and parent != _PACKAGE and ((above := _loader(parent)) is None or not above.is_package(parent)):
        return None
    spec = find_spec(name)
    return spec.loader if spec and hasattr(spec.loader, "get_source") else None  # zipimport's is not registered as one


def _with_parents(name: str) -> Iterator[str]:
    """Yield a dotted name and the names of its parent packages, which Python imports first."""
    while name:
        yield name
        name = name.rpartition(".")[0]


def imports(code: CodeType, package: str) -> Iterator[str]:
    """Yield the names that a module's code may import, also inside functions: modules, and members that may be modules.

    Imports for type checkers only are left out. The names are read from compiled code, because CPython 3.11's `ast.parse` fails
    in one of two threads that use it at once (gh-106905), and Streamlit parses pages in threads.
    """
    for one in _codes(code):
        if dis.opmap["IMPORT_NAME"] not in one.co_code[::2]:  # most functions import nothing, and dis takes long
            continue
        until = 0  # end offset of a TYPE_CHECKING branch
        steps = [step for step in dis.get_instructions(one) if step.opname not in ("EXTENDED_ARG", "TO_BOOL")]
        for level, members, step in zip([None, None, *steps], [None, *steps], steps, strict=False):
            if members and members.argval == "TYPE_CHECKING" and "IF_FALSE" in step.opname:
                until = step.argval
            if level and members and step.opname == "IMPORT_NAME" and step.offset >= until:
                module = resolve_name("." * level.argval + step.argval, package) if level.argval else step.argval
                yield from (module, *(f"{module}.{name}" for name in members.argval or ()))


def _codes(code: CodeType) -> Iterator[CodeType]:
    """Yield a code object, and those of the functions and classes inside it."""
    yield code
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _codes(constant)


def _minor(library: str) -> str:
    """Return a library's version as "2.13"; an empty string if it is not installed."""
    try:
        return ".".join(version(library).split("+")[0].split(".")[:2])
    except PackageNotFoundError:
        return ""
