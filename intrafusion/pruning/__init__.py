"""Structured pruning: groups of coupled channels, their importance, transport plans, merges, and the smaller network."""

from intrafusion.pruning.groups.bn_folding import fold
from intrafusion.pruning.groups.find import find_groups
from intrafusion.pruning.groups.group import Group
from intrafusion.pruning.importance import score
from intrafusion.pruning.pruner import prune, prune_groups
from intrafusion.pruning.transport.planning import TransportPlan, plan

__all__ = ["Group", "TransportPlan", "find_groups", "fold", "plan", "prune", "prune_groups", "score"]
