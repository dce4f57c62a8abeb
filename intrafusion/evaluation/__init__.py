"""Measuring networks: accuracy, size, latency, attributions, and the loss around them."""
