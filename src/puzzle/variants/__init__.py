"""Variants, one block's choice, an architecture, and the space of them."""

# isort: off
import importlib
import pkgutil

from puzzle.variants import kinds
from puzzle.variants.base import REGISTRY as REGISTRY, SUBBLOCKS as SUBBLOCKS, ParentSubblock as ParentSubblock
from puzzle.variants.base import State as State, Subblock as Subblock, Variant as Variant, add_sum as add_sum
from puzzle.variants.base import parse_variant as parse_variant, register as register, split_state as split_state
from puzzle.variants.base import type_bytes as type_bytes, variant_from_entry as variant_from_entry
from puzzle.variants.least_squares import damping as damping
from puzzle.variants.space import Architecture as Architecture, BlockVariant as BlockVariant
from puzzle.variants.space import LayerSpace as LayerSpace, Space as Space
from puzzle.variants.space import derive_space as derive_space, narrow_space as narrow_space

for _module in pkgutil.iter_modules(kinds.__path__):
    importlib.import_module(f"{kinds.__name__}.{_module.name}")
