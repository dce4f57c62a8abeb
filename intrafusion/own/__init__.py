"""What a person brings: weights, a program, images. Checked before anything is kept; nothing in a file is ever run."""

from intrafusion.own.images import take_data as take_data
from intrafusion.own.networks import take_program as take_program
from intrafusion.own.networks import take_weights as take_weights
from intrafusion.own.place import remove as remove
from intrafusion.own.place import safe_name as safe_name

__all__ = ["remove", "safe_name", "take_data", "take_program", "take_weights"]
