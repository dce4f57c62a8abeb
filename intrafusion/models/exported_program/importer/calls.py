"""Translation of a call into steps and layers: directly if it is one operator, or by a function of its family."""

from typing import Any

from intrafusion.models.exported_program.importer.aten import as_taken, check_idle
from intrafusion.models.exported_program.importer.draft import Call, Draft
from intrafusion.models.exported_program.importer.layer_calls import CALLS as LAYER_CALLS
from intrafusion.models.exported_program.importer.operator_calls import CALLS as OPERATOR_CALLS
from intrafusion.models.exported_program.importer.shape_calls import CALLS as SHAPE_CALLS
from intrafusion.models.exported_program.operators import DIRECT_CALLS, OPERATORS

CALLS: dict[str, Call] = {**LAYER_CALLS, **SHAPE_CALLS, **OPERATOR_CALLS}


def translated(draft: Draft, name: str, overload: str, told: dict[str, Any]) -> Any:
    """Translate a call. Return a Value, a size, or a list of Values."""
    target = f"{name}.{overload}"
    if target in DIRECT_CALLS:
        ours, used = DIRECT_CALLS[target]
        check_idle(name, overload, told, used)
        takes = OPERATORS[ours].takes.values()
        return draft.step(ours, *(as_taken(told[one], hint) for one, hint in zip(used, takes, strict=True)))
    return CALLS[target](draft, told)
