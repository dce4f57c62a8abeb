"""Labelled images: datasets, folders of pictures, arrays, and users' uploads."""

from intrafusion.data.datasets import ImageData, load_calibration, load_data

__all__ = ["ImageData", "load_calibration", "load_data"]
