"""Prints the parity matrix of docs/engines.md, as Markdown: `python -m tests.engines.measure_llama_cpp`."""

import datetime
import subprocess
import tempfile
from itertools import product
from pathlib import Path

from tests.engines.conftest import LlamaCpp
from tests.engines.parity import ATTENTIONS, FFNS, MIXED, POSITIONS, difference, greedy, in_position, logits_of, save
from tests.engines.test_llama_cpp import TOKENS

from puzzle.engines import python_of
from puzzle.export import export_gguf


def main() -> None:
    python = python_of("llama-cpp")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        llama_cpp = LlamaCpp(python, folder)
        cases = list(product(ATTENTIONS, FFNS, POSITIONS))
        saved = [save(folder / "-".join(case), *in_position(*case)) for case in cases]
        answers = llama_cpp([export_gguf(child, child.with_suffix(".gguf"), dtype="f32") for _, child in saved], TOKENS)
        expected = [logits_of(model, TOKENS) for model, _ in saved]
        errors = dict(
            zip(cases, (difference(a.logits_TV, e) for a, e in zip(answers, expected, strict=True)), strict=True)
        )
        version = subprocess.check_output([python, "-c", "import llama_cpp; print(llama_cpp.__version__)"], text=True)
        largest = max(float(logits.abs().max()) for logits in expected)
        print(f"llama-cpp-python {version.strip()}, {datetime.date.today()}; logits up to {largest:.1f}.\n")
        print("| attention, FFN of the layer | " + " | ".join(POSITIONS) + " |\n|---|---|---|---|")
        for attention, ffn in product(ATTENTIONS, FFNS):
            row = (f"{errors[attention, ffn, position]:.1e}" for position in POSITIONS)
            print(f"| {attention}+{ffn} | {' | '.join(row)} |")
        print("\n| stack of 8 layers | f32 | f16 | bf16 | q8_0 | greedy tokens of 64 that are equal, f32 |")
        print("|---|---|---|---|---|---|")
        for index, blocks in enumerate(MIXED):
            model, child = save(folder / f"mixed{index}", *blocks)
            files = [
                export_gguf(child, folder / f"{index}-{dtype}.gguf", dtype=dtype)
                for dtype in ("f32", "f16", "bf16", "q8_0")
            ]
            found = llama_cpp(files, TOKENS, greedy=64)
            logits = logits_of(model, TOKENS)
            row = (f"{difference(answer.logits_TV, logits):.1e}" for answer in found)
            equal = sum(a == b for a, b in zip(found[0].greedy, greedy(model, TOKENS, 64), strict=True))
            print(f"| {', '.join(blocks)} | {' | '.join(row)} | {equal} |")


if __name__ == "__main__":
    main()
