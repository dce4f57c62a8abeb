"""The operators that a program may use: pure functions, each with a rule for the arguments it accepts and its output shapes.

Each family has a file. An operator is one decorated rule in the file of its family (see `table`).
"""

# (imported to register the operators of each family)
from intrafusion.models.exported_program.operators import convolution as _convolution  # noqa: F401
from intrafusion.models.exported_program.operators import elementwise as _elementwise  # noqa: F401
from intrafusion.models.exported_program.operators import indexing as _indexing  # noqa: F401
from intrafusion.models.exported_program.operators import normalization as _normalization  # noqa: F401
from intrafusion.models.exported_program.operators import products as _products  # noqa: F401
from intrafusion.models.exported_program.operators import rearrangement as _rearrangement  # noqa: F401
from intrafusion.models.exported_program.operators import reductions as _reductions  # noqa: F401
from intrafusion.models.exported_program.operators import views as _views  # noqa: F401
from intrafusion.models.exported_program.operators.table import DIRECT_CALLS, OPERATORS

__all__ = ["DIRECT_CALLS", "OPERATORS"]
