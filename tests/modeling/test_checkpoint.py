"""Checkpoints, and models made without memory. That they load without this package: tests/test_adding_a_variant.py."""

import inspect
import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from tests.conftest import pico_puzzle, random_tokens
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from puzzle.modeling import PuzzleConfig, PuzzleForCausalLM, empty_model, finish, save_checkpoint
from puzzle.parents import open_parent

BLOCKS = ("none+w16", "kv1+none", "linear+linear", "kv4win4s1+w48", "kv2win5+rank3", "none+none")
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 32}


@torch.no_grad()
@pytest.mark.parametrize("tied", [True, False])
def test_it_loads_with_this_package_and_no_flag(tied: bool, tmp_path: Path) -> None:
    """And saving it changed nothing in memory."""
    model = pico_puzzle(*BLOCKS, tie_word_embeddings=tied, rope_parameters=YARN)
    before = model.config.to_dict()
    save_checkpoint(model, tmp_path, None)
    assert {name for name, value in model.config.to_dict().items() if before.get(name) != value} <= {
        "architectures",
        "dtype",
    }
    found = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(found) is PuzzleForCausalLM
    assert torch.equal(found(random_tokens(2, 9)).logits, model(random_tokens(2, 9)).logits)
    assert torch.equal(open_parent(str(tmp_path)).load()(random_tokens(2, 9)).logits, model(random_tokens(2, 9)).logits)
    assert AutoConfig.from_pretrained(tmp_path).blocks == model.config.blocks
    base = AutoModel.from_pretrained(tmp_path)
    assert torch.equal(base(random_tokens(2, 9))[0], model.model(random_tokens(2, 9))[0])


def test_what_belongs_to_the_parent_comes_along(tmp_path: Path) -> None:
    """Byte for byte, and nothing else: not its weights, nor its configuration. The dtype is kept."""
    parent, child = tmp_path / "parent", tmp_path / "child"
    parent.mkdir()
    extra = ["tokenizer.json", "tokenizer_config.json", "tokenizer.model", "special_tokens_map.json", "vocab.json"]
    extra += ["merges.txt", "chat_template.jinja", "LICENSE.txt", "added_tokens.json"]
    for name in [*extra, "config.json", "model.safetensors", "README.md", "pytorch_model.bin", "train.py"]:
        (parent / name).write_text(f"the parent's {name}")
    # Published parents have such defaults: a temperature, but no sampling. transformers does not write them.
    (parent / "generation_config.json").write_text('{"temperature": 0.6, "do_sample": false}')
    model = pico_puzzle(*BLOCKS).to(torch.bfloat16)
    model.generation_config.max_new_tokens = 5
    save_checkpoint(model, child, parent)
    assert model.generation_config.max_new_tokens == 5
    shared = {name.name for name in child.iterdir() if (parent / name.name).exists()}
    copied = {name for name in shared if (child / name).read_bytes() == (parent / name).read_bytes()}
    assert copied == {*extra, "generation_config.json"}
    written = {"config.json", "model.safetensors", "configuration_puzzle.py", "modeling_puzzle.py"}
    assert {file.name for file in child.iterdir()} == copied | written
    for file in set(extra) - {"LICENSE.txt"}:
        (child / file).unlink()
    assert AutoModelForCausalLM.from_pretrained(child).dtype == torch.bfloat16
    assert json.loads((child / "config.json").read_text())["auto_map"]["AutoModelForCausalLM"]


@torch.no_grad()
@pytest.mark.parametrize(
    "rope",
    [
        {"rope_type": "default", "rope_theta": 1e4},
        {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0},
        YARN,
        {"rope_type": "longrope", "rope_theta": 1e4, "factor": 2.0, "original_max_position_embeddings": 8}
        | {"short_factor": [1.0] * 6, "long_factor": [1.5, 2.0, 2.5, 3.0, 3.5, 4.0]},
    ],
    ids=lambda rope: rope["rope_type"],
)
def test_a_model_made_without_memory_is_exact(rope: dict[str, object]) -> None:
    model = pico_puzzle(*BLOCKS, rope_parameters=rope, max_position_embeddings=16)
    made = empty_model(model.config)
    assert all(parameter.is_meta for parameter in made.parameters())
    state = {name: tensor for name, tensor in model.state_dict().items() if name != "lm_head.weight"}
    made.load_state_dict(state, strict=False, assign=True)
    finish(made, "cpu")
    expected, found = model.model.rotary_emb, made.model.rotary_emb
    assert found.attention_scaling == expected.attention_scaling
    assert torch.equal(found.inv_freq, expected.inv_freq)
    assert torch.equal(found.original_inv_freq, expected.original_inv_freq)
    for length in (9, 24, 9):
        assert torch.equal(made(random_tokens(2, length)).logits, model(random_tokens(2, length)).logits)
    assert made.lm_head.weight is made.model.embed_tokens.weight
    assert not any(module.training for module in made.modules())
    assert not any(parameter.requires_grad for parameter in made.parameters())


def test_further_chat_templates_come_along(tmp_path: Path) -> None:
    parent, child = tmp_path / "parent", tmp_path / "child"
    (parent / "additional_chat_templates").mkdir(parents=True)
    (parent / "additional_chat_templates" / "tool_use.jinja").write_text("tools")
    save_checkpoint(pico_puzzle("kv2+w16"), child, extra_files_from=parent)
    assert (child / "additional_chat_templates" / "tool_use.jinja").read_text() == "tools"


def test_what_save_pretrained_writes_loads_without_this_package(tmp_path: Path) -> None:
    """With the code of every kind."""
    model, tokens = pico_puzzle(*BLOCKS), random_tokens(2, 9)
    model.save_pretrained(tmp_path / "saved")
    torch.save(tokens, tmp_path / "tokens.pt")
    script = f"""
import sys, torch
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained({str(tmp_path / "saved")!r}, trust_remote_code=True)
torch.save(model(torch.load({str(tmp_path / "tokens.pt")!r})).logits, {str(tmp_path / "logits.pt")!r})
assert "puzzle" not in sys.modules
"""
    environment = os.environ | {"HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1"}
    subprocess.run([sys.executable, "-I", "-c", script], check=True, env=environment)
    torch.testing.assert_close(torch.load(tmp_path / "logits.pt"), model(tokens).logits)


def test_the_version_that_is_needed_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    code = Path(inspect.getfile(PuzzleConfig)).read_text()
    old = ModuleType("transformers")
    vars(old).update(__version__="4.57.1")
    monkeypatch.setitem(sys.modules, "transformers", old)
    with pytest.raises(ImportError, match=r"a Puzzle model requires transformers >= 5.19, found 4.57.1"):
        exec(compile(code, "configuration_puzzle.py", "exec"), {"__name__": "child"})


def test_a_tokenizer_that_older_versions_know(tmp_path: Path) -> None:
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "TokenizersBackend", "eos_token": "</s>"}')
    save_checkpoint(pico_puzzle("kv2+w16"), tmp_path / "child", tmp_path)
    found = json.loads((tmp_path / "child" / "tokenizer_config.json").read_text())
    assert found == {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "</s>"}
