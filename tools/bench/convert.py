"""What converting a checkpoint to a Hugging Face folder costs, beside cp and ways that hold a whole model.

    python tools/bench/convert.py                          0.4 and 3.2 GB of bfloat16, under five minutes
    python tools/bench/convert.py --gb 1 4 --pairs 5 --folder /mnt/disk
    python tools/bench/convert.py --shape 3b --pairs 2     3.2 billion parameters: 38 GB with their moments

Checkpoints are made as training saves them: float32 weights and both moments. Conversions write bfloat16,
flush it to the disk and read it back to compare digests; their times are without imports. The yardsticks run
in turns with them, A B A B, in the same process; the first round is left out. Every round is a line of
seconds. All files are deleted at the end. The last line is a JSON object; a ratio is the median over the
rounds of the conversion's bytes per second over the yardstick's, above 1: the conversion is faster.

rss_growth_gb            per size: peak memory of a converting process over what it had after its imports
convert_seconds, convert_gb_per_second: per size, of the output, median
throughput_over_cp       cp of the output files, which leaves them in the page cache; at the largest size
throughput_over_cp_and_sync: the same, then flushed to the disk as a conversion does; at the largest size
throughput_over_save_pretrained: transformers, float32 in memory: cast and save; at the smallest size
throughput_over_cpu_gather: 8 virtual devices: .cpu() of each sharded tensor, cast, save_file; smallest size
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

_VERSIONED = ("tptrain", "torch", "torch_xla", "jax", "orbax-checkpoint", "tensorstore", "safetensors")

# A gather takes about 30 times as long as a conversion, so a few show enough.
_GATHERS = 2

Config = dict[str, Any]
Round = Mapping[str, float]

# Sizes of Llama 3.2 3B and Llama 3.1 8B.
SHAPES: dict[str, Config] = {
    "3b": {
        "vocab_size": 128_256,
        "hidden_size": 3072,
        "intermediate_size": 8192,
        "num_hidden_layers": 28,
        "num_attention_heads": 24,
        "num_key_value_heads": 8,
        "tie_word_embeddings": True,
    },
    "8b": {
        "vocab_size": 128_256,
        "hidden_size": 4096,
        "intermediate_size": 14_336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "tie_word_embeddings": False,
    },
}


class BenchError(Exception):
    """A part of the benchmark failed, or there is no room for it."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run it and print. Returns 0, or 1 when a part failed."""
    args = parse(argv)
    print(
        f"machine: {os.cpu_count()} cores, {platform.machine()}, load {os.getloadavg()[0]:.1f} at the start"
    )
    print("versions:", ", ".join(f"{name} {version(name)}" for name in _VERSIONED), flush=True)
    configs = [SHAPES[args.shape]] if args.shape else [sized(gb) for gb in sorted(args.gb)]
    with tempfile.TemporaryDirectory(dir=args.folder, prefix="bench-convert-") as folder:
        try:
            print(json.dumps(measure(Path(folder), configs, args.pairs, whole=not args.shape)))
        except BenchError as error:
            print(f"convert: {error}", file=sys.stderr)
            return 1
    return 0


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--gb", type=float, nargs="+", default=[0.4, 3.2], help="sizes of the output in GB (1e9)"
    )
    parser.add_argument("--shape", choices=SHAPES, help="one model of this shape in place of --gb")
    parser.add_argument("--pairs", type=int, default=5, help="rounds that count, after one that does not")
    parser.add_argument("--folder", type=Path, help="where to write; default: the temporary folder")
    args = parser.parse_args(argv)
    if args.pairs < 1 or min(args.gb) <= 0:
        parser.error("--pairs and --gb must be above 0")
    return args


def sized(gb: float) -> Config:
    """A Llama whose weights take about `gb` GB in bfloat16."""
    width, mlp, vocab = 2048, 5632, 16_000
    per_layer = 2 * width * width + 2 * width * 512 + 3 * width * mlp
    return {
        "vocab_size": vocab,
        "hidden_size": width,
        "intermediate_size": mlp,
        "num_hidden_layers": max(round((gb * 1e9 / 2 - 2 * vocab * width) / per_layer), 1),
        "num_attention_heads": 16,
        "num_key_value_heads": 4,
        "tie_word_embeddings": False,
    }


def measure(folder: Path, configs: Sequence[Config], pairs: int, whole: bool) -> dict[str, Any]:
    """All parts of all sizes. whole: also what holds a whole model, at the smallest size."""
    growth, seconds, speeds = [], [], []
    found: dict[str, Any] = {}
    rounds: list[Round] = []
    for index, config in enumerate(configs):
        made = child("make", folder, config)
        output_bytes = made["parameters"] * 2
        print(
            f"{made['parameters'] / 1e6:,.0f} million parameters, made in {made['seconds']:.0f} s", flush=True
        )
        growth.append(round(child("memory", folder, config)["growth"] / 1e9, 3))
        rounds = child("cp", folder, config, pairs)["rounds"]
        show(rounds)
        seconds.append(round(median(row["convert"] for row in rounds), 3))
        speeds.append(round(output_bytes / 1e9 / seconds[-1], 3))
        if whole and index == 0:
            for name, most in (("save_pretrained", pairs), ("cpu_gather", _GATHERS)):
                row_of = child(name, folder, config, min(pairs, most))["rounds"]
                show(row_of)
                found[f"throughput_over_{name}"] = over(row_of, name)
        if config is configs[-1]:
            print("each stage alone:", shown(child("stages", folder, config)), flush=True)
        shutil.rmtree(folder / "run")
    return {
        "rss_growth_gb": growth,
        "convert_seconds": seconds,
        "convert_gb_per_second": speeds,
        "throughput_over_cp": over(rounds, "cp"),
        "throughput_over_cp_and_sync": over(rounds, "cp_and_sync"),
        **found,
    }


def over(rounds: Sequence[Round], name: str) -> float:
    """How many times as fast as a yardstick the conversion is; both make the same bytes."""
    return round(median(row[name] / row["convert"] for row in rounds), 3)


def show(rounds: Sequence[Round]) -> None:
    for row in rounds:
        print("  " + shown(row), flush=True)


def shown(row: Round) -> str:
    return "  ".join(f"{name} {value:.3f}" for name, value in row.items())


def child(part: str, folder: Path, config: Config, pairs: int = 1) -> dict[str, Any]:
    """One part in a process of its own; its numbers."""
    room, needed = shutil.disk_usage(folder).free, room_needed(config)
    if part == "make" and room < needed:
        raise BenchError(
            f"{folder} has {room / 1e9:.1f} GB free, this needs {needed / 1e9:.1f} GB: --folder, --gb"
        )
    command = [
        sys.executable,
        "-m",
        "tools.bench.convert_sides",
        part,
        str(folder),
        json.dumps(config),
        str(pairs),
    ]
    root = str(Path(__file__).resolve().parents[2])
    done = subprocess.run(command, cwd=root, capture_output=True, text=True)
    if done.returncode:
        raise BenchError(f"{part} failed:\n{done.stderr.strip()}")
    numbers: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return numbers


def room_needed(config: Config) -> int:
    """Bytes on the disk: weights and moments in float32, the output, its copy, and some to spare."""
    from tptrain.family import facts_from_config, parameter_table, stored_rows

    table = parameter_table(facts_from_config({"model_type": "llama", **config}))
    return 16 * sum(row.num_elements for row in stored_rows(table)) + 10**9


if __name__ == "__main__":
    sys.exit(main())
