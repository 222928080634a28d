"""A pico parent with a byte-level tokenizer, and texts to read with it."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from puzzle.data import TokenData, prepare_data
from puzzle.parents import Parent, open_parent
from puzzle.recipe import DataSettings, Recipe
from puzzle.runs import create_folder, open_run

BOS, EOS = "<bos>", "<eos>"
CHAT_TEMPLATE = "<bos>{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}{% endfor %}"


@pytest.fixture(scope="session")
def parent(tmp_path_factory: pytest.TempPathFactory) -> Parent:
    """A tiny Llama whose tokenizer is a byte-level BPE of every byte and a few merges: any text comes back."""
    path = tmp_path_factory.mktemp("parent")
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    LlamaForCausalLM(LlamaConfig(vocab_size=300, **sizes)).save_pretrained(path)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=[EOS, BOS], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(["the cat sat on the mat and the dog sat on the log"] * 4, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[(BOS, 1)])
    special = {"bos_token": BOS, "eos_token": EOS, "chat_template": CHAT_TEMPLATE}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(path)
    return open_parent(str(path))


TEXTS = [f"document {number}: the cat sat on mat {number * 7919}. " * (1 + number % 5) for number in range(60)]


@pytest.fixture
def write_rows(tmp_path: Path) -> Callable[[str, list[object]], Path]:
    """Write a jsonl file."""

    def write_rows(name: str, rows: list[object]) -> Path:
        path = tmp_path / name
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return path

    return write_rows


@pytest.fixture
def corpus(write_rows: Callable[[str, list[object]], Path]) -> Path:
    """60 different documents as jsonl."""
    return write_rows("corpus.jsonl", [{"text": text} for text in TEXTS])


@pytest.fixture
def prepare(tmp_path: Path, parent: Parent) -> Callable[..., TokenData]:
    """The stage on a source; by default short sequences and large enough shares for a small corpus."""

    def prepare(source: object, *, run: str = "run", parent: Parent = parent, **settings: object) -> TokenData:
        names = [*map(str, source)] if isinstance(source, list) else str(source)
        shares = dict.fromkeys(("calibration", "validation", "scoring", "test"), 0.15)
        data = DataSettings.model_validate({"source": names, "sequence_length": 16, **shares, **settings})
        create_folder(tmp_path / run, Recipe(parent="unused", data=data))
        with open_run(tmp_path / run) as opened:
            return prepare_data(opened, parent)

    return prepare


@pytest.fixture
def texts(parent: Parent) -> Callable[[TokenData, str], list[str]]:
    """A range's documents as text; the last one may lack its end."""
    tokenizer = parent.tokenizer()

    def texts(data: TokenData, name: str) -> list[str]:
        tokens = data.sequences(name, slice(None)).flatten().tolist()
        return [text.removeprefix(BOS) for text in tokenizer.decode(tokens).removesuffix(EOS).split(EOS)]

    return texts
