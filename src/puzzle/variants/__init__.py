"""Variants, one block's choice, an architecture, and the space of them."""

import importlib
import pkgutil

from puzzle.variants import kinds
from puzzle.variants.base import SUBBLOCKS, ParentSubblock, Start, State, Subblock, Variant, add_sum, split_state
from puzzle.variants.least_squares import damping
from puzzle.variants.prune import expected_losses, prune_space
from puzzle.variants.registry import REGISTRY, parse_variant, register, variant_from_entry
from puzzle.variants.space import Architecture, BlockVariant, LayerSpace, Space, derive_space

for _module in pkgutil.iter_modules(kinds.__path__):
    importlib.import_module(f"{kinds.__name__}.{_module.name}")
# For baseline.py.
from puzzle.variants.kinds.gated import GatedFFN, hardware_multiple  # noqa: E402
from puzzle.variants.kinds.grouped_query import GroupedQuery  # noqa: E402

__all__ = [
    "REGISTRY",
    "SUBBLOCKS",
    "Architecture",
    "BlockVariant",
    "GatedFFN",
    "GroupedQuery",
    "LayerSpace",
    "ParentSubblock",
    "Space",
    "Start",
    "State",
    "Subblock",
    "Variant",
    "add_sum",
    "damping",
    "derive_space",
    "expected_losses",
    "hardware_multiple",
    "parse_variant",
    "prune_space",
    "register",
    "split_state",
    "variant_from_entry",
]
