"""Labelled images: datasets, folders of pictures, arrays, and what a person uploads."""
