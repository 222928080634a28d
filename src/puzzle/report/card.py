"""The model card that goes with an exported child, and the versions that a run is quoted with."""

import platform
from importlib.metadata import PackageNotFoundError, version

from puzzle.report import headline, numbers
from puzzle.report.data import ReportData
from puzzle.report.table import lines, models

_PACKAGES = ("puzzle-llm", "torch", "transformers", "safetensors", "highspy", "numpy")


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that results depend on."""
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "unknown"
    return found


def model_card(data: ReportData) -> str:
    """The README of an exported child, in Markdown: what it is, how it was made, what was measured, how to load it."""
    proof = data.solution.proof
    proven = f" ({proof.status}, gap {numbers.percent(proof.gap)})" if proof else ""
    checks = (
        f"- {check.quantity}: asked {check.asked}; predicted {check.predicted}; "
        f"measured {check.measured}; {check.verdict}"
        for check in headline.checks(data)
    )
    return "\n".join(
        [
            "---",
            "library_name: transformers",
            "pipeline_tag: text-generation",
            "tags: [puzzle, pruning, distillation]",
            "---",
            f"# {data.title}",
            "",
            f"A child of `{data.parent}`, made with Puzzle (arXiv 2411.19146). `architecture.json` has its layers.",
            "",
            "```python",
            "from transformers import AutoModelForCausalLM, AutoTokenizer",
            "",
            "# The model's code is in this folder; after `import puzzle` the flag is not needed.",
            'model = AutoModelForCausalLM.from_pretrained("path/to/this/folder", trust_remote_code=True)',
            'tokenizer = AutoTokenizer.from_pretrained("path/to/this/folder", trust_remote_code=True)',
            "```",
            "",
            "## Result",
            "",
            f"Scenario: {headline.scenario_line(data)}. Throughput counts generated tokens only.",
            "",
            *_result(data),
            "",
            "## Target",
            "",
            *checks,
            f"- sum of scores {numbers.plain(data.solution.score)}{proven}",
            "",
            "## Recipe",
            "",
            *(f"    {line}" for line in data.recipe_yaml.splitlines()),
            "",
        ]
    )


def _result(data: ReportData) -> list[str]:
    if not data.rows:
        return ["Nothing is measured yet."]
    names = [_cell(name) for name in models(data.rows).values()]
    return [
        f"| | {' | '.join(names)} | child / parent |",
        f"|---|{'---:|' * (len(names) + 1)}",
        *(f"| {_cell(line.metric.label)} | {' | '.join(line.cells)} | {line.kept} |" for line in lines(data.rows)),
    ]


def _cell(text: str) -> str:
    return text.replace("|", "\\|")
