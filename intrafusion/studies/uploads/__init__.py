"""Uploads: weights, programs and images. Files are checked before anything is kept; code in a file is never run."""

from intrafusion.data.upload import take_data as take_data
from intrafusion.runtime.staging import remove as remove
from intrafusion.runtime.staging import safe_name as safe_name
from intrafusion.studies.uploads.networks import take_program as take_program
from intrafusion.studies.uploads.networks import take_weights as take_weights

__all__ = ["remove", "safe_name", "take_data", "take_program", "take_weights"]
