"""Structured pruning: groups of coupled channels, their importance, transport plans, merges, and the smaller network."""
