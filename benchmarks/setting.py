"""What the benchmarks share: one run folder on one parent, opened again and again with other settings.

What two settings have in common (tokens, statistics, trained variants, measured costs) is computed once, as in any run
folder.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from puzzle import Pipeline, Recipe, create_folder, open_run

CHILD = (
    "kv1+w512",
    "kv3+w64",
    "kv1+w64",
    "kv1+w64",
    "kv1+w128",
    "kv1+w128",
    "kv3+w256",
    "kv3+w256",
    "kv3+w512",
    "linear+w256",
)
"""What the search found at twice the speed of the parent of 5.2M parameters (search_quality.md)."""

SHARES = {"calibration": 0.06, "validation": 0.04, "scoring": 0.04, "test": 0.06}


def recipe(parent: str, text: str, **sections: dict[str, Any]) -> Recipe:
    """A recipe for a parent of some millions of parameters; `sections` are put over the defaults here."""
    defaults: dict[str, Any] = {
        "data": {"source": text, "sequence_length": 256, "max_tokens": "8M", **SHARES},
        "precision": "float32",
        "calibration": {"tokens": 131_072},
        "library": {"tokens": 131_072, "learning_rate": 3e-3, "batch_size": 4, "validation_tokens": 32_768},
        "score": {"tokens": 16_384},
        "scenario": {"batch_sizes": [64], "prompt_tokens": 256, "generated_tokens": 64},
        "target": {"throughput": "2x"},
        "evaluate": {"tokens": 32_768},
    }
    for name, section in sections.items():
        defaults[name] = defaults.get(name, {}) | section
    return Recipe.model_validate({"parent": parent, **defaults})


@contextmanager
def opened(folder: Path, chosen: Recipe) -> Iterator[Pipeline]:
    """The method with this recipe in the folder."""
    create_folder(folder, chosen)
    with open_run(folder) as run:
        yield Pipeline(run)
