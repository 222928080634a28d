"""Children on disk: random, of any blocks, with a byte tokenizer."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from tests.conftest import pico_puzzle, save_byte_tokenizer

from puzzle.modeling import PuzzleForCausalLM, save_checkpoint

SaveChild = Callable[..., tuple[PuzzleForCausalLM, Path]]


@pytest.fixture
def save_child(tmp_path: Path) -> SaveChild:
    """From blocks and sizes to the model and its folder."""

    def save(*blocks: str, **overrides: object) -> tuple[PuzzleForCausalLM, Path]:
        model = pico_puzzle(*blocks, vocab_size=260, **overrides)
        parent = tmp_path / "parent"
        parent.mkdir(exist_ok=True)
        save_byte_tokenizer(parent)
        (parent / "LICENSE").write_text("terms\n")
        (parent / "chat_template.jinja").write_text("{{ messages[0].content }}")
        (parent / "generation_config.json").write_text(json.dumps({"eos_token_id": [0, 3]}))
        path = tmp_path / "child"
        save_checkpoint(model, path, extra_files_from=parent)
        (path / "README.md").write_text("how to load it here\n")
        return model, path

    return save
