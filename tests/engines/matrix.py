"""The parity matrix of docs/engines.md: `python -m tests.engines.matrix` measures it and writes it there.

Each column's alternatives stand one after another in a stack, or in several where one model cannot have all. Stacks are
rotated, so that every alternative is first, last, and in the middle. Further stacks have both subblocks of layers
replaced. Parents with biases, as Qwen's have them, are tried with all alternatives in one stack, and with one of the
further ones.
"""

import datetime
import re
import tempfile
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path

import torch
from tests.conftest import pico_puzzle
from tests.engines import readers
from tests.engines.parity import (
    MIXED,
    ROUNDING,
    TOKENS,
    VOCAB,
    difference,
    greedy,
    kind_from_outside,
    logits_of,
    save,
    save_as_child,
)
from tests.modeling.test_families import SPARSE

from puzzle.engines.capability import refusals
from puzzle.export import export_deci, export_gguf
from puzzle.modeling import PuzzleConfig, PuzzleForCausalLM, puzzle_config, tiny_config
from puzzle.variants import Architecture

PAGE = Path(__file__).parents[2] / "docs" / "engines.md"
ALTERNATIVES = {
    "fewer KV heads": "kv2+w48",
    "one KV head": "kv1+w48",
    "fewer query heads": "kv2q2+w48",
    "narrower FFN": "kv4+w16",
    "linear attention": "linear+w48",
    "no attention": "none+w48",
    "low-rank FFN": "kv4+rank6",
    "linear FFN": "kv4+linear",
    "no FFN": "kv4+none",
    "window": "kv4win6+w48",
    "window with sinks": "kv4win6s2+w48",
    "other kinds": "kv4+gain",
}
"""Every row of the table of `puzzle.engines.capability`, and one KV head."""
_WINDOWS = "kv2win6+none {} none+linear kv1win6+rank6 linear+none none+w48 kv4+w48 kv1win6+w16"
STACKS = (
    *MIXED,
    tuple(_WINDOWS.format("kv4win6+w16").split()),
    tuple(_WINDOWS.format("kv4win9+w16").split()),
)
BIASES = {
    "biases of attention": ("attention_bias",),
    "biases of attention and FFN": ("attention_bias", "mlp_bias"),
}
"""Switches of the parent's configuration."""
FAMILIES = {
    **{name: (name, False) for name in ("mistral", "qwen2", "qwen3", "phi3", "seed_oss", "smollm3")},
    **{f"{name}, tied": (name, True) for name in ("qwen3", "granite", "smollm3", "gemma2", "gemma3_text")},
    **{name: (name, False) for name in ("olmo2", "exaone4", "glm4", "apertus", "qwen3_moe", "mixtral", "gpt_oss")},
}
"""Of children of other parents, by row: the family, and whether the head is tied."""
KINDS = {
    "widths and windows": ("none+w96 kv2+w32 kv1Q2win6+none none+none kv1+w96 kv2win6+w32",),
    "widths": ("none+w96 kv2+w32 kv1+none none+none kv1Q2+w96 none+w32", "kv2Q2+none none+w96 kv1+w32 kv2+none"),
    "windows": (
        "none+w96 kv2win6+w96 kv1Q2win6+none none+none kv1+w96 none+none",
        "kv2Q2win6+none none+w96 kv1+w96 kv1win6+none",
    ),
    "one width": ("none+w96 kv2+w96 kv1+none kv1Q2+w96 none+none none+w96", "kv2Q2+none none+w96 kv1+w96 kv2+none"),
}
"""Their blocks, without attention or FFN first, in the middle and last; what the first of them shows the others need
not. Q2: two query heads of four, where the family can have them."""
GREEDY = 32


@dataclass(frozen=True)
class Stack:
    """A child: its blocks, and the switches of `BIASES` that are on; or of another family, a row of `FAMILIES`."""

    blocks: tuple[str, ...]
    biases: tuple[str, ...] = ()
    row: str = ""
    kind: str = ""

    @property
    def settings(self) -> dict[str, int]:
        """A head size of 32 is the smallest for which vLLM has an attention on the CPU."""
        return {"head_dim": 32} | dict.fromkeys(self.biases, True)


def of_family(row: str, kind: str, blocks: str) -> Stack:
    """With the experts of a mixture in place of its FFNs."""
    family, _ = FAMILIES[row]
    blocks = blocks.replace("Q2", "" if family == "olmo2" else "q2")
    if family in SPARSE:
        blocks = re.sub(r"\+w\d+", "+experts", blocks)
    return Stack(tuple(blocks.split()), (), row, kind)


Found = Mapping[Stack, tuple[float, int]]
"""By stack, the greatest difference of log-probabilities, and how many greedy tokens are equal."""


@cache
def _config(stack: Stack) -> PuzzleConfig:
    if not stack.row:
        return pico_puzzle(*stack.blocks, **stack.settings).config
    family, tied = FAMILIES[stack.row]
    tiny = tiny_config(family)
    sizes = {"vocab_size": VOCAB, "max_position_embeddings": 512, "hidden_size": 128, "head_dim": 32}
    for name, value in (sizes | {"sliding_window": None, "tie_word_embeddings": tied}).items():
        setattr(tiny, name, value)
    return Architecture.parse(stack.blocks).configure(puzzle_config(tiny))


@dataclass(frozen=True)
class Column:
    """One format as one engine reads it."""

    title: str
    reader: str
    """Its name in the capability table."""
    write: Callable[[Path, Path], Path]
    """From the child's folder, and a path, to what the engine reads."""
    ask: readers.Ask

    def stacks(self) -> list[Stack]:
        """All rotations of the alternatives, the further stacks, and those with biases, as far as the format can."""

        def holds(stack: Stack) -> bool:
            return not refusals(_config(stack), self.reader)

        rotations: list[Stack] = []
        for first in ALTERNATIVES.values():
            if any(first in stack.blocks for stack in rotations) or not holds(Stack((first,) * 3)):
                continue
            blocks: tuple[str, ...] = (first,)  # with all that one model may have beside it
            for block in ALTERNATIVES.values():
                blocks += (block,) if block != first and holds(Stack((*blocks, block))) else ()
            rotations += [Stack(blocks[index:] + blocks[:index]) for index in range(len(blocks))]
        for row in FAMILIES:
            of_row: list[Stack] = []
            for kind, blocks_of in KINDS.items():
                stacks = [of_family(row, kind, each) for each in blocks_of]
                implied = kind == "one width" or any(stack.kind == "widths and windows" for stack in of_row)
                if all(map(holds, stacks)) and not (of_row and implied):
                    of_row += stacks
            rotations += of_row
        biased = [Stack(each, biases) for biases in BIASES.values() for each in (rotations[0].blocks, MIXED[0])]
        return rotations + [stack for stack in (*map(Stack, STACKS), *biased) if holds(stack)]


COLUMNS = (
    Column("transformers, hf", "hf", lambda child, _: child, readers.transformers),
    Column("llama.cpp, gguf", "gguf", partial(export_gguf, dtype="f32"), readers.llama_cpp),
    Column("vLLM, hf", "vllm", lambda child, _: child, readers.vllm),
    Column("vLLM, deci", "deci", export_deci, readers.vllm),
)


def measure(folder: Path) -> dict[Column, Found]:
    """Every column, by files in `folder`; an engine is started once."""

    @cache
    def saved(stack: Stack) -> tuple[PuzzleForCausalLM, Path]:
        place = Path(tempfile.mkdtemp(dir=folder), "parent")
        if not stack.row:
            return save(place, *stack.blocks, **stack.settings)
        torch.manual_seed(0)
        model = PuzzleForCausalLM(_config(stack)).eval()
        for parameter in model.parameters():
            parameter.data.add_(torch.randn_like(parameter), alpha=0.1)
        return save_as_child(model, place)

    @cache
    def expected(stack: Stack) -> tuple[torch.Tensor, list[int]]:
        model, _ = saved(stack)
        return _log_probabilities(logits_of(model, TOKENS)), greedy(model, TOKENS, GREEDY)

    found: dict[Column, dict[Stack, tuple[float, int]]] = {column: {} for column in COLUMNS}
    with kind_from_outside():
        asked = defaultdict(list)
        for column in COLUMNS:
            asked[column.ask] += [(column, stack) for stack in column.stacks()]
        for ask, pairs in asked.items():
            files = [column.write(saved(stack)[1], saved(stack)[1].with_name(column.reader)) for column, stack in pairs]
            for (column, stack), answer in zip(pairs, ask(files, TOKENS, greedy=GREEDY), strict=True):
                logits_TV, tokens = expected(stack)
                same = sum(a == b for a, b in zip(answer.greedy, tokens, strict=True))
                found[column][stack] = difference(_log_probabilities(answer.logits_TV), logits_TV), same
    return found


def _log_probabilities(logits_TV: torch.Tensor) -> torch.Tensor:
    """Of all tokens but the last."""
    return torch.log_softmax(logits_TV, -1)[: len(TOKENS) - 1]


def render(matrix: Mapping[Column, Found]) -> str:
    """The matrix as Markdown: what was found, without figures that no two machines share."""
    rows = [(f"{name}, `{each}`", lambda stack, each=each: each in stack.blocks) for name, each in ALTERNATIVES.items()]
    rows += [(f"`{' '.join(blocks)}`", partial(Stack.__eq__, Stack(blocks))) for blocks in STACKS]
    rows += [(name, lambda stack, biases=biases: stack.biases == biases) for name, biases in BIASES.items()]
    rows += [(f"children of {row}", lambda stack, row=row: stack.row == row) for row in FAMILIES]
    lines = [["one layer's alternative", *(column.title for column in matrix)], ["---"] * (len(matrix) + 1)]
    for name, counts in rows:
        cells = [{stack: result for stack, result in column.items() if counts(stack)} for column in matrix.values()]
        lines.append([name, *map(_verdict, cells)])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _verdict(results: Found) -> str:
    if not results:
        return "refused"
    if any(error >= ROUNDING or same < GREEDY for error, same in results.values()):
        return "DIFFERENT"
    kinds = dict.fromkeys(stack.kind for stack in results if stack.kind not in ("", "widths and windows"))
    return "equal" + (f": {', '.join(kinds)}" if kinds else "")


def block_of(page: str) -> re.Match[str]:
    """Where the matrix stands in the page."""
    match = re.search(r"(?<=<!-- parity matrix -->\n\n).*(?=\n\n<!-- end -->)", page, re.DOTALL)
    assert match is not None, f"{PAGE} has no parity matrix"
    return match


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        matrix = measure(Path(folder))
    for column, found in matrix.items():
        worst = max(error for error, _ in found.values())
        print(f"{datetime.date.today()} {column.title}: {len(found)} stacks, worst {worst:.1e}")
    page = PAGE.read_text()
    place = block_of(page)
    PAGE.write_text(page[: place.start()] + render(matrix) + page[place.end() :])


if __name__ == "__main__":
    main()
