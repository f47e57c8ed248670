"""Kill a run again and again, and damage its checkpoints: does every resume go on as if nothing had been?

    python tools/bench/faults.py                          a few kills of each kind, under five minutes
    python tools/bench/faults.py --kills save=15,steps=15,restore=10,compile=5,export=5       by hand

A reference run is trained without interruption. Another one is killed with SIGKILL: while it saves (copying,
writing, publishing), between steps, while it restores, compiles or exports. The kind of a kill is read from
the run's journal after the kill: one that came too early or too late counts as what it was, and another one
follows. After every kill the same command goes on with resume=auto. At its end the run is compared with the
reference: every step once, with the same loss, gradient norm, learning rate, tokens and rows, and the last
checkpoint bit for bit. When kills are still missing by then, another run begins. The last line is a JSON
object:

kills              kills by kind, and in all
runs               how many runs were killed again and again
resumed_bit_exact  whether each of them equals the reference in all of this
damages            ways in which the newest checkpoint was damaged
damages_detected   how many were found, with the damaged file named
fallbacks_ok       how many went on from the step before, bit-equal to what was saved
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

KINDS = ("save", "steps", "restore", "compile", "export")
DEFAULT_KILLS = "save=3,steps=2,restore=2,compile=1,export=1"
SAVE_PHASES = ("save", "write", "commit")
SAVE_EVERY = 8
TOTAL_STEPS = 40 * SAVE_EVERY
ROOT = Path(__file__).parents[2]

# A run that has not come to where it is to be killed after this long has failed.
PATIENCE_SECONDS = 180
_TIMES = ("step_seconds", "trace_seconds", "compile_seconds", "input_seconds", "compiles")


class BenchError(Exception):
    """The run did not do what it must; the message says what was seen."""


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(argv)
    with tempfile.TemporaryDirectory(dir=args.folder, prefix="bench-faults-") as folder:
        try:
            result = measure(Path(folder), args.kills, args.seed)
        except BenchError as error:
            print(f"faults: {error}", file=sys.stderr)
            return 1
    print(json.dumps(result))
    return 0


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=kill_counts, default=kill_counts(DEFAULT_KILLS), help=DEFAULT_KILLS)
    parser.add_argument("--seed", type=int, default=0, help="of the moments within a phase")
    parser.add_argument("--folder", type=Path, help="where to write; default: the temporary folder")
    return parser.parse_args(argv)


def kill_counts(text: str) -> dict[str, int]:
    counts = {kind: int(number) for kind, number in (part.split("=") for part in text.split(","))}
    if not set(counts) <= set(KINDS):
        raise ValueError(f"kinds are {KINDS}")
    return counts


def measure(folder: Path, wanted: Mapping[str, int], seed: int) -> dict[str, Any]:
    from tools.bench.damaging import damage_all

    result = killed_runs(folder, TOTAL_STEPS, wanted, seed)
    damages = damage_all(folder / "reference", command(folder / "reference", TOTAL_STEPS)[4:])
    counts = {**result.kills, "all": sum(result.kills.values())}
    exact = not result.problems
    return {"kills": counts, "runs": result.runs, "resumed_bit_exact": exact, **damages}


@dataclass(frozen=True)
class KilledRuns:
    """How often which kind of kill came, in how many runs, and what these runs did otherwise."""

    kills: Mapping[str, int]
    runs: int
    problems: Sequence[str]


def killed_runs(folder: Path, total: int, wanted: Mapping[str, int], seed: int) -> KilledRuns:
    """Kill runs of `total` steps until every kind has come as often as wanted; compare each with another run.

    That one is left alone, and stays in `folder / "reference"`.
    """
    reference = folder / "reference"
    finish(start(reference, total), reference)
    kills: Counter[str] = Counter()
    chance, problems, runs = random.Random(seed), list[str](), 0
    while missing(kills, wanted):
        runs += 1
        killed = folder / f"killed-{runs}"
        kill_run(killed, total, kills, wanted, chance)
        finish(start(killed, total), killed)
        found = [f"{killed.name}: {problem}" for problem in differences(reference, killed, total)]
        print("\n".join([f"run {runs} ended, {sum(kills.values())} kills so far", *found]), flush=True)
        problems += found
        shutil.rmtree(killed)
    return KilledRuns(kills, runs, problems)


def missing(kills: Mapping[str, int], wanted: Mapping[str, int]) -> list[str]:
    """The kinds that have not come as often as wanted."""
    return [kind for kind in KINDS if kills.get(kind, 0) < wanted.get(kind, 0)]


def command(run: Path, total: int) -> list[str]:
    """A small model on two virtual devices, saved every few steps; the same command starts and goes on."""
    settings = {
        "topology": "cpu-2",
        "output_dir": run,
        "resume": "auto",
        "schedule.max_steps": total,
        "schedule.warmup_steps": 2,
        "data.max_records": 400,
        "data.batch_rows": 4,
        "model.config.num_hidden_layers": 2,
        "model.config.tie_word_embeddings": "false",
        "save.every_steps": SAVE_EVERY,
        "eval.problems": 0,
        "log.tensorboard": "false",
    }
    recipe = str(ROOT / "recipes/tiny_word_problems.py")
    assignments = [f"{name}={value}" for name, value in settings.items()]
    return [sys.executable, "-m", "tptrain", "train", recipe, *assignments]


def start(run: Path, total: int) -> subprocess.Popen[str]:
    return launch(command(run, total))


def launch(arguments: Sequence[str]) -> subprocess.Popen[str]:
    return subprocess.Popen(arguments, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def finish(process: subprocess.Popen[str], run: Path) -> None:
    out, _ = process.communicate(timeout=1200)
    if process.returncode:
        raise BenchError(f"{run.name} ended with {process.returncode}: {out[-1500:]}")


def kill_run(
    run: Path, total: int, kills: Counter[str], wanted: Mapping[str, int], chance: random.Random
) -> None:
    """Kill a run, counting by kind, until every kind has come as often as wanted or the run is at its end."""
    while open_kinds := missing(kills, wanted):
        target = chance.choice([kind for kind in open_kinds if kind != "export"] or ["export"])
        if target == "restore" and not (run / "checkpoints").exists():
            target = "steps"
        was = kill_once(run, total, target, chance)
        if was == "nothing":
            if target != "export":
                return
            shutil.rmtree(run / "export")  # it was finished too soon: have it written once more
            continue
        kills[was] += 1
        print(f"kill {sum(kills.values())}: aimed at {target}, was {was}", flush=True)


def kill_once(run: Path, total: int, target: str, chance: random.Random) -> str:
    """Start or go on, wait for the moment, kill; returns what the journal says the process was doing."""
    journal = run / "journal.jsonl"
    since = time.time()
    process = start(run, total)
    deadline = time.monotonic() + PATIENCE_SECONDS
    aim = Aim(target, chance)
    while process.poll() is None and not aim.reached(own_lines(journal, since)):
        if time.monotonic() > deadline:
            process.kill()
            raise BenchError(f"no {target} within {PATIENCE_SECONDS} s: {process.communicate()[0][-1500:]}")
        time.sleep(0.003)
    time.sleep(aim.delay)
    process.kill()
    out, _ = process.communicate()
    if process.returncode not in (0, -9):
        raise BenchError(f"the run ended by itself with {process.returncode}: {out[-1500:]}")
    return kind_of(own_lines(journal, since))


class Aim:
    """When to kill: in which phase, and how long after it has begun."""

    def __init__(self, target: str, chance: random.Random):
        self._target = target
        self._phase = chance.choice(SAVE_PHASES) if target == "save" else target
        longest = {
            "save": 0.01,
            "write": 0.05,
            "commit": 0.02,
            "restore": 0.1,
            "compile": 2.0,
            "export": 0.01,
        }
        self.delay = chance.uniform(0, longest.get(self._phase, 0.0))
        self._steps = chance.randint(1, SAVE_EVERY + 2)

    def reached(self, own: list[dict[str, Any]]) -> bool:
        """own: what the process has written into the journal so far."""
        if self._target in ("restore", "compile", "export"):
            return begun(own, self._phase)
        published = [i for i, line in enumerate(own) if is_event(line, "end", "commit")]
        if not published:
            return False
        rest = own[published[0] + 1 :]
        if self._target == "save":
            return begun(rest, self._phase)
        steps = [line for line in rest if "event" not in line]
        return len(steps) >= self._steps and kind_of(own) == "steps"


def is_event(line: Mapping[str, Any], event: str, phase: str) -> bool:
    return line.get("event") == event and line["phase"] == phase


def begun(lines: Sequence[Mapping[str, Any]], phase: str) -> bool:
    return any(is_event(line, "begin", phase) for line in lines)


def own_lines(journal: Path, since: float) -> list[dict[str, Any]]:
    """The lines of the process that was started at `since`: from its begin of "start" on."""
    lines = lines_of(journal)
    own = [i for i, line in enumerate(lines) if is_event(line, "begin", "start") and line["time"] >= since]
    return lines[own[-1] :] if own else []


def kind_of(own: list[dict[str, Any]]) -> str:
    """What the process was doing: phases that have begun and not ended, or steps; nothing at its end."""
    if any(is_event(line, "end", "export") for line in own):
        return "nothing"
    open_phases: Counter[str] = Counter()
    for line in own:
        if "event" in line:
            open_phases[line["phase"]] += 1 if line["event"] == "begin" else -1
    for kind in ("export", "compile", "restore"):
        if open_phases[kind] > 0:
            return kind
    if any(open_phases[phase] > 0 for phase in SAVE_PHASES):
        return "save"
    return "steps" if own and open_phases["start"] <= 0 else "start"


def lines_of(journal: Path) -> list[dict[str, Any]]:
    """The whole lines of a journal that may be written to just now."""
    if not journal.exists():
        return []
    text = journal.read_text(encoding="utf-8")
    return [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]


def differences(reference: Path, killed: Path, total: int) -> list[str]:
    """In what the two finished runs differ."""
    from tptrain.ckpt.arrays import is_chunk
    from tptrain.ckpt.digests import read_manifest
    from tptrain.train.journal import read_journal

    problems = []
    theirs, ours = (read_journal(run / "journal.jsonl") for run in (reference, killed))
    if [record.step for record in ours] != list(range(1, total + 1)):
        problems.append(f"steps {[record.step for record in ours]}")
    for one, other in zip(theirs, ours, strict=False):
        pair = [{k: v for k, v in asdict(r).items() if k not in _TIMES} for r in (one, other)]
        if pair[0] != pair[1]:
            problems.append(f"step {one.step}: {pair[0]} and {pair[1]}")
    weights = [
        {
            path: d
            for path, d in read_manifest(run / "checkpoints" / str(total)).files.items()
            if is_chunk(path)
        }
        for run in (reference, killed)
    ]
    if weights[0] != weights[1]:
        problems.append(
            f"files of the last step: {sorted(set(weights[0].items()) ^ set(weights[1].items()))}"
        )
    exports = [sorted(p.name for p in (run / "export").iterdir()) for run in (reference, killed)]
    if exports[0] != exports[1] or any("partial" in p.name for p in killed.iterdir()):
        problems.append(f"exports {exports}, folder {sorted(p.name for p in killed.iterdir())}")
    return problems


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    sys.exit(main())
