"""Pico models made on the spot: one thread, float32, CPU."""

import json
import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import pytest
import torch
from hypothesis import HealthCheck, settings
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from torch.overrides import TorchFunctionMode
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from puzzle.artefacts import CostRow, CostTable, Scenario, ScoreRow, ScoreTable
from puzzle.data import TokenData
from puzzle.engines.environments import cache_folder
from puzzle.library import Library, Statistics
from puzzle.modeling import PuzzleConfig, PuzzleForCausalLM
from puzzle.parents import Parent
from puzzle.pipeline import Pipeline
from puzzle.recipe import Recipe
from puzzle.runs import Run, create_folder, open_run
from puzzle.variants import Architecture, BlockVariant, Space
from puzzle.variants.kinds.gated import GatedFFN

torch.set_num_threads(1)

# A busy machine is no error.
settings.register_profile("puzzle", settings(), deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("puzzle")

# Engines are looked for where the user has them; everything else that is kept for later goes nowhere near.
os.environ.setdefault("PUZZLE_ENGINES", str(cache_folder() / "engines"))


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


class Waits(TorchFunctionMode):
    """Counts what would wait for a GPU: values that Python asks for, and copies to the CPU."""

    _ASK = {"cpu", "item", "tolist", "numpy", "__bool__", "__int__", "__float__", "__index__"}

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += getattr(func, "__name__", "") in self._ASK
        return func(*args, **(kwargs or {}))


Model = TypeVar("Model", bound=torch.nn.Module)


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
    return randomise(LlamaForCausalLM(LlamaConfig(**(sizes | overrides))))


def pico_puzzle(*blocks: str, **overrides: object) -> PuzzleForCausalLM:
    """A random model of these blocks, such as `kv2+w16`, with the sizes of `pico_llama`."""
    fields = pico_llama(**overrides).config.to_dict()
    for not_carried in ("model_type", "architectures", "transformers_version"):
        del fields[not_carried]
    config = Architecture.parse(blocks).configure(PuzzleConfig(**fields))
    torch.manual_seed(1)
    return randomise(PuzzleForCausalLM(config))


def randomise(model: Model) -> Model:
    """Norms and biases, which start as ones and zeros, made to matter."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.3 * torch.randn_like(parameter))
    return model.eval()


def random_tokens(batch: int, length: int, seed: int = 0) -> Tensor:
    return torch.randint(1, 128, (batch, length), generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="session")
def pico_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved pico Llama without a tokenizer."""
    path = tmp_path_factory.mktemp("pico")
    pico_llama().save_pretrained(path)
    return path


EOS = "<eos>"


def save_byte_tokenizer(folder: Path, merges: int = 0) -> None:
    """A tokenizer of single bytes, an end of text, and merges of bytes."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=257 + merges, special_tokens=[EOS], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(["some text about some other text"], trainer)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=EOS).save_pretrained(folder)


def write_pico_text(path: Path) -> None:
    """Documents of numbers in words: regular enough to have something to learn from."""
    digits = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
    documents = (" ".join(digits[int(d)] for d in str(number**5)) + "." for number in range(400))
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in documents))


TASK_CHOICES = [" one two three.", " three two.", " zero nine."]
_METRICS = [{"metric": name, "aggregation": "mean", "higher_is_better": True} for name in ("acc", "acc_norm")]


def write_task(folder: Path, name: str, **changed: Any) -> Path:
    """Ten questions of three choices, of lm-eval in a yaml file that names its data relative to itself."""
    rows = [{"query": f"zero one {number}", "choices": TASK_CHOICES, "gold": number % 3} for number in range(10)]
    (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = {
        "task": name,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": f"{name}.jsonl"}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{query}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "gold",
        "target_delimiter": "",
        "metric_list": _METRICS,
        "metadata": {"version": 1},
    }
    path = folder / f"{name}.yaml"
    path.write_text(json.dumps(task | changed))  # JSON is YAML
    return path


@pytest.fixture(scope="session")
def pico_recipe(tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    """A whole recipe that takes seconds."""
    folder = tmp_path_factory.mktemp("pico_parent")
    pico_llama(vocab_size=257, intermediate_size=64).save_pretrained(folder / "parent")
    save_byte_tokenizer(folder / "parent")
    write_pico_text(folder / "text.jsonl")
    shares = dict.fromkeys(("calibration", "validation", "scoring", "test"), 0.1)
    return Recipe.model_validate(
        {
            "parent": str(folder / "parent"),
            "data": {"source": str(folder / "text.jsonl"), "sequence_length": 32, **shares},
            "precision": "float32",
            "calibration": {"tokens": 2048},
            "library": {"tokens": 4096, "batch_size": 8, "validation_tokens": 1024},
            "score": {"tokens": 512, "composed_share": None},
            "scenario": {"dtype": "float32", "batch_sizes": [2], "prompt_tokens": 16, "generated_tokens": 8},
            "cost": {"repeats": 1},
            "target": {"parameters": "70%"},
            "distil": {"tokens": 8192, "learning_rate": 2e-3, "validation_tokens": 512},
            "evaluate": {"tokens": 1024},
        }
    )


@pytest.fixture(scope="session")
def pico_run(tmp_path_factory: pytest.TempPathFactory, pico_recipe: Recipe) -> Iterator[Run]:
    """An opened run folder of that recipe; what tests compute in it is there for the tests after them."""
    folder = tmp_path_factory.mktemp("pico_run") / "run"
    create_folder(folder, pico_recipe)
    with open_run(folder) as run:
        yield run


@pytest.fixture(scope="session")
def pico_pipeline(pico_run: Run) -> Pipeline:
    return Pipeline(pico_run)


@pytest.fixture(scope="session")
def pico_parent(pico_pipeline: Pipeline) -> Parent:
    return pico_pipeline.parent


@pytest.fixture(scope="session")
def pico_space(pico_pipeline: Pipeline) -> Space:
    return pico_pipeline.space


@pytest.fixture(scope="session")
def pico_data(pico_pipeline: Pipeline) -> TokenData:
    return pico_pipeline.data


@pytest.fixture(scope="session")
def pico_statistics(pico_pipeline: Pipeline) -> Statistics:
    return pico_pipeline.statistics


@pytest.fixture(scope="session")
def pico_library(pico_pipeline: Pipeline) -> Library:
    return pico_pipeline.library


@pytest.fixture(scope="session")
def pico_scores(pico_pipeline: Pipeline) -> ScoreTable:
    return pico_pipeline.scores


@pytest.fixture
def toy_scores(pico_pipeline: Pipeline) -> ScoreTable:
    """More taken away is worse, attention twice as much as FFN."""

    def kl(block: BlockVariant) -> float:
        lost_heads = 1 - {"kv4": 1.0, "kv2": 0.5, "kv1": 0.25}.get(block.attention.name, 0.0)
        width = block.ffn.intermediate_size if isinstance(block.ffn, GatedFFN) else 0
        return 2 * lost_heads + (1 - width / 64)

    rows = [
        ScoreRow(
            layer=i, block=block.name, kl=kl(block), kl_se=0.0, lm_loss=1.0, top1_agreement=1.0, cosine=0.0, sequences=1
        )
        for i, layer in enumerate(pico_pipeline.space.layers)
        for block in layer.blocks()
    ]
    return ScoreTable(num_layers=4, sequences=1, sequence_length=1, rows=tuple(rows))


@pytest.fixture
def toy_costs(pico_pipeline: Pipeline) -> CostTable:
    """A decode step takes a microsecond a parameter."""
    config = pico_pipeline.parent.config
    rows = []
    for layer, layer_space in enumerate(pico_pipeline.space.layers):
        for variant in (*layer_space.attention, *layer_space.ffn):
            params = variant.num_params(config)
            sizes = {"params": params, "weight_bytes": 4 * params, "kv_bytes_per_sequence": 0}
            row = CostRow(
                layer=layer,
                part=variant.subblock,
                variant=variant.name,
                batch_size=2,
                prefill_ms=0.0,
                decode_ms=1e-3 * params,
                **sizes,
            )
            rows.append(row)
    fixed = replace(rows[0], layer=-1, part="fixed", variant="", params=0, decode_ms=1.0)
    scenario = Scenario(engine="torch", device="cpu", dtype="float32", prompt_tokens=16, generated_tokens=2)
    return CostTable(scenario=scenario, batch_sizes=(2,), rows=(fixed, *rows))


@pytest.fixture
def saves_every_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """Trainings save after every step, so that a kill can fall between any two."""
    monkeypatch.setattr("puzzle.training.steps_between_looks", lambda seconds: 1)
    monkeypatch.setattr("puzzle.distributed.state.SaveTimer.due", lambda timer: True)
