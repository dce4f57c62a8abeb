"""The trainers of the training lab, and its runs."""
