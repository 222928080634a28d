"""Variants, one block's choice, an architecture, and the space of them."""

import importlib
import pkgutil

from puzzle.variants import kinds
from puzzle.variants.base import REGISTRY as REGISTRY
from puzzle.variants.base import SUBBLOCKS as SUBBLOCKS
from puzzle.variants.base import ParentSubblock as ParentSubblock
from puzzle.variants.base import State as State
from puzzle.variants.base import Subblock as Subblock
from puzzle.variants.base import Variant as Variant
from puzzle.variants.base import add_sum as add_sum
from puzzle.variants.base import parse_variant as parse_variant
from puzzle.variants.base import register as register
from puzzle.variants.base import split_state as split_state
from puzzle.variants.base import type_bytes as type_bytes
from puzzle.variants.base import variant_from_entry as variant_from_entry
from puzzle.variants.least_squares import damping as damping
from puzzle.variants.space import Architecture as Architecture
from puzzle.variants.space import BlockVariant as BlockVariant
from puzzle.variants.space import LayerSpace as LayerSpace
from puzzle.variants.space import Space as Space
from puzzle.variants.space import derive_space as derive_space
from puzzle.variants.space import narrow_space as narrow_space

for _module in pkgutil.iter_modules(kinds.__path__):
    importlib.import_module(f"{kinds.__name__}.{_module.name}")
