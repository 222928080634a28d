"""What can be wrong with a parent ends in one line that says what was found and what to do."""

import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.conftest import pico_llama

from puzzle.errors import PuzzleError
from puzzle.parents import open_parent

Q_PROJ = "model.layers.1.self_attn.q_proj.weight"


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("parent")
    pico_llama(tie_word_embeddings=False).save_pretrained(path)
    return path


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    return shutil.copytree(saved, tmp_path / "copy")


def refusal(source: Path | str, *, load: bool = False) -> str:
    """The message of the error, which is one line."""
    with pytest.raises(PuzzleError) as caught:  # noqa: PT012
        parent = open_parent(str(source))
        if load:
            parent.load()
    message = str(caught.value)
    assert "\n" not in message
    assert message.startswith("parent: ")
    return message


def edit_config(folder: Path, **changes: object) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def edit_weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    weights = {name: tensor.clone() for name, tensor in load_file(folder / "model.safetensors").items()}
    change(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def test_an_unknown_family_names_the_supported_ones(folder: Path) -> None:
    edit_config(folder, model_type="mamba2")
    assert refusal(folder) == "parent: model_type 'mamba2' is not supported; use one of llama, puzzle"


@pytest.mark.parametrize("source", ["/no/such/folder", "./nowhere", "runs/nowhere/parent", __file__])
def test_no_folder(source: str) -> None:
    assert f"{source} is not a folder; give one of" in refusal(source)


@pytest.mark.parametrize("name", ["nobody/nothing", "not a model!"])
def test_what_the_hub_does_not_give(name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    assert f"{name} is neither a folder nor a model that the hub gives" in refusal(name)


@pytest.mark.parametrize("text", [None, "", "{", "[]", "null", "\x00"])
def test_a_broken_config(folder: Path, text: str | None) -> None:
    (folder / "config.json").unlink() if text is None else (folder / "config.json").write_text(text)
    message = refusal(folder)
    assert "config.json cannot be read" in message or "model_type None is not supported" in message


@pytest.mark.parametrize(
    "changes",
    [
        {"hidden_size": "large"},
        {"hidden_size": 30, "head_dim": None},
        {"num_attention_heads": 0},
        {"hidden_act": "no-such-activation"},
        {"rope_parameters": {"rope_type": "no-such-scaling", "rope_theta": 1e4}},
        {"rope_parameters": {"rope_type": "llama3"}},
        {"num_hidden_layers": -1},
    ],
    ids=str,
)
@pytest.mark.filterwarnings("ignore")  # transformers says more than one thing about some of these
def test_a_config_that_describes_no_model(folder: Path, changes: dict[str, object]) -> None:
    edit_config(folder, **changes)
    assert "config.json" in refusal(folder)


def test_a_quantised_parent(folder: Path) -> None:
    edit_weights(folder, lambda weights: weights.update({Q_PROJ: weights[Q_PROJ].to(torch.float8_e4m3fn)}))
    assert f"{Q_PROJ} is stored as F8_E4M3; get a checkpoint that is not quantised" in refusal(folder)
    edit_config(folder, quantization_config={"quant_method": "fp8"})
    assert "config.json has a quantization_config; get a checkpoint that is not quantised" in refusal(folder)


def test_pickled_weights_are_not_opened(folder: Path, tmp_path: Path) -> None:
    class Trap:
        def __reduce__(self) -> tuple[object, ...]:
            return (Path.touch, (tmp_path / "sprung",))

    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Trap()))
    assert "has no model.safetensors; pickled weights are not read, convert them" in refusal(folder)
    assert not (tmp_path / "sprung").exists()


def test_code_in_a_parent_is_not_run(folder: Path, tmp_path: Path) -> None:
    edit_config(folder, auto_map={"AutoConfig": "trap.TrapConfig", "AutoModelForCausalLM": "trap.Trap"})
    (folder / "trap.py").write_text(f"open({str(tmp_path / 'sprung')!r}, 'w')\n")
    parent = open_parent(str(folder))
    parent.load()
    assert not (tmp_path / "sprung").exists()
    assert "auto_map" not in parent.config.to_dict()


@pytest.mark.parametrize("size", [0, 5, 400, 20_000])
def test_a_truncated_file(folder: Path, size: int) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:size])
    assert "model.safetensors is truncated or damaged" in refusal(folder)


def test_a_missing_shard(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    pico_llama().save_pretrained(folder, max_shard_size="20KB")
    shard = sorted(folder.glob("model-*.safetensors"))[1]
    shard.unlink()
    assert f"{shard.name} is missing, though the checkpoint's index names it" in refusal(folder)


@pytest.mark.parametrize("text", ["{", "[]", '{"weight_map": 3}', '{"weight_map": {"a": 3}}', "{}"])
def test_a_broken_index(folder: Path, text: str) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(text)
    assert "model.safetensors.index.json cannot be read" in refusal(folder)


def test_a_missing_tensor(folder: Path) -> None:
    edit_weights(folder, lambda weights: weights.pop(Q_PROJ))
    assert f"lacks the tensor {Q_PROJ}; get the whole checkpoint" in refusal(folder)


def test_a_tensor_that_only_the_index_knows(folder: Path) -> None:
    names = [*load_file(folder / "model.safetensors")]
    edit_weights(folder, lambda weights: weights.pop(Q_PROJ))
    (folder / "model.safetensors").rename(folder / "part.safetensors")
    index = {"weight_map": dict.fromkeys(names, "part.safetensors")}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert f"lacks the tensor {Q_PROJ}" in refusal(folder)


def test_a_wrong_shape(folder: Path) -> None:
    edit_config(folder, intermediate_size=40)
    assert "has shape [48, 32], its config.json asks for [40, 32]" in refusal(folder)


@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
def test_weights_that_are_not_finite(folder: Path, value: float) -> None:
    edit_weights(folder, lambda weights: weights[Q_PROJ][3, 4].fill_(value))
    message = refusal(folder, load=True)
    assert f"model.safetensors has NaN or infinity in {Q_PROJ}; get a sound checkpoint" in message
    parent = open_parent(str(folder))
    parent.layer_state(0)
    with pytest.raises(PuzzleError, match="NaN or infinity"):
        parent.layer_state(1)


@pytest.mark.parametrize("text", [None, "{", '{"version": "1.0"}'])
def test_an_unusable_tokenizer(folder: Path, text: str | None) -> None:
    if text is not None:
        (folder / "tokenizer.json").write_text(text)
    with pytest.raises(PuzzleError, match="has no usable tokenizer") as caught:
        open_parent(str(folder)).tokenizer()
    assert "\n" not in str(caught.value)


def test_broken_generation_defaults(folder: Path) -> None:
    (folder / "generation_config.json").write_text("{")
    assert "generation_config.json cannot be read" in refusal(folder, load=True)
