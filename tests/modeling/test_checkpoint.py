"""Checkpoints: loaded by this package, and by transformers alone; models made without memory."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.conftest import pico_puzzle, random_tokens
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from puzzle.modeling import PuzzleForCausalLM, empty_model, finish, save_checkpoint
from puzzle.parents import open_parent

BLOCKS = ("none+w16", "kv1+none", "linear+linear", "kv4win4s1+w48", "kv2win5+rank3", "none+none")
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 32}

_IN_A_FRESH_PROCESS = """
import sys
sys.modules["puzzle"] = None  # an import of the package would raise
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM
folder = sys.argv[1]
inputs = load_file(folder + "/inputs.st")["tokens"]
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
assert model.is_remote_code() and type(model).__module__.startswith("transformers_modules."), type(model)
assert AutoConfig.from_pretrained(folder, trust_remote_code=True).blocks == model.config.blocks
base = AutoModel.from_pretrained(folder, trust_remote_code=True)
text = model.generate(inputs, do_sample=False, max_new_tokens=4, pad_token_id=0)
model.set_attn_implementation("eager")
assert model.config._attn_implementation == "eager"
model.set_attn_implementation("sdpa")
logits = model(inputs).logits.detach()
hidden = base(inputs).last_hidden_state.detach()
model.save_pretrained(folder + "/again")
save_file({"logits": logits, "text": text, "hidden": hidden}, folder + "/outputs.st")
"""


@torch.no_grad()
def test_a_large_one_lies_in_several_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("puzzle.modeling.checkpoint.MAX_SHARD_BYTES", 30_000)
    model = pico_puzzle(*BLOCKS)
    save_checkpoint(model, tmp_path, None)
    files = list(tmp_path.glob("*.safetensors"))
    assert len(files) > 2
    assert all(file.stat().st_size < 35_000 for file in files)
    tokens_BT = random_tokens(2, 9)
    expected = model(tokens_BT).logits
    assert torch.equal(AutoModelForCausalLM.from_pretrained(tmp_path)(tokens_BT).logits, expected)
    assert torch.equal(open_parent(str(tmp_path)).load()(tokens_BT).logits, expected)


@torch.no_grad()
def test_it_loads_where_this_package_is_not_installed(tmp_path: Path) -> None:
    model = pico_puzzle(*BLOCKS, rope_parameters=YARN)
    save_checkpoint(model, tmp_path, None)
    assert_the_same_elsewhere(model, tmp_path)
    assert (tmp_path / "again" / "modeling_puzzle.py").exists()


def assert_the_same_elsewhere(model: PuzzleForCausalLM, checkpoint: Path) -> None:
    """A process that cannot import this package loads the checkpoint of `model` and computes the same."""
    tokens_BT = random_tokens(2, 9)
    save_file({"tokens": tokens_BT}, checkpoint / "inputs.st")
    environment = os.environ | {"HF_MODULES_CACHE": str(checkpoint / "modules"), "OMP_NUM_THREADS": "1"}
    process = subprocess.run(
        [sys.executable, "-W", "error::FutureWarning", "-c", _IN_A_FRESH_PROCESS, str(checkpoint)],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert process.returncode == 0, process.stderr
    found = load_file(checkpoint / "outputs.st")
    torch.testing.assert_close(found["logits"], model(tokens_BT).logits, rtol=0, atol=1e-6)
    torch.testing.assert_close(found["hidden"], model.model(tokens_BT).last_hidden_state, rtol=0, atol=1e-6)
    assert torch.equal(found["text"], model.generate(tokens_BT, do_sample=False, max_new_tokens=4, pad_token_id=0))


@torch.no_grad()
@pytest.mark.parametrize("tied", [True, False])
def test_it_loads_with_this_package_and_no_flag(tied: bool, tmp_path: Path) -> None:
    model = pico_puzzle(*BLOCKS, tie_word_embeddings=tied, rope_parameters=YARN)
    save_checkpoint(model, tmp_path, None)
    found = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(found) is PuzzleForCausalLM
    assert torch.equal(found(random_tokens(2, 9)).logits, model(random_tokens(2, 9)).logits)
    assert AutoConfig.from_pretrained(tmp_path).blocks == model.config.blocks
    base = AutoModel.from_pretrained(tmp_path)
    assert torch.equal(base(random_tokens(2, 9))[0], model.model(random_tokens(2, 9))[0])


def test_the_dtype_is_kept(tmp_path: Path) -> None:
    save_checkpoint(pico_puzzle(*BLOCKS).to(torch.bfloat16), tmp_path, None)
    assert AutoModelForCausalLM.from_pretrained(tmp_path).dtype == torch.bfloat16


def test_what_belongs_to_the_parent_comes_along(tmp_path: Path) -> None:
    """Byte for byte, and nothing else: not its weights, nor its configuration."""
    parent = tmp_path / "parent"
    parent.mkdir()
    extra = ["tokenizer.json", "tokenizer_config.json", "tokenizer.model", "special_tokens_map.json", "vocab.json"]
    extra += ["merges.txt", "chat_template.jinja", "generation_config.json", "LICENSE.txt", "added_tokens.json"]
    for name in [*extra, "config.json", "model.safetensors", "README.md", "pytorch_model.bin", "train.py"]:
        (parent / name).write_text(f"the parent's {name}")
    child = tmp_path / "child"
    save_checkpoint(pico_puzzle(*BLOCKS), child, parent)
    copied = {file.name for file in child.iterdir() if file.read_bytes() == (f"the parent's {file.name}").encode()}
    assert copied == set(extra)
    written = {"config.json", "model.safetensors", "configuration_puzzle.py", "modeling_puzzle.py"}
    assert {file.name for file in child.iterdir()} == copied | written


def test_generation_defaults_that_contradict_themselves(tmp_path: Path) -> None:
    """Published parents have such: a temperature, but no sampling. transformers does not write them; they travel on."""
    (tmp_path / "parent").mkdir()
    defaults = {"temperature": 0.6, "top_p": 0.9, "do_sample": False}
    (tmp_path / "parent" / "generation_config.json").write_text(json.dumps(defaults))
    save_checkpoint(pico_puzzle(*BLOCKS), tmp_path / "child", tmp_path / "parent")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "child")
    model.generation_config.max_new_tokens = 5
    save_checkpoint(model, tmp_path / "distilled", tmp_path / "parent")
    assert json.loads((tmp_path / "distilled" / "generation_config.json").read_text()) == defaults
    assert model.generation_config.max_new_tokens == 5


def test_saving_changes_nothing_in_memory(tmp_path: Path) -> None:
    model = pico_puzzle(*BLOCKS)
    before = model.config.to_dict()
    save_checkpoint(model, tmp_path, None)
    assert "auto_map" not in model.config.to_dict()
    assert model.config.to_dict() | {"architectures": None, "dtype": None} == before | {
        "architectures": None,
        "dtype": None,
    }
    assert json.loads((tmp_path / "config.json").read_text())["auto_map"]["AutoModelForCausalLM"]


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
    made.load_state_dict(model.state_dict(), assign=True)
    finish(made, "cpu")
    expected, found = model.model.rotary_emb, made.model.rotary_emb
    assert found.attention_scaling == expected.attention_scaling
    assert torch.equal(found.inv_freq, expected.inv_freq)
    assert torch.equal(found.original_inv_freq, expected.original_inv_freq)
    for length in (9, 24, 9):
        assert torch.equal(made(random_tokens(2, length)).logits, model(random_tokens(2, length)).logits)


def test_finishing_ties_and_freezes() -> None:
    model = pico_puzzle(*BLOCKS)
    made = empty_model(model.config)
    state = {name: tensor for name, tensor in model.state_dict().items() if name != "lm_head.weight"}
    made.load_state_dict(state, strict=False, assign=True)
    finish(made, "cpu")
    assert made.lm_head.weight is made.model.embed_tokens.weight
    assert not made.training
    assert not any(parameter.requires_grad for parameter in made.parameters())


def test_finishing_without_all_weights_fails() -> None:
    made = empty_model(pico_puzzle(*BLOCKS).config)
    with pytest.raises(AssertionError, match=r"no weights were given for model\.embed_tokens\.weight"):
        finish(made, "cpu")
