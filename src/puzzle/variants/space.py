"""One block's choice, a whole architecture, and the space of them."""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from puzzle.errors import PuzzleError
from puzzle.modeling import Block, PuzzleConfig
from puzzle.variants.attention import GroupedQuery
from puzzle.variants.base import SUBBLOCKS, Subblock, Unsized, Variant
from puzzle.variants.ffn import GatedFFN
from puzzle.variants.registry import parse_variant, variant_from_config

FFN_FRACTIONS = (0.87, 0.75, 0.5, 0.25, 0.2, 0.1)
"""Widths below the parent's own (paper section 2.1)."""


@dataclass(frozen=True)
class BlockVariant:
    """One attention variant with one FFN variant."""

    attention: Variant
    ffn: Variant

    @property
    def name(self) -> str:
        return f"{self.attention.name}+{self.ffn.name}"

    def subblock(self, subblock: Subblock) -> Variant:
        return self.attention if subblock == "attention" else self.ffn

    def module_config(self) -> Block:
        return {"attention": self.attention.module_config(), "ffn": self.ffn.module_config()}

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
        return cls(
            tuple(
                BlockVariant(
                    variant_from_config("attention", block["attention"]), variant_from_config("ffn", block["ffn"])
                )
                for block in config.blocks or []
            )
        )

    def configure(self, parent: PuzzleConfig) -> PuzzleConfig:
        """The parent's configuration with these blocks; a `PuzzleError` if its heads cannot share the KV heads."""
        for layer, block in enumerate(self.blocks):
            if isinstance(block.attention, GroupedQuery) and parent.num_attention_heads % block.attention.num_kv_heads:
                raise PuzzleError(
                    f"architecture: layer {layer} has {block.attention}, which does not divide the parent's "
                    f"{parent.num_attention_heads} attention heads; use a divisor"
                )
        blocks = [block.module_config() for block in self.blocks]
        config = PuzzleConfig(**parent.to_dict() | {"blocks": blocks})
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
    """The variants one layer may take; the parent's own comes first in both."""

    attention: tuple[Variant, ...]
    ffn: tuple[Variant, ...]

    @property
    def parent(self) -> BlockVariant:
        return BlockVariant(self.attention[0], self.ffn[0])

    def subblock(self, subblock: Subblock) -> tuple[Variant, ...]:
        return self.attention if subblock == "attention" else self.ffn

    def blocks(self) -> list[BlockVariant]:
        """Every composed block, the parent's own first."""
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
    kv_heads: Sequence[int] | None = None,
    ffn_widths: Sequence[int] | None = None,
    attention: Sequence[str] = ("linear", "none"),
    ffn: Sequence[str] = ("linear", "none"),
) -> Space:
    """The space of a model: KV heads halved down to 1 and the paper's widths unless given, then variants by name.

    A layer gets its own first, and of the others those that fit it. A size or a sized variant that fits no layer, and
    an unknown name, is a `PuzzleError`.

    Args:
        attention: further variants, such as `linear`, `none`, `kv2win1024s4`. ffn: such as `linear`, `none`, `rank64`.
    """
    parent = Architecture.of(config)
    _check_kv_heads(kv_heads or (), parent)
    _check_ffn_widths(ffn_widths or (), parent)
    named: dict[Subblock, list[Variant]] = {
        "attention": _named("attention", attention, parent, config),
        "ffn": _named("ffn", ffn, parent, config),
    }
    layers = []
    for block in parent.blocks:
        sized: dict[Subblock, list[Variant]] = {"attention": [], "ffn": []}
        if isinstance(own := block.attention, GroupedQuery):
            counts = kv_heads if kv_heads is not None else _default_kv_heads(own.num_kv_heads)
            sized["attention"] = [replace(own, num_kv_heads=count) for count in sorted(counts, reverse=True)]
        if isinstance(block.ffn, GatedFFN):
            widths = ffn_widths if ffn_widths is not None else _default_widths(block.ffn.intermediate_size)
            sized["ffn"] = [GatedFFN(width) for width in sorted(widths, reverse=True)]
        subblocks = (
            _fitting(block.subblock(subblock), sized[subblock] + named[subblock], config) for subblock in SUBBLOCKS
        )
        layers.append(LayerSpace(*subblocks))
    return Space(tuple(layers))


def hardware_multiple(width: int) -> int:
    """What FFN widths are rounded to: 256 for real models (engines and tensor cores want it), less for small ones."""
    return min(256, max(1, 2 ** (width.bit_length() - 5)))


def _parse_row(layer: int, row: dict[str, Any]) -> BlockVariant:
    try:
        return BlockVariant.parse(f"{row['attention']}+{row['ffn']}")
    except KeyError as error:
        raise PuzzleError(f"architecture: layer {layer} has no entry {error}; write its variant's name") from None
    except PuzzleError as error:
        raise PuzzleError(f"architecture: layer {layer}: {error}") from None


def _check_kv_heads(counts: Sequence[int], parent: Architecture) -> None:
    own = sorted({block.attention.num_kv_heads for block in parent.blocks if isinstance(block.attention, GroupedQuery)})
    for count in counts:
        if count < 1 or not any(heads % count == 0 for heads in own):
            raise PuzzleError(f"space.kv_heads: {count} divides no layer's number of KV heads {own}; use divisors")


def _check_ffn_widths(widths: Sequence[int], parent: Architecture) -> None:
    own = sorted({block.ffn.intermediate_size for block in parent.blocks if isinstance(block.ffn, GatedFFN)})
    for width in widths:
        if width < 1 or not any(width <= parent_width for parent_width in own):
            raise PuzzleError(f"space.ffn_widths: {width} is not within any layer's width {own}; use smaller ones")


def _named(subblock: Subblock, names: Sequence[str], parent: Architecture, config: PuzzleConfig) -> list[Variant]:
    """The variants of these names; each with a size must fit a layer."""
    variants = []
    for name in names:
        try:
            variant = parse_variant(subblock, name)
        except PuzzleError as error:
            raise PuzzleError(f"space.{subblock}: {error}") from None
        owns = dict.fromkeys(block.subblock(subblock) for block in parent.blocks)
        if not isinstance(variant, Unsized) and not any(_is_or_fits(variant, own, config) for own in owns):
            raise PuzzleError(
                f"space.{subblock}: {name} is smaller than no layer's own ({', '.join(map(str, owns))}); "
                "use smaller sizes"
            )
        variants.append(variant)
    return variants


def _fitting(own: Variant, variants: Sequence[Variant], config: PuzzleConfig) -> tuple[Variant, ...]:
    """The layer's own, then what fits it, each once."""
    return tuple(dict.fromkeys((own, *(variant for variant in variants if variant.fits(own, config)))))


def _is_or_fits(variant: Variant, own: Variant, config: PuzzleConfig) -> bool:
    return variant == own or variant.fits(own, config)


def _default_kv_heads(count: int) -> list[int]:
    """Halved while it can be, then divided by its smallest factor: 8 gives 4, 2, 1, and 6 gives 3, 1."""
    counts = []
    while count > 1:
        count //= next(factor for factor in range(2, count + 1) if count % factor == 0)
        counts.append(count)
    return counts


def _default_widths(parent_width: int) -> list[int]:
    multiple = hardware_multiple(parent_width)
    rounded = {max(multiple, round(fraction * parent_width / multiple) * multiple) for fraction in FFN_FRACTIONS}
    return sorted(rounded, reverse=True)
