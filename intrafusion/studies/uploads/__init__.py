"""What a person brings: weights, a program, images. Checked before anything is kept; nothing in a file is ever run."""

from intrafusion.data.upload import take_data as take_data
from intrafusion.runtime.staging import remove as remove
from intrafusion.runtime.staging import safe_name as safe_name
from intrafusion.studies.uploads.networks import take_program as take_program
from intrafusion.studies.uploads.networks import take_weights as take_weights

__all__ = ["remove", "safe_name", "take_data", "take_program", "take_weights"]
