"""One block's choice, a whole architecture, and the space of them."""

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from puzzle.errors import PuzzleError
from puzzle.modeling import Block, PuzzleConfig
from puzzle.variants.base import SUBBLOCKS, Subblock, Variant
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
    """One block per layer: the decision, as a small file that a person can read, edit and diff."""

    blocks: tuple[BlockVariant, ...]

    @classmethod
    def of(cls, config: PuzzleConfig) -> "Architecture":
        """The architecture a model has."""
        blocks = config.blocks or []
        parts = ([variant_from_entry(subblock, block[subblock]) for subblock in SUBBLOCKS] for block in blocks)
        return cls(tuple(BlockVariant(attention, ffn) for attention, ffn in parts))

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
        rows = ",\n".join(
            f'    {{"layer": {index}, "attention": "{block.attention}", "ffn": "{block.ffn}"}}'
            for index, block in enumerate(self.blocks)
        )
        return f'{{\n  "blocks": [\n{rows}\n  ]\n}}\n'

    @classmethod
    def from_json(cls, text: str) -> "Architecture":
        """Back from `to_json`, rows in any order; a `PuzzleError` that names the layer of a row that is wrong."""
        try:
            rows = json.loads(text)["blocks"]
            by_layer = {row["layer"]: row for row in rows}
        except (ValueError, KeyError, TypeError) as error:
            raise PuzzleError(
                'architecture: not of the form {"blocks": [{"layer": 0, "attention": "kv2", "ffn": "w512"}, ...]} '
                f"({type(error).__name__}: {error})"
            ) from None
        if not rows or len(by_layer) != len(rows) or set(by_layer) != set(range(len(rows))):
            found = ", ".join(str(row["layer"]) for row in rows)
            raise PuzzleError(f"architecture: layers must be numbered from 0, each once; found {found}")
        return cls(tuple(_parse_row(layer, by_layer[layer]) for layer in range(len(rows))))


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
    named = {"attention": _named("attention", attention), "ffn": _named("ffn", ffn)}

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


def _parse_row(layer: int, row: dict[str, Any]) -> BlockVariant:
    try:
        return BlockVariant.parse(f"{row['attention']}+{row['ffn']}")
    except KeyError as error:
        raise PuzzleError(f"architecture: layer {layer} has no entry {error}; write its variant's name") from None
    except PuzzleError as error:
        raise PuzzleError(f"architecture: layer {layer}: {error}") from None


def _named(subblock: Subblock, names: Sequence[str]) -> list[Variant]:
    try:
        return [parse_variant(subblock, name) for name in names]
    except PuzzleError as error:
        raise PuzzleError(f"space.{subblock}: {error}") from None
