"""Law 7 for every engine that is run here: an exported child computes what it computes in torch."""

from pathlib import Path

from tests.engines.matrix import ALTERNATIVES, PAGE, block_of, measure, render
from tests.engines.parity import kind_from_outside
from tests.engines.readers import LlamaCpp, Vllm

from puzzle.engines.capability import READERS
from puzzle.variants import BlockVariant


def test_every_row_of_the_table_is_measured() -> None:
    with kind_from_outside():
        blocks = [BlockVariant.parse(block) for block in ALTERNATIVES.values()]
    assert {variant.cell for block in blocks for variant in (block.attention, block.ffn)} == set(READERS["hf"].runs)


def test_the_matrix_of_the_docs_is_what_is_measured(llama_cpp: LlamaCpp, vllm: Vllm, tmp_path: Path) -> None:
    """`python -m tests.engines.matrix` writes it anew."""
    assert render(measure(llama_cpp, vllm, tmp_path)) == block_of(PAGE.read_text()).group()
