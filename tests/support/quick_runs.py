"""Training runs of seconds for tests."""

from dataclasses import replace

from intrafusion.training.methods.spec import TrainSpec
from intrafusion.training.methods.task import PhaseProgress

QUICK = TrainSpec(model="digits-mlp", method="sgd", training=200, epochs=2)


def plain(steps: list[PhaseProgress]) -> list[PhaseProgress]:
    """Steps without the seconds that they took, which no two runs share; none is not a number."""
    return [replace(step, moment=replace(step.moment, seconds=0.0)) for step in steps]
