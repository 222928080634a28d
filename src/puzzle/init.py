"""A commented recipe for a model, with values that follow from its config.json."""

import math
from collections import defaultdict
from typing import Any

from puzzle.explain import describe
from puzzle.modeling import empty_model
from puzzle.parents import read_config
from puzzle.recipe import EXAMPLE_SOURCE, Recipe
from puzzle.variants import Architecture, derive_space

_NO_SHAPES: dict[str, Any] = {"kv_heads": [], "ffn_widths": [], "attention": [], "ffn": []}
_QUICK: dict[str, Any] = {
    **{f"space.{setting}": none for setting, none in _NO_SHAPES.items()},
    "space.types": ["q8_0", "q6_K", "q5_0", "q4_K", "iq4_nl", "q4_0"],
    "space.outer": "q8_0",
    "precision": "float32",
    "calibration.tokens": "32k",
    "library.tokens": 0,
    "score.tokens": "1k",
    "scenario.engine": "llama.cpp",
    "scenario.dtype": "float16",
    "scenario.batch_sizes": [1],
    "scenario.prompt_tokens": 128,
    "scenario.generated_tokens": 128,
    "correct.tokens": 0,
    "distil.tokens": 0,
    "evaluate.uniform_baseline": False,
}
"""Types alone, for llama.cpp: nothing is trained."""


def init_recipe(model: str, source: str = EXAMPLE_SOURCE, *, quick: bool = False) -> str:
    """A commented recipe for the checkpoint in folder `model`, or of that name on the hub; its weights are not read.

    Args:
        quick: choose types of matrices alone.
    """
    config = read_config(model)
    space = derive_space(config, **({"types": _QUICK["space.types"], **_NO_SHAPES} if quick else {}))
    num_params = sum(parameter.numel() for parameter in empty_model(config).parameters())
    dtype = str(config.dtype or "float32").removeprefix("torch.")
    sizes: dict[str, Any] = defaultdict(list)
    shape = "each of its own sizes"  # and of its own default variants
    if len(set(space.layers)) == 1:
        heads = f"{config.num_attention_heads} heads on {config.num_key_value_heads} KV heads"
        shape = f"hidden {config.hidden_size}, FFN {config.intermediate_size}, {heads}"
        for variant in (*space.layers[0].attention[1:], *space.layers[0].ffn[1:]):
            if variant.setting is not None and variant.size is not None:
                sizes[f"space.{variant.setting}"].append(variant.size)
    idle = Architecture.of(config).idle_params(config)
    active = f" ({(num_params - idle) / 1e6:,.0f}M active)" if idle else ""
    title = [
        f"# {model}: {len(space.layers)} layers, {shape}, {num_params / 1e6:,.0f}M parameters{active}, {dtype}.",
        f"# {len(space.layers[0].blocks())} blocks a layer make 10^{math.log10(space.num_architectures):.0f} children.",
        "# Before `puzzle run` with this file: look through data, scenario and target.",
        "# Models run and are served in bfloat16 where that is fast, as on a GPU; `precision: float32` says otherwise.",
        "# Every other setting and its default: `puzzle help recipe`.",
    ]
    # What differs for large models follows the paper and its reference code, scaled down to one machine.
    large = num_params >= 500_000_000  # a GPU's batch sizes, and smaller learning rates
    longest = config.max_position_embeddings
    values = {
        "parent": model,
        "data.source": source,
        "data.sequence_length": min(2048 if large else 512, longest),
        **sizes,
        "library.tokens": "20M" if large else "1M",
        "library.learning_rate": 1e-4 if large else 1e-3,
        "score.tokens": "128k" if large else "64k",
        "scenario.engine": "torch",
        "scenario.batch_sizes": [16, 64] if large else [8],
        "scenario.prompt_tokens": min(1024, longest * 3 // 4),
        "scenario.generated_tokens": min(256, longest // 4),
        "target.throughput": "2x",
        "distil.tokens": "100M" if large else "10M",
        "distil.learning_rate": 5e-5 if large else 3e-4,
    }
    if quick:
        values = {name: value for name, value in values.items() if not name.endswith("learning_rate")} | _QUICK
    return "\n".join(title) + "\n\n" + describe(Recipe, values)
