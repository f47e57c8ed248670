"""TRL's side of the benchmarks of data, run in TRL's own environment; see packing.py and input.py.

Reads one request a line from stdin, as JSON, and answers each with one line of JSON. What TRL prints goes to
stderr.

    {"do": "pack", "lengths": FILE.npy, "seq_len": N, "batch": N}    -> seconds, rows
    {"do": "prepare", "records": FILE.jsonl, "tokenizer": FOLDER, "model": FOLDER, "seq_len": N, "chat": BOOL}
                                                                    -> seconds, cpu_seconds, rows, tokens
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
from typing import Any

answers = os.fdopen(os.dup(1), "w")
os.dup2(2, 1)

import datasets  # noqa: E402
import numpy as np  # noqa: E402
import pyarrow  # noqa: E402
from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: E402
from trl import SFTConfig, SFTTrainer, pack_dataset  # noqa: E402

datasets.disable_caching()
datasets.disable_progress_bars()


def pack(request: dict[str, Any]) -> dict[str, float]:
    """Best-fit decreasing over sequences of these lengths, `batch` of them at a time."""
    lengths = np.load(request["lengths"])
    offsets = np.concatenate(([0], np.cumsum(lengths)))
    ids = pyarrow.LargeListArray.from_arrays(offsets, np.zeros(offsets[-1], dtype=np.int32))
    dataset = datasets.Dataset(pyarrow.table({"input_ids": ids}))
    started = time.perf_counter()
    packed = pack_dataset(dataset, request["seq_len"], "bfd", {"batch_size": request["batch"]})
    return {"seconds": time.perf_counter() - started, "rows": len(packed)}


def prepare(request: dict[str, Any]) -> dict[str, float]:
    """All that SFTTrainer does with its records before training: templates, tokens, masks, packing."""
    tokenizer = AutoTokenizer.from_pretrained(request["tokenizer"])
    model = AutoModelForCausalLM.from_pretrained(request["model"])
    dataset = datasets.load_dataset("json", data_files=request["records"], split="train")
    if not request["chat"]:
        dataset = dataset.map(
            lambda r: {"prompt": f"Question: {r['question']}\nAnswer:", "completion": f" {r['answer']}"},
            remove_columns=dataset.column_names,
        )
    with tempfile.TemporaryDirectory() as folder:
        settings = SFTConfig(
            output_dir=folder,
            packing=True,
            max_length=request["seq_len"],
            assistant_only_loss=request["chat"],
            use_cpu=True,
            bf16=False,
            report_to=[],
        )
        started, cpu = time.perf_counter(), time.process_time()
        trainer = SFTTrainer(model=model, args=settings, train_dataset=dataset, processing_class=tokenizer)
        seconds, cpu_seconds = time.perf_counter() - started, time.process_time() - cpu
    tokens = sum(len(row) for row in trainer.train_dataset["input_ids"])
    return {
        "seconds": seconds,
        "cpu_seconds": cpu_seconds,
        "rows": len(trainer.train_dataset),
        "tokens": tokens,
    }


for line in sys.stdin:
    asked = json.loads(line)
    print(json.dumps({"pack": pack, "prepare": prepare}[asked["do"]](asked)), file=answers, flush=True)
