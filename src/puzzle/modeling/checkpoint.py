"""Models made without memory first, and checkpoints that also load where this package is not installed."""

import copy
import inspect
import os
import shutil
import textwrap
from pathlib import Path

import torch
from transformers import GenerationConfig

from puzzle.modeling.configuration_puzzle import PuzzleConfig
from puzzle.modeling.modeling_puzzle import MODULES, PuzzleForCausalLM, family_without_layers

TOKENIZER_FILES = (
    *("tokenizer*", "special_tokens_map.json", "added_tokens.json", "chat_template*", "additional_chat_templates/*"),
    *("vocab*", "merges.txt", "*.model", "*.tiktoken"),
)
# The parent's terms hold for the child's weights.
_EXTRA_FILES = (*TOKENIZER_FILES, "generation_config.json", "LICENSE*", "NOTICE*")


def empty_model(config: PuzzleConfig) -> PuzzleForCausalLM:
    """The model without memory, on `meta`: give it weights by `load_state_dict(..., assign=True)`, then `finish` it."""
    with torch.device("meta"):
        return PuzzleForCausalLM(config)


def finish(model: PuzzleForCausalLM, device: torch.device | str) -> PuzzleForCausalLM:
    """Make a model that was built without memory and given its weights ready for inference on `device`.

    Ties what is tied and makes the buffers that no checkpoint holds, such as rotary frequencies: in float32 whatever
    the weights' dtype, by the family's own constructors, so that any scaling starts as in a model built with memory.
    """
    model.tie_weights()
    made = family_without_layers(model.config, vocab_size=1, pad_token_id=None)
    model.model.rotary_emb = made.rotary_emb.to(device)
    for name, buffer in made.embed_tokens.named_buffers():
        model.model.embed_tokens.register_buffer(name, buffer.to(device), persistent=False)
    return model.eval().requires_grad_(False)


def save_checkpoint(model: PuzzleForCausalLM, path: Path, extra_files_from: Path | None) -> None:
    """Write a Hugging Face checkpoint that loads after `import puzzle.modeling`, or by `trust_remote_code=True` alone.

    Tokenizer, chat template, generation defaults and license are copied from the folder `extra_files_from`, the
    parent's. Everything in `path` is on disk when this returns.
    """
    found = (file for pattern in _EXTRA_FILES for file in extra_files_from.glob(pattern)) if extra_files_from else ()
    extra_files = sorted({file for file in found if file.is_file()})
    generation_config = model.generation_config
    if any(file.name == "generation_config.json" for file in extra_files):
        # The parent's file is copied as it is: transformers reads some that it refuses to write.
        model.generation_config = GenerationConfig()
    model.save_pretrained(path, max_shard_size="5GB")  # as hubs like it
    model.generation_config = generation_config
    for file in extra_files:
        assert extra_files_from is not None
        target = path / file.relative_to(extra_files_from)
        target.parent.mkdir(exist_ok=True)
        shutil.copyfile(file, target)
        if file.name == "tokenizer_config.json":  # older versions of transformers do not know the newest's name
            text = file.read_text(encoding="utf-8").replace('"TokenizersBackend"', '"PreTrainedTokenizerFast"')
            target.write_text(text, encoding="utf-8")
    for place in (*path.rglob("*"), path):  # on disk, so that a manifest written later is true
        descriptor = os.open(place, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)


def save_configuration(config: PuzzleConfig, path: Path) -> None:
    """Write config.json and the model's code, that of all kinds that are known included: all but the weights.

    transformers takes the class of the first child that it loads for all whose configuration has the same code.
    """
    here = Path(__file__).parent
    config = copy.deepcopy(config)
    config.architectures = ["PuzzleForCausalLM"]
    config.auto_map = {
        "AutoConfig": "configuration_puzzle.PuzzleConfig",
        "AutoModel": "modeling_puzzle.PuzzleModel",
        "AutoModelForCausalLM": "modeling_puzzle.PuzzleForCausalLM",
    }
    config.save_pretrained(path)
    shutil.copyfile(here / "configuration_puzzle.py", path / "configuration_puzzle.py")
    code = (here / "modeling_puzzle.py").read_text(encoding="utf-8")
    for which, kind in sorted(MODULES):
        module = MODULES[which, kind]
        source = textwrap.dedent(inspect.getsource(module))
        code += f'\n\n{source}\n\nMODULES["{which}", "{kind}"] = {module.__name__}\n'
    (path / "modeling_puzzle.py").write_text(code, encoding="utf-8")
