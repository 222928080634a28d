"""Pico models made on the spot: one thread, float32, CPU."""

from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

torch.set_num_threads(1)


def pico_llama(**overrides: object) -> LlamaForCausalLM:
    """A random Llama of four layers whose sizes all differ, so that a mixed-up dimension cannot go unnoticed."""
    sizes: dict[str, object] = {
        "vocab_size": 128,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "head_dim": 12,
        "max_position_embeddings": 128,
        "initializer_range": 0.2,
        "tie_word_embeddings": True,
    }
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**(sizes | overrides))).eval()


@pytest.fixture(scope="session")
def pico_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved pico Llama without a tokenizer."""
    path = tmp_path_factory.mktemp("pico")
    pico_llama().save_pretrained(path)
    return path
