"""The commands. Thin, and quick to start: what a command needs is imported when it runs."""

import argparse
import difflib
import errno
import os
import re
import signal
import sys
from collections.abc import Callable, Sequence
from dataclasses import fields, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, NoReturn

from puzzle.errors import PuzzleError
from puzzle.stages import COMMANDS, REPORT

_STAGES = {stage.name: stage.help for stage in COMMANDS}

Command = Callable[[argparse.Namespace], None]
Argument = tuple[tuple[str, ...], dict[str, Any]]
"""What `add_argument` is called with."""
_COMMANDS: dict[str, tuple[Command, tuple[Argument, ...]]] = {}


def _argument(*names: str, **options: Any) -> Argument:
    return names, options


def _command(*arguments: Argument) -> Callable[[Command], Command]:
    """Make a function the command of its name; its docstring is the command's help."""

    def register(function: Command) -> Command:
        _COMMANDS[function.__name__] = function, arguments
        return function

    return register


def _number(kind: type[int] | type[float], above: float) -> Callable[[str], float]:
    def parse(text: str) -> float:
        try:
            value = kind(text)
        except ValueError:
            value = above
        if not above < value < float("inf"):
            number = "a whole number" if kind is int else "a number"
            raise argparse.ArgumentTypeError(f"found {text}; must be {number} above {above}")
        return value

    return parse


_SETTINGS: dict[str, Any] = {"action": "append", "default": [], "metavar": "KEY=VALUE"}
_FOLDER = _argument("folder", type=Path, help="a run folder")
_AGAIN = _argument("--remeasure", action="store_true", help="measure costs and speeds again")
_ON = _argument("--on", metavar="ray", help="do its work on a Ray cluster: ray, or ray://HOST:6379")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command. Returns 0 when done, 2 after an error that a person can mend (one line), 130 when stopped."""
    arguments = _parser().parse_args(argv)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # a clean stop, as with Ctrl-C
    code = _execute(arguments)
    if _rank() is not None:
        from puzzle.distributed.group import end

        end(code)
    return code


def _execute(arguments: argparse.Namespace) -> int:
    try:
        if _rank() is not None and arguments.command != "distil":
            raise PuzzleError(f"torchrun: {arguments.command} is for one process; only distil is for several")
        arguments.function(arguments)
        sys.stdout.flush()
    except KeyboardInterrupt:
        return _fail("stopped; the same command goes on where it stood", 130)
    except BrokenPipeError:  # the reader of a pipe had enough
        sys.stdout = None  # nothing more to flush at exit
        return 0
    except Exception as error:
        line = _explain(error)
        if line is None:
            raise
        return _fail(line, 2)
    return 0


@_command(
    _argument("recipe", type=Path, help="a YAML file; `puzzle init` writes one"),
    _argument("--out", type=Path, help="the run folder; default: runs/ and the recipe's name"),
    _argument("--set", help="another value, such as target.throughput=2x", **_SETTINGS),
    _argument(
        "--until", choices=_STAGES, default=REPORT.name, metavar="STAGE", help=f"the last of {', '.join(_STAGES)}"
    ),
    _AGAIN,
    _ON,
)
def run(arguments: argparse.Namespace) -> None:
    """Go the whole way from a recipe to a report, or go on where that stopped."""
    from puzzle.recipe import Recipe, parse_overrides, recipe_text
    from puzzle.runs import create_folder, is_run_folder, open_run, used_folders

    path: Path = arguments.recipe
    overrides = parse_overrides(arguments.set)
    text = recipe_text(path)
    recipe = Recipe.read(path, overrides, text)
    # By default the folder whose recipe this is.
    out = arguments.out or (path.parent if is_run_folder(path.parent) else Path("runs") / path.stem)
    create_folder(out, recipe, None if overrides else text)
    with open_run(out, arguments.on, remeasure=arguments.remeasure) as opened:
        from puzzle.pipeline import plan, run_stage

        if not used_folders(out, opened.recipe):
            for line in plan(opened.recipe):
                opened.log(line)
        run_stage(opened, arguments.until)


@_command(_argument("--out", type=Path, help="the run folder; default: runs/demo"))
def demo(arguments: argparse.Namespace) -> None:
    """Train a tiny parent here and now, and make it cheaper: the whole method in minutes, on a laptop, offline."""
    from puzzle.demo import demo

    demo(arguments.out)


@_command(
    _argument("recipe", type=Path, help="a YAML file; of its parent, config.json is enough"),
    _argument("--devices", help="such as 8xh100-sxm, or 8x and a data sheet; default: this machine"),
    _argument("--set", help="another value, such as distil.batch_size=64", **_SETTINGS),
)
def plan(arguments: argparse.Namespace) -> None:
    """Show what a recipe takes, here or on many devices, before anything is computed or downloaded."""
    from puzzle.pipeline import plan
    from puzzle.recipe import Recipe, parse_overrides

    recipe = Recipe.read(arguments.recipe, parse_overrides(arguments.set))
    print("\n".join(plan(recipe, arguments.devices)))


@_command(
    _argument("model", help="folder of a Hugging Face checkpoint, or a hub name"),
    _argument("--data", help="its text: a file, a folder or a dataset; default: to be filled in"),
    _argument("--quick", action="store_true", help="types of matrices for llama.cpp alone: minutes, no training"),
    _argument("--out", type=Path, help="the file to write; default: print it"),
)
def init(arguments: argparse.Namespace) -> None:
    """Write a commented recipe for a model, from its config.json."""
    from puzzle.init import init_recipe

    out: Path | None = arguments.out
    if out is not None and out.exists():
        raise PuzzleError(f"--out: {out} exists; name a new file")
    text = init_recipe(*filter(None, (arguments.model, arguments.data)), quick=arguments.quick)
    if out is None:
        print(text, end="")
        return
    from puzzle.runs import write_text

    out.parent.mkdir(parents=True, exist_ok=True)
    write_text(out, text)
    missing = "" if arguments.data else "set data.source and "
    print(f"wrote {out}; {missing}look through it, then: puzzle run {out}")


def stage(arguments: argparse.Namespace) -> None:
    """Run one stage, and what is missing before it."""
    from puzzle.runs import open_run

    if _rank() is not None:
        from puzzle.distributed.tasks import open_together

        opening = open_together(arguments.folder)
    else:
        opening = open_run(arguments.folder, arguments.on, remeasure=arguments.remeasure)
    with opening as opened:
        from puzzle.pipeline import run_stage

        run_stage(opened, arguments.command)


@_command(
    _argument("place", type=Path, metavar="FOLDER|FILE", help="a run folder, or a table file (JSON)"),
    _argument("--target", help="another bound, such as throughput=2x", **_SETTINGS),
    _argument("--search", help="of the recipe's search, such as gap=0", **_SETTINGS),
    _argument("--frontier", type=_number(int, 1), metavar="N", help="so many points of the exact frontier"),
    _argument("--pool", type=_number(int, 1), metavar="N", help="so many solutions that differ, the best first"),
    _argument("--baseline", metavar="NAME", help="random, greedy, max-parameters, one-block, depth"),
    _argument("--over", metavar="KEY", help="with --frontier: over which quantity; default: throughput"),
    _argument("--to", type=_number(float, 1), metavar="X", help="with --frontier: to X times the parent; default: 4"),
    _argument("--figure", type=Path, metavar="FILE", help="with --frontier: draw it on an HTML page"),
    _argument("--differing", type=int, metavar="D", help="with --pool: in so many layers"),
    _argument("--seed", type=_number(int, -1), default=0, help="with --baseline: of random"),
    _argument("--out", type=Path, metavar="FILE", help="write the solution, or all of them, as JSON"),
    _argument("--table", type=Path, metavar="FILE", help="write the tables as a table file"),
    _ON,
)
def search(arguments: argparse.Namespace) -> None:
    """Choose the best architecture within the target (MIP), in a run folder or in a table file of any library."""
    from rich.console import Console

    from puzzle.query import Question, answer, kept_tables
    from puzzle.report import solution_table
    from puzzle.runs import open_run
    from puzzle.search import read_table

    asked = [flag for flag in ("frontier", "pool", "baseline") if getattr(arguments, flag) is not None]
    if len(asked) > 1:
        raise PuzzleError(f"--{asked[1]}: it does not go together with --{asked[0]}; leave one out")
    question = Question(**{item.name: getattr(arguments, item.name) for item in fields(Question)})
    place, show, tables = arguments.place, Console().print, None
    if not place.is_dir() and (place.exists() or place.suffix == ".json"):
        tables = read_table(place)
    elif question != Question() and question.baseline not in ("one-block", "depth"):  # which ask the parent's text
        tables = kept_tables(place)
    if tables is not None:
        for part in answer(tables, question):
            show(part)
        return
    with open_run(place, arguments.on) as opened:
        from puzzle.pipeline import run_stage

        if question == Question():
            method = run_stage(opened, "search")
            show(solution_table(method.searched, method.tables.scores.parent_blocks))
        else:
            for part in answer(run_stage(opened, "score").tables, question):
                show(part)


@_command(
    _FOLDER,
    _argument("--tasks", metavar="A,B", help="tasks of lm-eval as well: names, yaml files or folders of them"),
    _ON,
)
def evaluate(arguments: argparse.Namespace) -> None:
    """Compare child and parent, in quality and speed."""
    from puzzle.runs import open_run

    with open_run(arguments.folder, arguments.on) as opened:
        from rich.console import Console

        from puzzle.pipeline import run_stage
        from puzzle.report import final_table

        rows = run_stage(opened, "evaluate").rows
        if arguments.tasks:
            settings = opened.recipe.evaluate.model_copy(update={"tasks": arguments.tasks.split(",")})
            asked = replace(opened, recipe=opened.recipe.model_copy(update={"evaluate": settings}))
            Console().print(final_table(rows, run_stage(asked, "tasks").tasks))


@_command(
    _FOLDER,
    _argument("--to", default="hf", choices=["hf", "deci", "gguf", "stock"], help="default: hf"),
    _argument(
        "--dtype",
        choices=["f32", "f16", "bf16", "q8_0"],
        help="default: the parent's; of gguf f16, and for q4_k_m run llama-quantize on that",
    ),
)
def export(arguments: argparse.Namespace) -> None:
    """Write the child as a checkpoint for other programs."""
    from puzzle.export import DTYPES, convert
    from puzzle.runs import open_run

    to, dtype = arguments.to, arguments.dtype
    if dtype is not None and to != "gguf" and dtype not in DTYPES:
        raise PuzzleError(f"--dtype: found {dtype}, which is of gguf alone; {to} takes {', '.join(DTYPES)}")
    with open_run(arguments.folder) as opened:
        from puzzle.pipeline import run_stage

        method = run_stage(opened, "evaluate" if to == "hf" and dtype else "export")
        if to == "hf":
            written = method.export(DTYPES[dtype]) if dtype else method.exported
        else:
            written = convert(method.exported, to, dtype)
    print(written)


@_command(
    _argument("checkpoints", type=Path, nargs="+", help="folders of checkpoints, timed in turns"),
    _argument(
        "--set",
        help="of the recipe's scenario, such as engine=vllm, batch_sizes=[64] or prompt_tokens=1024",
        **_SETTINGS,
    ),
)
def bench(arguments: argparse.Namespace) -> None:
    """Time a checkpoint, parent or child, the way in which every figure here was measured."""
    from puzzle.evaluate import bench

    for line in bench(arguments.checkpoints, arguments.set):
        print(line)


@_command(
    _argument("action", nargs="?", choices=["install"], help="without it: list them"),
    _argument("name", nargs="?", default="", help="which to install; llama-cpp is compiled, which takes minutes"),
)
def engines(arguments: argparse.Namespace) -> None:
    """List the inference engines beside torch, or install one into an environment of its own."""
    from puzzle.engines.environments import install, installed

    if arguments.action == "install":
        install(arguments.name)
        if arguments.name == "llama-cpp":
            from puzzle.costs import check_llama_cpp

            check_llama_cpp()
        return
    for name, python in installed().items():
        print(f"{name}: {python or f'not installed; `puzzle engines install {name}`'}")


@_command(_FOLDER)
def status(arguments: argparse.Namespace) -> None:
    """Show which stages are done, where an unfinished one stands, and what is next."""
    from puzzle.runs import status

    print("\n".join(status(arguments.folder)))


@_command(
    _argument("topic", help="recipe, or a command"),
    _argument("section", nargs="?", default="", help="of the recipe, such as distil"),
)
def help(arguments: argparse.Namespace) -> None:
    """List the settings of a recipe or of a section, with their defaults; or show a command's help."""
    if arguments.topic in _COMMANDS:
        main([arguments.topic, "--help"])
    if arguments.topic != "recipe":
        raise PuzzleError(f"{arguments.topic} is no topic; use recipe, `recipe SECTION` or a command")
    from puzzle.explain import describe
    from puzzle.recipe import Recipe

    if not (text := describe(Recipe, part=arguments.section)):
        raise PuzzleError(f"{arguments.section} is no section of a recipe; `puzzle help recipe` lists them")
    print(text, end="")


_EXAMPLES = """examples:
  puzzle init meta-llama/Llama-3.2-1B --out my.yaml    a recipe to fill in
  puzzle run my.yaml                                   the whole method, into runs/my
  puzzle search runs/my --frontier 20                  quality against speed
  puzzle help recipe distil                            the settings of a section
"""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """One line, with the command that was probably meant."""
        if match := re.search(r"argument COMMAND: invalid choice: '(.*?)'", message):
            near = difflib.get_close_matches(match[1], {*_COMMANDS, *_STAGES}, n=1)
            message = f"{match[1]} is no command" + (f"; did you mean {near[0]}?" if near else "")
        sys.exit(_fail(f"{message}; `{self.prog} --help` shows what there is", 2))


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="puzzle",
        description="Make a language model cheaper to serve.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="store_true", help="show the version")
    parser.set_defaults(
        function=lambda asked: print("puzzle", version("puzzle-llm")) if asked.version else parser.print_help()
    )
    commands = parser.add_subparsers(metavar="COMMAND", dest="command")

    for stage_name in _STAGES:
        _COMMANDS.setdefault(stage_name, (stage, (_FOLDER, _AGAIN, _ON)))
    for name, (function, added) in _COMMANDS.items():
        text = _STAGES[name] if function is stage else (function.__doc__ or "").strip()
        command = commands.add_parser(name, help=text, description=text, allow_abbrev=False)
        command.set_defaults(function=function)
        for names, options in added:
            command.add_argument(*names, **options)
    return parser


def _rank() -> int | None:
    """Of the processes that torchrun started, the number of this one; None if it is alone."""
    several = "TORCHELASTIC_RUN_ID" in os.environ and os.environ["WORLD_SIZE"] != "1"
    return int(os.environ["RANK"]) if several else None


def _fail(line: str, code: int) -> int:
    name = "puzzle" if _rank() is None else f"puzzle, process {_rank()}"
    print(f"{name}: {line}", file=sys.stderr)
    return code


def _explain(error: BaseException) -> str | None:
    """What a person can mend, in one line; None for a bug."""
    from pydantic import ValidationError

    if isinstance(error, PuzzleError):
        return str(error)
    if isinstance(error, ValidationError):
        from puzzle.explain import explain
        from puzzle.recipe import Recipe

        return explain(error, Recipe)
    text = str(error)
    if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or "No space left on device" in text:
        place = getattr(error, "filename", None) or "while writing"
        return f"disk full: {place}; free some space and run the same command again; nothing computed is lost"
    if isinstance(error, MemoryError) or "out of memory" in text or "can't allocate memory" in text:
        return "out of memory; lower data.sequence_length, or the batch size of the stage that stopped, and run again"
    if isinstance(error, OSError) and error.filename is not None:
        return f"{error.filename}: {error.strerror}"
    return None
