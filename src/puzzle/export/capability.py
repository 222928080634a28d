"""Whether a model can be exported to a format, layer by layer, before anything is written."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from puzzle.errors import PuzzleError
from puzzle.export.targets import POSITIONS, TARGETS, YES, Alternative, Cell, Position, Support, Target, Verdict
from puzzle.modeling import Block, PuzzleConfig
from puzzle.variants import SUBBLOCKS, LayerSpace, Space, Subblock, Variant

_NOT_NAMED = Support("no", "unknown to this format")


@dataclass(frozen=True)
class Finding:
    """Something that a format cannot hold as it is."""

    layer: int | None
    """None: the whole model."""
    what: str
    verdict: Verdict
    note: str

    def __str__(self) -> str:
        where = "" if self.layer is None else f"layer {self.layer}: "
        return f"{where}{self.what}: {self.note}"


def target(name: str) -> Target:
    """The target of this name; a `PuzzleError` that lists them if there is none."""
    if name not in TARGETS:
        raise PuzzleError(f"export target {name!r} is unknown; use one of {', '.join(TARGETS)}")
    return TARGETS[name]


def check(config: PuzzleConfig, name: str) -> list[Finding]:
    """What the target `name` does not hold as it is: rewrites, and what it cannot hold at all; empty: all as it is."""
    chosen = target(name)
    return [*_whole_model(config, chosen), *_layers(config.blocks or [], chosen)]


def require(config: PuzzleConfig, name: str) -> None:
    """A `PuzzleError` that names the first layer and the reason, if the model cannot be exported to `name`."""
    refused = [finding for finding in check(config, name) if finding.verdict == "no"]
    if refused:
        more = f" (and {len(refused) - 1} more)" if len(refused) > 1 else ""
        raise PuzzleError(f"export to {name}: {refused[0]}{more}; restrict the space by `deploy`, or export to hf")


def supported(variant: Variant, name: str, position: Position | None = None) -> bool:
    """Whether every layer, or one at `position`, may take this variant in a child for the target `name`."""
    chosen, entry = target(name), variant.module_config()
    positions = POSITIONS if position is None else (position,)
    return all(_support(chosen, variant.subblock, entry, place).verdict != "no" for place in positions)


def deployable(space: Space, config: PuzzleConfig, names: Sequence[str]) -> Space:
    """`space` without what one of these targets cannot hold where it would stand; the parent's own must be possible."""
    for name in names:
        require(config, name)

    def kept(index: int, subblock: Subblock) -> tuple[Variant, ...]:
        last = len(space.layers) - 1
        position: Position = "first" if index == 0 else "last" if index == last else "middle"
        own, *others = space.layers[index].subblock(subblock)
        return (own, *(each for each in others if all(supported(each, name, position) for name in names)))

    deployed = Space(tuple(LayerSpace(kept(i, "attention"), kept(i, "ffn")) for i in range(len(space.layers))))
    windows = _windows(variant.module_config() for layer in deployed.layers for variant in layer.attention)
    for name in names:
        if target(name).one_window and len(windows) > 1:
            sizes = ", ".join(map(str, windows))
            raise PuzzleError(f"deploy: {name} needs windows of one size; space.attention has them of {sizes}")
    return deployed


def table() -> str:
    """All targets as a Markdown table; footnotes say what a rewrite is and why not."""
    notes: dict[str, int] = {}
    names: list[Alternative] = list(TARGETS["hf"].alternatives)
    lines = [_row("", *TARGETS), _row("---", *("---" for _ in TARGETS))]
    for name in names:
        cells = (entry.alternatives.get(name, _NOT_NAMED) for entry in TARGETS.values())
        lines.append(_row(name, *(_cell(cell, notes) for cell in cells)))
    lines.append(_row("biases", *("yes" if entry.biases else "no" for entry in TARGETS.values())))
    lines.append(_row("head_dim of its own", *("yes" if entry.own_head_dim else "no" for entry in TARGETS.values())))
    lines.append(_row("FFN widths", *(_multiple(entry.width_multiple) for entry in TARGETS.values())))
    lines.append(_row("window sizes", *("one" if entry.one_window else "any" for entry in TARGETS.values())))
    lines.append(_row("families", *(", ".join(entry.families or ("all",)) for entry in TARGETS.values())))
    lines.append(_row("rope", *(", ".join(entry.rope_types or ("all",)) for entry in TARGETS.values())))
    lines.append(_row("evidence", *(entry.evidence for entry in TARGETS.values())))
    readers = [f"- `{name}`: {entry.reader}" for name, entry in TARGETS.items()]
    return "\n".join([*lines, "", *(f"{number}. {note}" for note, number in notes.items()), "", *readers, ""])


def is_empty(block: Block) -> bool:
    """Whether the layer is the identity: formats but the Hugging Face one leave it out."""
    return block["attention"]["kind"] == "none" and block["ffn"]["kind"] == "none"


def _whole_model(config: PuzzleConfig, chosen: Target) -> list[Finding]:
    family, rope = config.base_model_type, (config.rope_parameters or {}).get("rope_type", "default")
    assert config.head_dim is not None
    found = []
    if chosen.families is not None and family not in chosen.families:
        found.append(f"a parent of the family {family}")
    if chosen.activations is not None and config.hidden_act not in chosen.activations:
        found.append(f"hidden_act {config.hidden_act}")
    if chosen.rope_types is not None and rope not in chosen.rope_types:
        found.append(f"rope_type {rope}")
    if not chosen.biases and (config.attention_bias or config.mlp_bias):
        found.append("biases of attention or FFN projections")
    if not chosen.own_head_dim and config.head_dim * config.num_attention_heads != config.hidden_size:
        found.append(f"head_dim {config.head_dim} that is not hidden_size / num_attention_heads")
    windows = _windows(block["attention"] for block in config.blocks or [])
    if chosen.one_window and len(windows) > 1:
        found.append(f"windows of several sizes ({', '.join(map(str, windows))})")
    return [Finding(None, what, "no", f"{chosen.reader} does not support it") for what in found]


def _windows(attentions: Iterable[dict[str, Any]]) -> list[int]:
    """Their sizes, in order."""
    return sorted({entry["window"] for entry in attentions if entry.get("window")})


def _layers(blocks: list[Block], chosen: Target) -> list[Finding]:
    findings = []
    layers = [layer for layer, block in enumerate(blocks) if not is_empty(block)]
    for layer in layers:
        block = blocks[layer]
        position: Position = "first" if layer == layers[0] else "last" if layer == layers[-1] else "middle"
        for subblock in SUBBLOCKS:
            support = _support(chosen, subblock, block[subblock], position)
            if support.verdict != "yes":
                what = alternative(subblock, block[subblock])
                findings.append(
                    Finding(layer, f"{subblock} {block[subblock]['kind']} ({what})", support.verdict, support.note)
                )
    return findings


def alternative(subblock: Subblock, entry: dict[str, Any]) -> Alternative:
    """The row of the table that one half of an entry of `PuzzleConfig.blocks` belongs to."""
    match subblock, entry["kind"]:
        case "attention", "gqa":
            return "window with sinks" if entry.get("sinks") else "window" if entry.get("window") else "kv heads"
        case "attention", "linear":
            return "linear attention"
        case "attention", "none":
            return "no attention"
        case "ffn", "gated":
            return "ffn width"
        case "ffn", "low_rank":
            return "low-rank ffn"
        case "ffn", "linear":
            return "linear ffn"
        case "ffn", "none":
            return "no ffn"
        case _:
            return "other kinds"


def _support(chosen: Target, subblock: Subblock, entry: dict[str, Any], position: Position) -> Support:
    name = alternative(subblock, entry)
    if name == "ffn width" and entry["intermediate_size"] % chosen.width_multiple:
        return Support("no", f"width {entry['intermediate_size']} is not a multiple of {chosen.width_multiple}")
    cell = chosen.alternatives.get(name, _NOT_NAMED)
    return cell if isinstance(cell, Support) else cell[position]


def _row(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"


def _multiple(width_multiple: int) -> str:
    return "any" if width_multiple == 1 else f"multiples of {width_multiple}"


def _cell(cell: Cell, notes: dict[str, int]) -> str:
    """A verdict with the number of its note, and of the first layer where that is another."""
    if isinstance(cell, Support):
        number = "" if cell == YES else f" ({notes.setdefault(cell.note, len(notes) + 1)})"
        return f"{cell.verdict}{number}"
    return f"{_cell(cell['middle'], notes)}; first: {_cell(cell['first'], notes)}"
