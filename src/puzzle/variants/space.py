"""One block's choice, a whole architecture, the space of them, and the parts of it that are worth training."""

import json
import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from puzzle.errors import PuzzleError
from puzzle.modeling import Block, PuzzleConfig
from puzzle.variants.base import SUBBLOCKS, Subblock, Variant, parse_variant, variant_from_entry


@dataclass(frozen=True)
class BlockVariant:
    """One attention variant with one FFN variant."""

    attention: Variant
    ffn: Variant

    @property
    def name(self) -> str:
        return f"{self.attention.name}+{self.ffn.name}"

    @property
    def subblocks(self) -> tuple[Variant, Variant]:
        return self.attention, self.ffn

    def subblock(self, subblock: Subblock) -> Variant:
        return self.attention if subblock == "attention" else self.ffn

    @property
    def untyped(self) -> "BlockVariant":
        return BlockVariant(self.attention.untyped, self.ffn.untyped)

    def num_params(self, config: PuzzleConfig) -> int:
        return self.attention.num_params(config) + self.ffn.num_params(config)

    def entry(self) -> Block:
        """Its entry in `PuzzleConfig.blocks`."""
        return {"attention": self.attention.entry(), "ffn": self.ffn.entry()}

    @classmethod
    def parse(cls, name: str) -> "BlockVariant":
        """`kv2+w512` back to the block."""
        attention, separator, ffn = name.partition("+")
        if not separator:
            raise PuzzleError(f"block {name!r} is not of the form attention+ffn, such as kv2+w512 or none+linear")
        return cls(parse_variant("attention", attention), parse_variant("ffn", ffn))


@dataclass(frozen=True)
class Architecture:
    """One block per layer: the decision, as a small file that a person can read and diff."""

    blocks: tuple[BlockVariant, ...]

    @classmethod
    def of(cls, config: PuzzleConfig) -> "Architecture":
        """The architecture a model has."""
        blocks = ([variant_from_entry(which, block[which]) for which in SUBBLOCKS] for block in config.blocks or [])
        return cls(tuple(BlockVariant(attention, ffn) for attention, ffn in blocks))

    @classmethod
    def parse(cls, names: Iterable[str]) -> "Architecture":
        """From the names of its blocks, such as `kv2+w512`."""
        return cls(tuple(map(BlockVariant.parse, names)))

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(block.name for block in self.blocks)

    def idle_params(self, config: PuzzleConfig) -> int:
        """How many of its layers' parameters a token does not use."""
        return sum(variant.idle_params(config) for block in self.blocks for variant in block.subblocks)

    def configure(self, parent: PuzzleConfig) -> PuzzleConfig:
        """The parent's configuration with these blocks."""
        config = PuzzleConfig(**parent.to_dict() | {"blocks": [block.entry() for block in self.blocks]})
        config._attn_implementation = parent._attn_implementation
        return config

    def to_json(self) -> str:
        """One line a layer."""
        rows = ({"layer": i, "attention": str(b.attention), "ffn": str(b.ffn)} for i, b in enumerate(self.blocks))
        return '{\n  "blocks": [\n    ' + ",\n    ".join(map(json.dumps, rows)) + "\n  ]\n}\n"


@dataclass(frozen=True)
class LayerSpace:
    """The variants that one layer may take; the parent variant comes first in both."""

    attention: tuple[Variant, ...]
    ffn: tuple[Variant, ...]

    @property
    def parent(self) -> BlockVariant:
        return BlockVariant(self.attention[0], self.ffn[0])

    @property
    def variants(self) -> tuple[Variant, ...]:
        return *self.attention, *self.ffn

    def subblock(self, subblock: Subblock) -> tuple[Variant, ...]:
        return self.attention if subblock == "attention" else self.ffn

    def blocks(self) -> list[BlockVariant]:
        """Every composed block, the parent's first."""
        return [BlockVariant(attention, ffn) for attention in self.attention for ffn in self.ffn]

    def scored(self) -> list[BlockVariant]:
        """The blocks whose scores are measured: those without types, and the parent's with a twin of one subblock."""
        counted = [(block, sum(bool(each.type) for each in block.subblocks)) for block in self.blocks()]
        return [block for block, typed in counted if not typed or (typed == 1 and block.untyped == self.parent)]


@dataclass(frozen=True)
class Space:
    """Which variants each layer may take."""

    layers: tuple[LayerSpace, ...]

    @property
    def names(self) -> list[list[str]]:
        """Of every layer's variants, for addresses."""
        return [[variant.name for variant in layer.variants] for layer in self.layers]

    @property
    def variants(self) -> list[Variant]:
        """The distinct ones of all layers."""
        return list(dict.fromkeys(variant for layer in self.layers for variant in layer.variants))

    @property
    def untyped(self) -> "Space":
        """Without twins, which follow from their variants."""
        return self.restricted(lambda _, variant: not variant.type)

    @property
    def num_architectures(self) -> int:
        return math.prod(len(layer.attention) * len(layer.ffn) for layer in self.layers)

    def restricted(self, keeps: Callable[[int, Variant], bool]) -> "Space":
        """The parent's own variants, and those of which `keeps(layer, variant)` is true."""
        layers = []
        for i, layer in enumerate(self.layers):
            kept = ([v for v in some if v == some[0] or keeps(i, v)] for some in (layer.attention, layer.ffn))
            layers.append(LayerSpace(*map(tuple, kept)))
        return Space(tuple(layers))


def derive_space(
    config: PuzzleConfig,
    *,
    attention: Sequence[str] = ("linear", "none"),
    ffn: Sequence[str] = ("linear", "none"),
    types: Sequence[str] = (),
    **sizes: Sequence[int] | None,
) -> Space:
    """The space of a model: its kinds in smaller sizes, derived unless given, then variants by name.

    A layer gets its parent variant first, then those that fit it. A size or a sized variant that fits no layer, and an
    unknown name, is a `PuzzleError`.

    Args:
        attention: further variants, such as `linear`, `none`, `kv2win1024s4`. ffn: such as `linear`, `none`, `rank64`.
        types: of matrices; every variant has a twin of each that its rows allow.
        sizes: by a kind's `Variant.setting`: `kv_heads` and `ffn_widths`.
    """
    named: dict[str, list[Variant]] = {}
    for subblock, names in zip(SUBBLOCKS, (attention, ffn), strict=True):
        try:
            named[subblock] = [parse_variant(subblock, name) for name in names]
        except PuzzleError as error:
            raise PuzzleError(f"space.{subblock}: {error}") from None

    def alternatives(own: Variant) -> tuple[Variant, ...]:
        candidates = own.alternatives(config, sizes.get(own.setting or "")) + named[own.subblock]
        every = dict.fromkeys((own, *(variant for variant in candidates if variant.fits(own, config))))
        return *every, *filter(None, (variant.typed(config, type) for variant in every for type in types))

    blocks = Architecture.of(config).blocks
    space = Space(tuple(LayerSpace(alternatives(block.attention), alternatives(block.ffn)) for block in blocks))
    found = (variant for layer in space.layers for variant in layer.variants)
    fitting = {pair for each in found for pair in ((each.setting, each.size), (each.subblock, each.name))}
    asked: list[tuple[str, object]] = [(setting, size) for setting, given in sizes.items() for size in given or ()]
    asked += [(which, each.name) for which, some in named.items() for each in some if each.size is not None]
    for setting, size in (each for each in asked if each not in fitting):
        parents = dict.fromkeys(variant for block in blocks for variant in block.subblocks)
        names = ", ".join(own.name for own in parents if setting in (own.setting, own.subblock))
        wrong = f"{size} is no smaller form of what the parent has ({names})"
        raise PuzzleError(f"space.{setting}: {wrong}; use smaller sizes (of KV heads, divisors)")
    return space


def narrow_space(space: Space, solutions: Sequence[Sequence[str]], keep: int, always: Sequence[str]) -> Space:
    """Per layer and subblock, the `keep` variants most used by the architectures, and the parent's own (paper F.1.1).

    Args:
        solutions: architectures of a frontier, each one block name a layer, such as `kv2+w512`.
        always: an architecture whose variants stay in any case, so that what it reaches can still be reached.
    """

    def used(layer: int, variant: Variant) -> bool:
        uses = Counter(each for names in solutions for each in BlockVariant.parse(names[layer]).subblocks)
        ranked = sorted(space.layers[layer].subblock(variant.subblock), key=lambda each: -uses[each])
        return variant in (*ranked[:keep], *BlockVariant.parse(always[layer]).subblocks)

    return space.restricted(used)
