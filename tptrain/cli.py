"""The `tptrain` command, and the main of a recipe script.

Planning imports no framework; `train` and `generate` import theirs when they are asked for.
"""

from __future__ import annotations

import json
import signal
import sys
from collections.abc import Callable, Sequence

from tptrain import __version__
from tptrain.config.checkpoint_config import config_is_on_the_hub_only
from tptrain.config.help import render_help
from tptrain.config.overrides import apply_overrides, spelled_out
from tptrain.config.plan import Plan
from tptrain.config.planning import plan_recipe
from tptrain.config.recipe_file import load_recipe
from tptrain.config.schema import Recipe
from tptrain.errors import Problem, ProblemsError, TptrainError, nearest, raise_if_any, refuse
from tptrain.estimate import estimate, host_memory_problems, memory_problems
from tptrain.report.plan_page import plan_json, plan_page

USAGE = """\
usage: tptrain COMMAND ...

  tptrain plan RECIPE [setting=value ...] [--json]   what would run: numbers, parameter table, problems
  tptrain dryrun RECIPE topology=v5p-32 [...]        the same, then trace and compile the real step
      --until plan|trace|compile                     the last of the three tiers
      --libtpu PATH  --cache DIR  --json             another compiler, where results are kept, one JSON object
  tptrain search RECIPE topology=v5p-32 [...]        rank meshes, remat policies and micro-batches by speed
      --compile N  --batch N,M  --price USD          how many are compiled, other batch rows, cost of tokens
      --libtpu PATH  --cache DIR  --json             as above; Ctrl-C shows what is known, the same goes on
  tptrain data inspect RECIPE [setting=value ...]    the records as the model will see them: tokens, mask,
      roles --rows N  --html FILE  --json                  how many are shown, a page of it, one JSON object
  tptrain train RECIPE [setting=value ...]           train, and export a Hugging Face folder
      --resume auto|never|STEP                       go on with the run in output_dir (resume=...)
      --unverified                                   also from a checkpoint without digests (unverified=true)
  tptrain generate RUN_OR_FOLDER PROMPT [...]        answer a prompt with a trained or exported model
  tptrain train RECIPE --help                        every setting, this recipe's value, its meaning
  tptrain --version

RECIPE is a recipe script such as recipes/tiny_gsm8k.py, or its name when it lies in ./recipes.
train exits with 75 when SIGTERM ended it with its state saved: the same command with --resume auto goes on.
"""

_OK, _REFUSED = 0, 2
_HELP = ("--help", "-h", "help")


def main(argv: Sequence[str] | None = None) -> int:
    """The console command. Returns the exit code: 0, 2 for what the user can mend, 75 for a run to
    resume, 130 for a search that Ctrl-C ended."""
    args = list(sys.argv[1:] if argv is None else argv)
    return _told(lambda: _dispatch(args))


def run_recipe(recipe: Recipe, argv: Sequence[str] | None = None) -> None:
    """What a recipe script does when it is run: help, overrides, then training.

    Exits with 2 on problems, and with 75 when SIGTERM ended the run with its state saved.

    if __name__ == "__main__":
        run_recipe(RECIPE)
    """
    args = list(sys.argv[1:] if argv is None else argv)
    code = _told(lambda: _train(recipe, spelled_out(args), f"python {sys.argv[0]}"))
    if code:
        sys.exit(code)


def _told(command: Callable[[], int]) -> int:
    """Run a command; errors raised for people go to stderr without a traceback."""
    try:
        return command()
    except TptrainError as error:
        print(f"tptrain: {error}", file=sys.stderr)
        return _REFUSED


def _dispatch(args: list[str]) -> int:
    if not args or args[0] in _HELP or _is_bare_help(args):
        print(USAGE, end="")
        return _OK if args else _REFUSED
    if args[0] == "--version":
        print(f"tptrain {__version__}")
        return _OK
    command = _COMMANDS.get(args[0])
    if command is None:
        raise ProblemsError([_unknown_command(args[0])])
    return command(args[1:])


def _is_bare_help(args: list[str]) -> bool:
    """`tptrain plan --help`, with no recipe whose settings could be shown."""
    return args[0] in ("plan", "dryrun", "search", "train") and len(args) == 2 and args[1] in _HELP


def _unknown_command(word: str) -> Problem:
    guess = nearest(word, _COMMANDS)
    fix = f"tptrain {guess} (did you mean it?)" if guess else "one of them, see tptrain --help"
    return Problem("command", word, "is not a command", f"commands: {', '.join(_COMMANDS)}", fix)


def _plan_command(args: list[str]) -> int:
    as_json = "--json" in args
    rest = [arg for arg in args if arg != "--json"]
    recipe, overrides = _recipe_and_overrides("plan", rest)
    if _asks_help(overrides):
        return _show_help(recipe, "tptrain plan RECIPE")
    plan = _planned(recipe, overrides)
    found = estimate(plan)
    if as_json:
        print(json.dumps(plan_json(plan, found), indent=1))
    else:
        print(plan_page(plan, found), end="")
    raise_if_any([*memory_problems(plan, found), *host_memory_problems(plan, found.hosts)])
    return _OK


def _dryrun_command(args: list[str]) -> int:
    from tptrain.dryrun.command import dry_run, read_options

    options, rest = read_options(args)
    recipe, overrides = _recipe_and_overrides("dryrun", rest)
    if _asks_help(overrides):
        return _show_help(recipe, "tptrain dryrun RECIPE")
    raise_if_any(dry_run(_planned(recipe, overrides), options))
    return _OK


def _search_command(args: list[str]) -> int:
    from tptrain.dryrun.search import read_options, search

    options, rest = read_options(args)
    recipe, overrides = _recipe_and_overrides("search", rest)
    if _asks_help(overrides):
        return _show_help(recipe, "tptrain search RECIPE")
    return search(recipe, overrides, options)


def _train_command(args: list[str]) -> int:
    recipe, overrides = _recipe_and_overrides("train", args)
    return _train(recipe, overrides, "tptrain train RECIPE")


def _data_command(args: list[str]) -> int:
    from tptrain.inspection.command import USAGE as INSPECT_USAGE
    from tptrain.inspection.command import inspect, read_options

    if not args or args[0] in _HELP or (args[0] == "inspect" and args[1:2] and args[1] in _HELP):
        print(INSPECT_USAGE, end="")
        return _OK if args else _REFUSED
    if args[0] != "inspect":
        raise refuse("data", args[0], "is not a command of data", "commands: inspect", "tptrain data inspect")
    options, rest = read_options(args[1:])
    recipe, overrides = _recipe_and_overrides("data inspect", rest)
    if _asks_help(overrides):
        return _show_help(recipe, "tptrain data inspect RECIPE")
    raise_if_any(inspect(recipe, overrides, options))
    return _OK


def _generate_command(args: list[str]) -> int:
    from tptrain.generate.command import main as generate_main

    return generate_main(args)


_COMMANDS: dict[str, Callable[[list[str]], int]] = {
    "plan": _plan_command,
    "dryrun": _dryrun_command,
    "search": _search_command,
    "data": _data_command,
    "train": _train_command,
    "generate": _generate_command,
}


def _recipe_and_overrides(command: str, args: list[str]) -> tuple[Recipe, list[str]]:
    """The recipe named by the first argument that is neither an override nor an option, and the rest."""
    args = spelled_out(args)
    named = [i for i, arg in enumerate(args) if "=" not in arg and not arg.startswith("-")]
    if not named:
        fix = f"tptrain {command} recipes/tiny_gsm8k.py"
        raise refuse("recipe", "none", "is required", f"arguments: {' '.join(args) or 'none'}", fix)
    first = named[0]
    return load_recipe(args[first]), args[:first] + args[first + 1 :]


def _train(recipe: Recipe, overrides: list[str], program: str) -> int:
    if _asks_help(overrides):
        return _show_help(recipe, program)
    asked = apply_overrides(recipe, overrides)
    if not config_is_on_the_hub_only(asked):
        plan_recipe(asked)  # a recipe that cannot be planned is refused before any framework is loaded
    from tptrain.train.preemption import Preempted, Preemption

    try:
        # Watched from here on, because importing the frameworks takes seconds.
        with Preemption() as preemption:
            from tptrain.train.run import train_recipe

            train_recipe(asked, preemption=preemption)
    except Preempted as preempted:
        # Ending the interpreter takes seconds, too; a saved run is not to be reported as a killed one.
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        return preempted.exit_code
    return _OK


def _planned(recipe: Recipe, overrides: list[str]) -> Plan:
    return plan_recipe(apply_overrides(recipe, overrides))


def _asks_help(args: Sequence[str]) -> bool:
    return any(arg in _HELP for arg in args)


def _show_help(recipe: Recipe, program: str) -> int:
    print(render_help(recipe, program), end="")
    return _OK
