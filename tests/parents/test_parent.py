"""Reading a parent: whole, by layer, by what belongs to no layer; its address; a child as a parent."""

from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.conftest import pico_llama, pico_puzzle, random_tokens, save_byte_tokenizer
from transformers import AutoTokenizer, LlamaForCausalLM

from puzzle.errors import PuzzleError
from puzzle.export import export_gguf
from puzzle.modeling import save_checkpoint
from puzzle.parents import Parent, open_parent
from puzzle.runs import remembered
from puzzle.variants import Architecture, ParentSubblock, derive_space, split_state

BLOCKS = ("none+w16", "kv1+none", "linear+linear", "kv4+w48", "none+none")


@pytest.fixture(scope="module")
def parent(tmp_path_factory: pytest.TempPathFactory) -> Parent:
    path = tmp_path_factory.mktemp("sharded")
    pico_llama(tie_word_embeddings=False, attention_bias=True).to(torch.bfloat16).save_pretrained(
        path, max_shard_size="20KB"
    )
    return open_parent(str(path))


@pytest.fixture(scope="module")
def original(parent: Parent) -> dict[str, torch.Tensor]:
    return LlamaForCausalLM.from_pretrained(parent.path, dtype=torch.float32).state_dict()


def test_it_is_read_whole_and_in_parts(parent: Parent, original: dict[str, torch.Tensor]) -> None:
    """Whole, by layer, and what belongs to no layer; in float32, and as it is stored."""
    found = parent.embeddings_and_head()
    assert set(found) == {"model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"}
    for layer in range(4):
        state = parent.layer_state(layer)
        assert len(state) == 13
        found |= {f"model.layers.{layer}.{name}": tensor for name, tensor in state.items()}
    for state in (found, parent.load().state_dict()):
        assert state.keys() == original.keys()
        assert all(
            torch.equal(state[name], tensor) and state[name].dtype == torch.float32 for name, tensor in original.items()
        )
    stored = list(parent.tensors())
    assert sorted(name for name, _ in stored) == sorted(original)
    assert {tensor.dtype for _, tensor in stored} == {torch.bfloat16}
    assert parent.num_params == sum(tensor.numel() for tensor in original.values())
    # Subblocks built from the configuration take the masks of the model: both must name the same implementation.
    assert parent.config._attn_implementation == parent.load().config._attn_implementation == "sdpa"


def test_a_layers_number_is_not_the_beginning_of_another(tmp_path: Path) -> None:
    model = pico_llama(num_hidden_layers=12)
    model.save_pretrained(tmp_path)
    found = open_parent(str(tmp_path)).layer_state(1)
    assert found.keys() == model.model.layers[1].state_dict().keys()


def test_a_tied_head_is_read_and_counted_once(tmp_path: Path) -> None:
    pico_llama().save_pretrained(tmp_path)
    parent = open_parent(str(tmp_path))
    assert set(parent.embeddings_and_head()) == {"model.embed_tokens.weight", "model.norm.weight"}
    assert parent.num_params == pico_llama().num_parameters()


def test_the_address_is_that_of_the_content(tmp_path: Path) -> None:
    folders = [tmp_path / name for name in ("first", "copy", "other weights", "other config")]
    for folder in folders:
        pico_llama(rms_norm_eps=1e-5 if folder.name == "other config" else 1e-6).save_pretrained(folder)
    model = pico_llama()
    model.model.norm.weight.data[0] += 1
    model.save_pretrained(folders[2])
    addresses = [open_parent(str(folder)).address for folder in folders]
    assert addresses[0] == addresses[1]
    assert len(set(addresses)) == 3


def test_hashes_are_remembered_until_a_file_changes(tmp_path: Path) -> None:
    """Whoever rewrites the remembered hash is believed: it was not computed again."""
    pico_llama().save_pretrained(tmp_path / "parent")
    digests = tmp_path / "digests.json"
    first = open_parent(str(tmp_path / "parent"), digests).address
    assert open_parent(str(tmp_path / "parent"), digests).address == first
    with remembered(digests) as known:
        known |= dict.fromkeys([*known, "one more"], "other")
    assert open_parent(str(tmp_path / "parent"), digests).address != first
    pico_llama().save_pretrained(tmp_path / "parent")
    assert open_parent(str(tmp_path / "parent"), digests).address == first


@torch.no_grad()
def test_a_child_can_be_the_next_parent(tmp_path: Path) -> None:
    """Everything works on a parent whose layers differ."""
    model = pico_puzzle(*BLOCKS)
    save_checkpoint(model, tmp_path, None)
    parent = open_parent(str(tmp_path))
    assert torch.equal(parent.load()(random_tokens(2, 9)).logits, model(random_tokens(2, 9)).logits)
    assert [block.name for block in parent.architecture.blocks] == list(BLOCKS)
    assert parent.num_params == model.num_parameters()
    assert parent.layer_state(4) == {}
    space = derive_space(parent.config)
    for layer, own in enumerate(parent.architecture.blocks):
        assert space.layers[layer].parent == own
        for variant in (own.attention, own.ffn):
            state = split_state(parent.layer_state(layer), variant.subblock, parent.config)
            assert variant.num_params(parent.config) == sum(tensor.numel() for tensor in state.values())
            subblock = ParentSubblock(config=parent.config, variant=variant, state=state, statistics={})
            assert variant.initialise(subblock).keys() == state.keys()
    smaller = Architecture((space.layers[3].blocks()[-1], *parent.architecture.blocks[1:]))
    assert smaller.configure(parent.config).num_hidden_layers == 2


@torch.no_grad()
@pytest.mark.parametrize("prefix", ["", "model."])
def test_tied_weights_under_other_names(tmp_path: Path, prefix: str) -> None:
    """As the head alone, or as the base class saves them: transformers reads both."""
    model = pico_llama(tie_word_embeddings=True)
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    if prefix:
        tensors["lm_head.weight"] = tensors.pop("model.embed_tokens.weight")
    else:
        tensors = {name.removeprefix("model."): tensor for name, tensor in tensors.items()}
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    tokens_BT = random_tokens(1, 9)
    assert torch.equal(open_parent(str(tmp_path)).load()(tokens_BT).logits, model(tokens_BT).logits)


def save_gguf(folder: Path, dtype: Any, **changed: Any) -> tuple[Path, LlamaForCausalLM]:
    """A Llama as `model.gguf` in a folder with its tokenizer: the child of its own blocks that is exported, renamed."""
    model = pico_llama(vocab_size=265, hidden_size=64, head_dim=16, intermediate_size=96)
    model.save_pretrained(folder)
    save_byte_tokenizer(folder, merges=8)
    reader = gguf.GGUFReader(export_gguf(folder, folder / "deci.gguf", dtype=dtype))
    writer = gguf.GGUFWriter(folder / "model.gguf", changed.pop("general.architecture", "llama"))
    for name, field in reader.fields.items():
        if not name.startswith(("GGUF.", "general.architecture", *changed)):
            kinds = field.types
            writer.add_key_value(name.replace("deci.", "llama."), field.contents(), kinds[0], sub_type=kinds[-1])
    for name, value in changed.items():
        (writer.add_string if isinstance(value, str) else writer.add_float32)(name, value)
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return folder / "model.gguf", model


def test_a_gguf_file_is_read_back_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file, original = save_gguf(tmp_path, "f32")
    parent = open_parent(str(file))
    tokens = torch.arange(24).view(2, 12)
    with torch.no_grad():
        assert float((parent.load()(tokens).logits - original(tokens).logits).abs().max()) < 1e-4
    text = "some text about\n  three 45"
    assert len(AutoTokenizer.from_pretrained(tmp_path)(text)["input_ids"]) < len(text) - 4
    assert parent.tokenizer()(text)["input_ids"] == AutoTokenizer.from_pretrained(tmp_path)(text)["input_ids"]
    assert (parent.path / "gguf.txt").read_text().startswith("parent: model.gguf (tensors: ")
    monkeypatch.setattr("transformers.modeling_gguf_pytorch_utils.load_gguf_checkpoint", None)
    assert open_parent(str(file)).address == parent.address


def test_quantised_gguf_is_read_to_bfloat16(tmp_path: Path) -> None:
    file, original = save_gguf(tmp_path, "q8_0")
    parent = open_parent(str(file))
    assert {entry.dtype for entry in parent.checkpoint.entries.values()} == {"BF16"}
    assert "Q8_0" in (parent.path / "gguf.txt").read_text()
    weights, name = dict(parent.tensors()), "model.layers.1.mlp.gate_proj.weight"
    expected = original.get_parameter(name).detach()
    assert float((weights[name] - expected).abs().max() / expected.abs().max()) < 1e-2


@pytest.mark.parametrize(
    ("split", "pieces"),
    [("smollm", ["a", "ĠĠ", "1", "2"]), ("gpt-2", ["a", "Ġ", "Ġ12"]), ("qwen2", ["a", "Ġ", "Ġ", "1", "2"])],
)
def test_a_gguf_files_text_is_split_as_it_says(tmp_path: Path, split: str, pieces: list[str]) -> None:
    file, _ = save_gguf(tmp_path, "f32", **{"tokenizer.ggml.pre": split})
    backend = open_parent(str(file)).tokenizer().backend_tokenizer
    assert [piece for piece, _ in backend.pre_tokenizer.pre_tokenize_str("a  12")] == pieces


@pytest.mark.parametrize("change", ["garbage", "rope", "architecture", "split"])
def test_a_gguf_file_that_would_be_read_wrongly_is_refused(tmp_path: Path, change: str) -> None:
    changed = {"rope": {"llama.rope.scaling.factor": 8.0}, "architecture": {"general.architecture": "mamba9"}}
    changed["split"] = {"tokenizer.ggml.pre": "by-the-moon"}
    file, _ = save_gguf(tmp_path, "f32", **changed.get(change, {}))
    if change == "garbage":
        file.write_bytes(b"GGUF" + bytes(100))
    with pytest.raises(
        PuzzleError, match=r"parent: .*model\.gguf cannot be read back by transformers .*; give the chec"
    ):
        open_parent(str(file))
