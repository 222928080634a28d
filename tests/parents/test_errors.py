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
INDEX = "model.safetensors.index.json"
Damage = Callable[[Path], object]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sound parent; beside it one in several files."""
    path = tmp_path_factory.mktemp("parents")
    pico_llama(tie_word_embeddings=False).save_pretrained(path / "whole")
    pico_llama().save_pretrained(path / "sharded", max_shard_size="20KB")
    return path


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    return shutil.copytree(saved / "whole", tmp_path / "copy")


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


def config(**changes: object) -> Damage:
    def change(folder: Path) -> None:
        file = folder / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | changes))

    return change


def weights(change: Callable[[dict[str, torch.Tensor]], object]) -> Damage:
    def save(folder: Path) -> None:
        tensors = {name: tensor.clone() for name, tensor in load_file(folder / "model.safetensors").items()}
        change(tensors)
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})

    return save


def text(name: str, content: str | None, without: str | None = None) -> Damage:
    """Write a file, or delete it; and delete another."""

    def write(folder: Path) -> None:
        (folder / name).unlink(missing_ok=True) if content is None else (folder / name).write_text(content)
        (folder / (without or "nothing")).unlink(missing_ok=True)

    return write


def truncated(size: int) -> Damage:
    return lambda folder: (folder / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:size])


def only_in_the_index(folder: Path) -> None:
    names = dict.fromkeys(load_file(folder / "model.safetensors"), "part.safetensors")
    weights(lambda tensors: tensors.pop(Q_PROJ))(folder)
    (folder / "model.safetensors").rename(folder / "part.safetensors")
    (folder / INDEX).write_text(json.dumps({"weight_map": names}))


WRONG_CONFIGS = [
    {"hidden_size": "large"},
    {"hidden_size": 30, "head_dim": None},
    {"num_attention_heads": 0},
    {"hidden_act": "no-such-activation"},
    {"rope_parameters": {"rope_type": "no-such-scaling", "rope_theta": 1e4}},
    {"rope_parameters": {"rope_type": "llama3"}},
    {"num_hidden_layers": -1},
]
BROKEN_INDICES = ["{", "[]", '{"weight_map": 3}', '{"weight_map": {"a": 3}}', "{}"]
DAMAGES: list[tuple[Damage, str]] = [
    (config(model_type="gpt2"), "model_type 'gpt2' is not supported: its layers are of no known form"),
    *((text("config.json", content), "config.json cannot be read") for content in ("", "{", "\x00", "\ufeff{}")),
    (text("config.json", '{"model_type": "llama", "model_type": "x"}'), "cannot be read (model_type is given twice)"),
    (text("config.json", None), "has no config.json; it holds weights alone (model.safetensors); get the whole"),
    (text("config.json", None, "model.safetensors"), "has no config.json; it holds no weights; get the whole"),
    *((text("config.json", content), "has no model_type; get the whole checkpoint") for content in ("[]", "null")),
    *((config(**changes), "config.json") for changes in WRONG_CONFIGS),
    (config(quantization_config={"quant_method": "fp8"}), "get a checkpoint that is not quantised"),
    (
        weights(lambda tensors: tensors.update({Q_PROJ: tensors[Q_PROJ].to(torch.float8_e4m3fn)})),
        f"{Q_PROJ} is stored as F8_E4M3; get a checkpoint that is not quantised",
    ),
    *((truncated(size), "model.safetensors is truncated or damaged") for size in (0, 5, 400, 20_000)),
    *((text(INDEX, index, "model.safetensors"), f"{INDEX} cannot be read") for index in BROKEN_INDICES),
    (weights(lambda tensors: tensors.pop(Q_PROJ)), f"lacks the tensor {Q_PROJ}; get the whole checkpoint"),
    (only_in_the_index, f"lacks the tensor {Q_PROJ}"),
    (config(num_key_value_heads=3), "asks for 4 attention heads on 3 KV heads, no divisor"),
    (weights(lambda tensors: tensors.update({"model.layers.9.mlp.up_proj.weight": torch.ones(2)})), "stores 1 tensors"),
    (text("adapter_config.json", "{}"), "holds an adapter beside the weights (adapter_config.json); merge it, or take"),
    (text("adapter_model.safetensors", ""), "holds an adapter beside the weights (adapter_model.safetensors)"),
    (text("model.safetensors", "version https://git-lfs.github.com/spec/v1\n"), "is a pointer of Git LFS; `git lfs"),
    (
        weights(lambda tensors: tensors.update(q_proj=tensors.pop(Q_PROJ))),
        f"lacks the tensor {Q_PROJ}; get the whole checkpoint; it also stores 1 tensors that its config.json does not",
    ),
    *(
        (text(name, "", "model.safetensors"), message)
        for name, message in {
            "adapter_model.safetensors": "holds an adapter without its model (adapter_model.safetensors); merge",
            "consolidated.safetensors": "holds weights of another name (consolidated.safetensors); convert",
            "consolidated.00.pth": "holds pickled weights (consolidated.00.pth), which are not read; convert them",
            "pytorch_model.bin.index.json": "holds no weights; get the whole checkpoint",
            "optimizer.pt": "holds no weights; get the whole checkpoint",
            "model.Q8_0.gguf": "holds a GGUF file; give that, model.Q8_0.gguf",
            "tf_model.h5": "holds weights of another framework (tf_model.h5)",
        }.items()
    ),
    (
        lambda folder: (
            ((folder / "model.safetensors").rename(folder / "x") and (folder / "x").unlink())
            or (folder / "model.safetensors").symlink_to("gone")
        ),
        "holds model.safetensors, a link to nothing",
    ),
    (text("model-00001-of-00002.safetensors", "", "model.safetensors"), "holds shards, but no"),
    (text("other.json", "", "model.safetensors"), "holds no weights; get the whole checkpoint"),
    (config(intermediate_size=40), "has shape [48, 32], its config.json asks for [40, 32]"),
]


@pytest.mark.parametrize(("damage", "message"), DAMAGES)
@pytest.mark.filterwarnings("ignore")  # transformers says more than one thing about some configurations
def test_a_parent_that_is_wrong(folder: Path, damage: Damage, message: str) -> None:
    damage(folder)
    assert message in refusal(folder)


@pytest.mark.parametrize("source", ["/no/such/folder", "./nowhere", "runs/nowhere/parent", __file__])
def test_no_folder(source: str) -> None:
    assert f"{source} is not a folder; give one of" in refusal(source)


def test_what_the_hub_does_not_give() -> None:
    assert "not a model! is neither a folder nor a model that the hub gives" in refusal("not a model!")


def test_nothing_in_a_parent_is_run(folder: Path, tmp_path: Path) -> None:
    """Neither its code nor a pickle."""

    class Trap:
        def __reduce__(self) -> tuple[object, ...]:
            return (Path.touch, (tmp_path / "sprung",))

    config(auto_map={"AutoConfig": "trap.TrapConfig", "AutoModelForCausalLM": "trap.Trap"})(folder)
    (folder / "trap.py").write_text(f"open({str(tmp_path / 'sprung')!r}, 'w')\n")
    parent = open_parent(str(folder))
    parent.load()
    assert "auto_map" not in parent.config.to_dict()
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Trap()))
    assert "holds pickled weights (pytorch_model.bin), which are not read; convert them to safetensors" in refusal(
        folder
    )
    assert not (tmp_path / "sprung").exists()


def test_a_missing_shard(saved: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(saved / "sharded", tmp_path / "copy")
    shard = sorted(folder.glob("model-*.safetensors"))[1]
    shard.unlink()
    assert f"{shard.name} is missing, though the checkpoint's index names it" in refusal(folder)


@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
def test_weights_that_are_not_finite(folder: Path, value: float) -> None:
    weights(lambda tensors: tensors[Q_PROJ][3, 4].fill_(value))(folder)
    assert f"model.safetensors has NaN or infinity in {Q_PROJ}; get a sound" in refusal(folder, load=True)
    parent = open_parent(str(folder))
    parent.layer_state(0)
    with pytest.raises(PuzzleError, match="NaN or infinity"):
        parent.layer_state(1)


@pytest.mark.parametrize("content", [None, "{", '{"version": "1.0"}'])
def test_an_unusable_tokenizer(folder: Path, content: str | None) -> None:
    text("tokenizer.json", content)(folder)
    with pytest.raises(PuzzleError, match="has no usable tokenizer") as caught:
        open_parent(str(folder)).tokenizer()
    assert "\n" not in str(caught.value)


def test_broken_generation_defaults(folder: Path) -> None:
    (folder / "generation_config.json").write_text("{")
    assert "generation_config.json cannot be read" in refusal(folder, load=True)


def test_of_a_tensor_in_two_shards_the_index_says_which(saved: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(saved / "sharded", tmp_path / "copy")
    index = json.loads((folder / INDEX).read_text())["weight_map"]
    expected = dict(open_parent(str(folder)).tensors())
    other = next(name for name in sorted(index.values(), reverse=True) if name != index[Q_PROJ])
    tensors = load_file(folder / other)
    save_file(tensors | {Q_PROJ: torch.zeros_like(expected[Q_PROJ])}, folder / other, metadata={"format": "pt"})
    assert torch.equal(dict(open_parent(str(folder)).tensors())[Q_PROJ], expected[Q_PROJ])


def test_a_checkpoint_in_a_folder_of_a_training(saved: Path, tmp_path: Path) -> None:
    shutil.copytree(saved / "whole", tmp_path / "training" / "checkpoint-500")
    (tmp_path / "training" / "training_args.bin").touch()
    expected = (
        "has no config.json; it holds a checkpoint in a folder of its own; give that (checkpoint-500/config.json)"
    )
    assert expected in refusal(tmp_path / "training")
