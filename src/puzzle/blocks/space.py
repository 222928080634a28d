"""One block's choice, a whole architecture, and the space of them."""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from puzzle.blocks.attention import GroupedQuery, LinearAttention, NoAttention
from puzzle.blocks.ffn import GatedFFN, LinearFFN, NoFFN
from puzzle.blocks.registry import parse_variant, variant_from_config
from puzzle.blocks.variants import Half, Variant
from puzzle.errors import PuzzleError
from puzzle.modeling import Block, PuzzleConfig

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

    def half(self, half: Half) -> Variant:
        return self.attention if half == "attention" else self.ffn

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
        """The parent's configuration with these blocks."""
        fields = parent.to_dict()
        for derived in ("blocks", "num_hidden_layers", "per_layer_config"):
            fields.pop(derived, None)
        config = PuzzleConfig(**fields, blocks=[block.module_config() for block in self.blocks])
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
        rows: list[dict[str, Any]] = sorted(json.loads(text)["blocks"], key=lambda row: int(row["layer"]))
        return cls(tuple(BlockVariant.parse(f"{row['attention']}+{row['ffn']}") for row in rows))


@dataclass(frozen=True)
class LayerSpace:
    """The variants one layer may take; the parent's own comes first in both."""

    attention: tuple[Variant, ...]
    ffn: tuple[Variant, ...]

    @property
    def parent(self) -> BlockVariant:
        return BlockVariant(self.attention[0], self.ffn[0])

    def half(self, half: Half) -> tuple[Variant, ...]:
        return self.attention if half == "attention" else self.ffn

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
    attention_kinds: Sequence[str] = ("linear", "none"),
    ffn_kinds: Sequence[str] = ("linear", "none"),
) -> Space:
    """The space of a model: KV heads by halvings and the paper's widths unless given, and the kinds without sizes.

    Sizes above a layer's own do not apply to it; a KV-head count must divide the layer's.
    """
    layers = []
    for block in Architecture.of(config).blocks:
        attention: list[Variant] = [block.attention]
        ffn: list[Variant] = [block.ffn]
        if isinstance(block.attention, GroupedQuery):
            parent_heads = block.attention.num_kv_heads
            counts = kv_heads if kv_heads is not None else _halvings(parent_heads)
            attention += [GroupedQuery(n) for n in counts if n < parent_heads and parent_heads % n == 0]
        if isinstance(block.ffn, GatedFFN):
            parent_width = block.ffn.intermediate_size
            widths = ffn_widths if ffn_widths is not None else _default_widths(parent_width)
            ffn += [GatedFFN(width) for width in sorted(set(widths), reverse=True) if width < parent_width]
        attention += [kind for kind in (LinearAttention(), NoAttention()) if kind.kind in attention_kinds]
        ffn += [kind for kind in (LinearFFN(), NoFFN()) if kind.kind in ffn_kinds]
        layers.append(LayerSpace(tuple(dict.fromkeys(attention)), tuple(dict.fromkeys(ffn))))
    return Space(tuple(layers))


def hardware_multiple(width: int) -> int:
    """What FFN widths are rounded to: 256 for real models (engines and tensor cores want it), less for small ones."""
    return min(256, max(1, 2 ** (width.bit_length() - 5)))


def _halvings(count: int) -> list[int]:
    halvings = []
    while count % 2 == 0:
        count //= 2
        halvings.append(count)
    return halvings


def _default_widths(parent_width: int) -> list[int]:
    multiple = hardware_multiple(parent_width)
    rounded = {max(multiple, round(fraction * parent_width / multiple) * multiple) for fraction in FFN_FRACTIONS}
    return sorted(rounded, reverse=True)
