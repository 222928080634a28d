"""One block's choice, a whole architecture, the space of them, and what of it is not worth training."""

import json
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from puzzle.errors import PuzzleError
from puzzle.modeling import Block, PuzzleConfig
from puzzle.variants.base import SUBBLOCKS, ParentSubblock, Subblock, Variant
from puzzle.variants.registry import parse_variant, variant_from_entry


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

    def num_params(self, config: PuzzleConfig) -> int:
        return self.attention.num_params(config) + self.ffn.num_params(config)

    def entry(self) -> Block:
        """Its entry in `PuzzleConfig.blocks`."""
        return {"attention": self.attention.entry(), "ffn": self.ffn.entry()}

    @classmethod
    def empty(cls) -> "BlockVariant":
        """The block without subblocks: the identity."""
        return cls.parse("none+none")

    @classmethod
    def alone(cls, variant: Variant) -> "BlockVariant":
        """The block of this one variant, its other subblock left out."""
        empty = cls.empty()
        return cls(variant, empty.ffn) if variant.subblock == "attention" else cls(empty.attention, variant)

    @classmethod
    def parse(cls, name: str) -> "BlockVariant":
        """`kv2+w512` back to the block."""
        attention, separator, ffn = name.partition("+")
        if not separator:
            raise PuzzleError(f"block {name!r} is not of the form attention+ffn, such as kv2+w512 or none+linear")
        return cls(parse_variant("attention", attention), parse_variant("ffn", ffn))

    def __str__(self) -> str:
        return self.name


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

    def configure(self, parent: PuzzleConfig) -> PuzzleConfig:
        """The parent's configuration with these blocks; a `PuzzleError` if one of them cannot be built with it."""
        for layer, block in enumerate(self.blocks):
            for variant in block.subblocks:
                if (problem := variant.problem(parent)) is not None:
                    raise PuzzleError(f"architecture: layer {layer} has {problem}")
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

    def subblock(self, subblock: Subblock) -> tuple[Variant, ...]:
        return self.attention if subblock == "attention" else self.ffn

    def blocks(self) -> list[BlockVariant]:
        """Every composed block, the parent's first."""
        return [BlockVariant(attention, ffn) for attention in self.attention for ffn in self.ffn]


@dataclass(frozen=True)
class Space:
    """Which variants each layer may take."""

    layers: tuple[LayerSpace, ...]

    @property
    def num_architectures(self) -> int:
        return math.prod(len(layer.attention) * len(layer.ffn) for layer in self.layers)


def derive_space(
    config: PuzzleConfig,
    *,
    attention: Sequence[str] = ("linear", "none"),
    ffn: Sequence[str] = ("linear", "none"),
    **sizes: Sequence[int] | None,
) -> Space:
    """The space of a model: its kinds in smaller sizes, derived unless given, then variants by name.

    A layer gets its parent variant first, then those that fit it. A size or a sized variant that fits no layer, and an
    unknown name, is a `PuzzleError`.

    Args:
        attention: further variants, such as `linear`, `none`, `kv2win1024s4`. ffn: such as `linear`, `none`, `rank64`.
        sizes: by a kind's `Variant.setting`: `kv_heads` and `ffn_widths`.
    """
    parent = Architecture.of(config)
    named: dict[Subblock, list[Variant]] = {}
    for subblock, names in zip(SUBBLOCKS, (attention, ffn), strict=True):
        try:
            named[subblock] = [parse_variant(subblock, name) for name in names]
        except PuzzleError as error:
            raise PuzzleError(f"space.{subblock}: {error}") from None

    def alternatives(of: Variant) -> tuple[Variant, ...]:
        """A parent variant, then what fits it, each once."""
        candidates = of.alternatives(config, sizes.get(of.setting or "")) + named[of.subblock]
        return tuple(dict.fromkeys((of, *(variant for variant in candidates if variant.fits(of, config)))))

    layers = tuple(LayerSpace(alternatives(block.attention), alternatives(block.ffn)) for block in parent.blocks)
    found = {variant for layer in layers for variant in (*layer.attention, *layer.ffn)}
    parents = dict.fromkeys(variant for block in parent.blocks for variant in block.subblocks)

    def check(setting: str, given: object, variants: Iterable[Variant]) -> None:
        if found.isdisjoint(variants):
            names = ", ".join(variant.name for variant in parents if setting in (variant.setting, variant.subblock))
            raise PuzzleError(
                f"space.{setting}: {given} is no smaller form of what the parent has ({names}); use smaller sizes "
                "(of KV heads, divisors)"
            )

    for setting, given in sizes.items():
        for size in given or ():
            sized = (variant.alternatives(config, [size]) for variant in parents if variant.setting == setting)
            check(setting, size, (variant for variants in sized for variant in variants))
    for variant in (*named["attention"], *named["ffn"]):
        if variant.size is not None:
            check(variant.subblock, variant.name, [variant])
    return Space(layers)


ExpectedLosses = dict[tuple[int, Subblock, str], float | None]
"""By layer, subblock and name of the variant."""


def expected_losses(read: Callable[[int, Subblock], ParentSubblock], space: Space) -> ExpectedLosses:
    """The expected loss of every variant's start on the calibration text; None where its moments do not suffice.

    Args:
        read: reads a subblock of a layer of the parent; one is held at a time.
    """
    losses: ExpectedLosses = {}
    for index, layer in enumerate(space.layers):
        for subblock in SUBBLOCKS:
            parent = read(index, subblock)
            for variant in layer.subblock(subblock):
                losses[index, subblock, variant.name] = variant.expected_loss(parent, variant.initialise(parent))
    return losses


def prune_space(space: Space, losses: ExpectedLosses, config: PuzzleConfig, ratio: float) -> Space:
    """`space` without the variants that start with more than `ratio` times the loss of a smaller one of their subblock.

    Smaller means: no more parameters, and no larger KV cache of the longest sequence; so `none`, which has neither,
    stays. So do the parent variant and what has no expected loss.
    """

    def kept(layer: int, subblock: Subblock) -> tuple[Variant, ...]:
        own, *others = variants = space.layers[layer].subblock(subblock)
        known = [
            (variant, variant.num_params(config), variant.kv_values(config, config.max_position_embeddings), loss)
            for variant in variants
            if (loss := losses[layer, subblock, variant.name]) is not None
        ]
        hopeless = {
            variant
            for variant, params, cache, loss in known
            if any(fewer <= params and less <= cache and ratio * other < loss for _, fewer, less, other in known)
        }
        return (own, *(variant for variant in others if variant not in hopeless))

    layers = range(len(space.layers))
    return Space(tuple(LayerSpace(*(kept(layer, subblock) for subblock in SUBBLOCKS)) for layer in layers))
