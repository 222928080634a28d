"""Law 7 for other families: children of one of each form in vLLM's Transformers backend, from the hf checkpoint."""

from pathlib import Path

import torch
from tests.conftest import save_byte_tokenizer
from tests.engines.parity import ROUNDING, TOKENS, VOCAB, difference, logits_of
from tests.engines.readers import Ask

from puzzle.engines.capability import refusals
from puzzle.modeling import PuzzleForCausalLM, puzzle_config, save_checkpoint, tiny_config
from puzzle.variants import Architecture

DENSE = "none+w96 kv2+w32 kv1q2+none none+none kv1+w96 kv2q2+w32"
STACKS = {
    **dict.fromkeys(("mistral", "qwen2", "qwen3", "granite"), DENSE),
    "gemma2": "none+w96 kv2q2+w32 kv2win8+none none+none kv1q2win8+w96 kv1+w32",
    "gemma3_text": "none+w96 kv2win8+w32 kv2win8+none none+none kv1win8+w96 kv1+w32",
    "qwen3_moe": "none+experts kv2+experts kv1+none none+none kv1+experts none+linear",
}


def test_children_of_other_families_in_vllm(vllm: Ask, tmp_path: Path) -> None:
    """Biases, norms of queries and keys, factors and caps of logits, sandwiched norms, windows, experts."""
    models, folders = [], []
    for family, blocks in STACKS.items():
        tiny = tiny_config(family)
        tiny.vocab_size, tiny.max_position_embeddings, tiny.hidden_size, tiny.head_dim = VOCAB, 512, 128, 32
        if "win" not in blocks:
            tiny.sliding_window = None
        config = puzzle_config(tiny)
        torch.manual_seed(0)
        model = PuzzleForCausalLM(Architecture.parse(blocks.split()).configure(config)).eval()
        assert refusals(model.config, "vllm") == []
        for parameter in model.parameters():
            parameter.data.add_(torch.randn_like(parameter), alpha=0.1)
        save_byte_tokenizer(tmp_path)
        save_checkpoint(model, tmp_path / family, extra_files_from=tmp_path)
        models.append(model)
        folders.append(tmp_path / family)
    for model, answer in zip(models, vllm(folders, TOKENS), strict=True):
        expected_TV = torch.log_softmax(logits_of(model, TOKENS), -1)[:-1]
        assert difference(answer.logits_TV, expected_TV) < ROUNDING
