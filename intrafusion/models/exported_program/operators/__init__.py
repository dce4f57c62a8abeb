"""The operators that a program may use."""

from intrafusion.models.exported_program.operators.views import OPERATORS as OPERATORS
from intrafusion.models.exported_program.operators.views import Made as Made
from intrafusion.models.exported_program.operators.views import Operator as Operator
from intrafusion.models.exported_program.operators.views import axis as axis
from intrafusion.models.exported_program.operators.views import normed as normed

__all__ = ["OPERATORS", "Made", "Operator", "axis", "normed"]
