"""The whole method on small random models of many families, and their children where Puzzle is not installed."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tests.conftest import save_byte_tokenizer, write_pico_text
from torch.nn.functional import kl_div, log_softmax
from transformers import AutoModelForCausalLM

from puzzle import Recipe, create_folder, open_run, run_stage
from puzzle.modeling import puzzle_config, tiny_config
from puzzle.pipeline import Pipeline
from puzzle.scores.task import with_block

FAMILIES = (
    *("llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text", "phi3", "granite", "olmo2", "smollm3"),
    *("qwen3_moe", "mixtral", "gpt_oss", "deepseek_v3", "apertus"),
)
NO_QUERY_HEADS = ("olmo2", "deepseek_v3")
"""Heads that are normed together, and latent attention."""
TOKENS = [65, 3, 200, 17, 90, 91, 92, 5, 5, 130, 7, 44]
ELSEWHERE = """
import json, sys, torch
sys.modules["puzzle"] = None  # any import of it fails
from transformers import AutoModelForCausalLM
for folder in sys.argv[2:]:
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).eval()
    print(json.dumps(model(torch.tensor([json.loads(sys.argv[1])])).logits[0].tolist()))
"""


@torch.no_grad()
def scores_are_those_of_a_full_forward(method: Pipeline, family: str, fewer: str) -> None:
    """Law 9, of the first and the last layer."""
    parent, space = method.parent.load(), method.space
    assert family in NO_QUERY_HEADS or fewer in [variant.name for variant in space.layers[0].attention]
    (sequences,) = method.data.batches("scoring", 1000, method.run.recipe.score.tokens)
    parent_logp = log_softmax(parent(sequences[:, :-1]).logits.double(), -1)
    for layer in (0, len(space.layers) - 1):
        own, *blocks = space.layers[layer].blocks()
        single = [block for block in blocks if own.attention == block.attention or own.ffn == block.ffn]
        for block in (single[0], single[-1], *(block for block in single if block.attention.name == fewer)):
            model = with_block(parent, layer, block, method.library)
            logp = log_softmax(model(sequences[:, :-1]).logits.double(), -1)
            kl = float(kl_div(logp, parent_logp, log_target=True, reduction="none").sum(-1).mean())
            assert method.scores.by_key[layer, block.name].kl == pytest.approx(kl, rel=1e-3, abs=1e-6), family


@pytest.fixture(scope="module")
def children(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, torch.Tensor]]:
    """Of each family the exported child of a whole run, and its logits as Puzzle loads it."""
    found, text = {}, tmp_path_factory.mktemp("text") / "text.jsonl"
    write_pico_text(text)
    for family in FAMILIES:
        parent, folder = (tmp_path_factory.mktemp(family) / name for name in ("parent", "run"))
        torch.manual_seed(0)
        config = tiny_config(family)
        config.vocab_size = 257
        model = AutoModelForCausalLM.from_config(config)
        for parameter in model.parameters():
            parameter.data.add_(torch.randn_like(parameter), alpha=0.1)
        model.save_pretrained(parent)
        save_byte_tokenizer(parent)
        recipe = {
            "parent": str(parent),
            "precision": "float32",
            "data": {"source": str(text), "sequence_length": 32, "scoring": 0.1},
            "calibration": {"tokens": 512},
            "library": {"tokens": 256, "batch_size": 4, "validation_tokens": 128},
            "score": {"tokens": 256},
            "scenario": {"engine": "roofline", "prompt_tokens": 32, "generated_tokens": 16},
            "target": {"parameters": "80%"},
            "correct": {"tokens": 0},
            "distil": {"tokens": 256, "batch_size": 4, "validation_tokens": 128},
            "evaluate": {"tokens": 128, "uniform_baseline": False},
            "execution": {"device": "cpu"},
        }
        own = puzzle_config(config).blocks[0]["attention"]
        fewer = f"kv{own['num_key_value_heads']}q2" + (f"win{own['window']}" if "window" in own else "")
        if family not in NO_QUERY_HEADS:
            recipe["space"] = {"attention": ["linear", "none", fewer]}
        create_folder(folder, Recipe.model_validate(recipe))
        with open_run(folder) as run:
            method = run_stage(run, "report")
            assert all(row.loss <= row.initial_loss < 2 for row in method.library.index.rows)
            assert 0 < method.rows["child"]["kl"] < 1
            scores_are_those_of_a_full_forward(method, family, fewer)
            logits_TV = method.child.load()(torch.tensor([TOKENS])).logits[0]
            found[family] = method.exported, logits_TV
    return found


def test_children_compute_the_same_where_puzzle_is_not_installed(
    children: dict[str, tuple[Path, torch.Tensor]],
) -> None:
    folders = [str(folder) for folder, _ in children.values()]
    command = [sys.executable, "-c", ELSEWHERE, json.dumps(TOKENS), *folders]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    for line, (family, (_, expected_TV)) in zip(done.stdout.splitlines(), children.items(), strict=True):
        torch.testing.assert_close(
            torch.tensor(json.loads(line)), expected_TV, msg=lambda text, of=family: f"{of}: {text}"
        )
