"""How fast records become rows, beside TRL's preprocessing, and whether training waits for them.

    make bench-data                                   builds TRL's environment and runs all benchmarks of data
    python tools/bench/input.py [--gsm8k FOLDER] [--chats 100000] [--seconds 30]

Chats are made from GSM8K's problems, or from the embedded word problems where no folder is given: one to four
turns, a system's message in every third, written in ChatML by a byte-level BPE of 16,000 tokens made from the
same problems. Everything runs on one core's worth of threads (TOKENIZERS_PARALLELISM=false). The last line is
a JSON object:

tokens_per_second_per_core_cold    records read, rendered and packed into batches, over this process's CPU
seconds tokens_per_second_per_core_cached  the same from tokenised records that were kept
input_wait_share                   part of the time that a loop taking 20,000 tokens/s waits for its batches
preprocess_over_trl                by set: CPU seconds that TRL's SFTTrainer takes to prepare the records
                                   (templates, tokens, masks, packing, not the model), over ours to the first
                                   batch
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

os.environ["TOKENIZERS_PARALLELISM"] = "false"
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import numpy as np
from tokenizers import AddedToken
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from tools.bench.trl_child import PYTHON, Trl
from tptrain.config.schema import DataSection
from tptrain.data.batches import Batches, prefetch
from tptrain.data.sources import load_records, open_records
from tptrain.data.token_cache import tokenized
from tptrain.data.tokenizer import train_tokenizer
from tptrain.data.word_problems import training_records

SEQ_LEN = 2048
ROWS = 16
TRAINED_TOKENS_PER_SECOND = 20_000
# With the blocks from which TRL takes its mask; tptrain reads them as well.
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}"
    "{% generation %}{{ m.content }}<|im_end|>{% endgeneration %}{% else %}{{ m.content }}<|im_end|>"
    "{% endif %}{{ '\n' }}{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--gsm8k", default=os.environ.get("TPTRAIN_GSM8K"), help="folder of its train.jsonl")
    parser.add_argument("--chats", type=int, default=100_000)
    parser.add_argument("--seconds", type=float, default=30, help="of the loop that trains nothing")
    parser.add_argument("--trl", type=Path, default=PYTHON, help="Python of TRL's environment")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        print(json.dumps(measured(Path(name), options)))


def measured(folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    problems = _problems(options.gsm8k)
    tokenizer = _tokenizer(problems)
    tokenizer.save_pretrained(folder / "tokenizer")
    _small_model(len(tokenizer)).save_pretrained(folder / "model")
    chats = _written(folder / "chats.jsonl", _chats(problems, options.chats))
    section = DataSection(
        path=str(chats), preset="chat", packing="best_fit", seq_len=SEQ_LEN, batch_rows=ROWS
    )
    section = replace(section, cache=str(folder / "cache"))
    print(f"{platform.machine()}, {os.cpu_count()} cores; {options.chats:,} chats", flush=True)
    cold, batches = _cpu_seconds(lambda: _batches(section, tokenizer))
    tokens = len(batches.mixture.datasets[0].ids)
    cached, _ = _cpu_seconds(lambda: _batches(section, tokenizer))
    filling = _fill_seconds(batches, tokens)
    print(
        f"{tokens:,} tokens in {batches.num_samples:,} rows; CPU s: read, rendered and planned {cold:.1f}, "
        f"from the cache {cached:.2f}, rows filled {filling:.2f}",
        flush=True,
    )
    wait = _wait_share(batches, options.seconds)
    sets = {"chats": (section, chats, True)}
    if options.gsm8k:
        gsm8k = Path(options.gsm8k) / "train.jsonl"
        sets["gsm8k"] = (replace(section, path=str(gsm8k), preset="gsm8k"), gsm8k, False)
    with Trl(options.trl) as trl:
        ratios = {
            name: _beside_trl(name, each, path, is_chat, folder, tokenizer, trl)
            for name, (each, path, is_chat) in sets.items()
        }
    return {
        "tokens_per_second_per_core_cold": round(tokens / (cold + filling)),
        "tokens_per_second_per_core_cached": round(tokens / (cached + filling)),
        "input_wait_share": round(wait, 6),
        "preprocess_over_trl": ratios,
    }


def _beside_trl(
    name: str,
    section: DataSection,
    path: Path,
    is_chat: bool,
    folder: Path,
    tokenizer: PreTrainedTokenizerFast,
    trl: Trl,
) -> float:
    ours, batches = _cpu_seconds(lambda: _batches(replace(section, cache="none"), tokenizer))
    theirs = trl.ask(
        do="prepare",
        records=str(path),
        tokenizer=str(folder / "tokenizer"),
        model=str(folder / "model"),
        seq_len=SEQ_LEN,
        chat=is_chat,
    )
    tokens = len(batches.mixture.datasets[0].ids)
    print(
        f"{name}: {ours:.1f} CPU s for {batches.num_samples:,} rows of {tokens:,} tokens; "
        f"TRL {theirs['cpu_seconds']:.1f} CPU s for {theirs['rows']:,} rows of {theirs['tokens']:,} tokens",
        flush=True,
    )
    return round(theirs["cpu_seconds"] / ours, 2)


def _batches(section: DataSection, tokenizer: PreTrainedTokenizerFast) -> Batches:
    """Records to batches, the first of which is filled."""
    dataset, _ = tokenized(open_records(section.path, None, "train", None), tokenizer, section)
    batches = Batches(dataset, section, 1, None)
    batches.batch_at(0)
    return batches


def _fill_seconds(batches: Batches, tokens: int) -> float:
    """CPU seconds to fill all rows of an epoch, from those of up to 100 batches."""
    cursors = range(0, min(100 * ROWS, batches.num_samples), ROWS)
    seconds, filled = _cpu_seconds(lambda: [batches.batch_at(cursor).real_tokens for cursor in cursors])
    return seconds * tokens / sum(filled)


def _wait_share(batches: Batches, seconds: float) -> float:
    """How much of its time a loop waits that takes TRAINED_TOKENS_PER_SECOND and does nothing else."""
    step_seconds = ROWS * SEQ_LEN / TRAINED_TOKENS_PER_SECOND
    steps, waited, started = max(2, round(seconds / step_seconds)), 0.0, time.perf_counter()
    upcoming = prefetch(batches, 0, steps)
    for _ in range(steps):
        asked = time.perf_counter()
        next(upcoming)
        waited += time.perf_counter() - asked
        time.sleep(step_seconds)
    return waited / (time.perf_counter() - started)


def _cpu_seconds(work: Callable[[], Any]) -> tuple[float, Any]:
    started = time.process_time()
    result = work()
    return time.process_time() - started, result


def _problems(gsm8k: str | None) -> list[dict[str, Any]]:
    if gsm8k:
        return load_records(f"{gsm8k}/train.jsonl", None, "train", None)
    return list(training_records(7000, seed=0))


def _tokenizer(problems: Sequence[dict[str, Any]]) -> PreTrainedTokenizerFast:
    tokenizer = train_tokenizer((f"{p['question']} {p['answer']}" for p in problems), 16_000)
    special = [AddedToken(token, special=True) for token in ("<|im_start|>", "<|im_end|>")]
    tokenizer.add_special_tokens({"additional_special_tokens": special})
    tokenizer.chat_template = CHATML
    return tokenizer


def _small_model(vocab_size: int) -> LlamaForCausalLM:
    """What SFTTrainer has to be given before it looks at records."""
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
    )
    return LlamaForCausalLM(config)


def _chats(problems: Sequence[dict[str, Any]], count: int) -> list[dict[str, Any]]:
    rng, records = np.random.default_rng(0), []
    for index in range(count):
        turns = rng.integers(len(problems), size=rng.integers(1, 5))
        messages = [{"role": "system", "content": "You work step by step."}] if index % 3 == 0 else []
        for turn in turns:
            problem = problems[int(turn)]
            messages.append({"role": "user", "content": problem["question"]})
            messages.append({"role": "assistant", "content": problem["answer"]})
        records.append({"messages": messages})
    return records


def _written(path: Path, records: Sequence[dict[str, Any]]) -> Path:
    with path.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(record) + "\n" for record in records)
    return path


if __name__ == "__main__":
    main()
