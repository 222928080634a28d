"""Variants, one block's choice, an architecture, and the space of them."""

import importlib
import pkgutil

from puzzle.variants import kinds
from puzzle.variants.base import (
    SUBBLOCKS as SUBBLOCKS,
    ParentSubblock as ParentSubblock,
    Start as Start,
    State as State,
    Subblock as Subblock,
    Variant as Variant,
    add_sum as add_sum,
    split_state as split_state,
)
from puzzle.variants.least_squares import damping as damping
from puzzle.variants.registry import (
    REGISTRY as REGISTRY,
    parse_variant as parse_variant,
    register as register,
    variant_from_entry as variant_from_entry,
)
from puzzle.variants.space import (
    Architecture as Architecture,
    BlockVariant as BlockVariant,
    LayerSpace as LayerSpace,
    Space as Space,
    derive_space as derive_space,
    expected_losses as expected_losses,
    prune_space as prune_space,
)

for _module in pkgutil.iter_modules(kinds.__path__):
    importlib.import_module(f"{kinds.__name__}.{_module.name}")
