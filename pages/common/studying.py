"""Studies in the background: started by a page, stored point by point, watched by whoever asks for the same."""

from collections.abc import Callable, Iterator, Sequence

import streamlit as st

from intrafusion import IntrafusionError, PruneSpec
from intrafusion.bench import Bench
from intrafusion.eta import in_words
from intrafusion.jobs import Job
from intrafusion.run import Result
from intrafusion.store import Store, default_path
from intrafusion.sweep import Failure, origin, sweep
from pages.common import queue, shell


def store() -> Store | None:
    """The results of this server; None, with the reason on the page, where its file cannot be used."""
    try:
        return _store(str(default_path()))
    except IntrafusionError as error:
        st.warning(f"{error}. Results are kept in this session only.", icon=":material/database_off:")
        return None


@st.cache_resource(max_entries=4, show_spinner=False)
def _store(path: str) -> Store:
    return Store(path)


def points(kept: Store | None, specs: Sequence[PruneSpec], bench: Bench, job: Job | None) -> dict[PruneSpec, Result]:
    """What is known of these points so far, in their order."""
    known = kept.get((spec, origin(spec, bench)) for spec in specs) if kept else {}
    for result in job.results if job else ():
        if isinstance(result, Result) and result.spec in set(specs):
            known[result.spec] = result
    return {spec: known[spec] for spec in specs if spec in known}


def start(
    key: tuple, specs: Sequence[PruneSpec], bench: Bench, kept: Store | None, title: str,
    run: Callable[..., Iterator[Result | Failure]] = sweep, decide: bool = False,
) -> Job:  # fmt: skip
    """Measure the specs in the background; rerun the page after it."""
    return shell.start(
        key,
        len(specs),
        lambda: run(specs, bench, kept, decide=decide),
        title,
        part=lambda result: (result.spec, share(result)),
    )


def share(result: Result | Failure) -> float:
    """How much of its work a point has behind it."""
    return result.count / result.total if isinstance(result, Result) else 1.0


def progress(found: dict[PruneSpec, Result], specs: Sequence[PruneSpec], job: Job | None, images: int) -> None:
    """How far a study is, in one bar, and what went wrong."""
    finished = job is not None and job.state == "done"
    done = sum(finished or result.complete for result in found.values())
    if len(found) == len(specs) and done == len(specs):
        state = "done"
    elif job is None:
        state = "not computed yet" if not found else "not complete yet"
    else:
        state = {"cancelled": "cancelled; the points so far stay", "running": _computing(job)}.get(job.state)
        state = state or (queue.words(job) if job.active else job.state)
    early = sum(not result.complete for result in found.values())
    looked = f"; {early} on a sample so far" if early and not finished else f"; {early} decided early" if early else ""
    st.progress(done / len(specs), f"{done} of {len(specs)} points on {images:,} images: {state}{looked}")
    if job is not None:
        failures(job)


def failures(job: Job) -> None:
    """What went wrong: the whole study, or some of its points."""
    if job.state == "failed":
        st.error(job.error, icon=":material/error:")
    failed = {result.spec: result.reason for result in job.results if isinstance(result, Failure)}
    if failed:
        spec, reason = next(iter(failed.items()))
        where = spec.groups if isinstance(spec.groups, str) else ", ".join(spec.groups)
        more = f" (and {len(failed) - 1} more)" if len(failed) > 1 else ""
        st.warning(f"{spec.merge} of {where} at {spec.sparsity:.0%} failed: {reason}{more}", icon=":material/warning:")


def _computing(job: Job) -> str:
    left = shell.jobs().seconds_left(job)
    return "computing" if left is None else f"computing, about {in_words(left)} left"
