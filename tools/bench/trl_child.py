"""The process in TRL's environment that answers a benchmark's requests."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
PYTHON = ROOT / ".venv-trl" / "bin" / "python"


class Trl:
    """TRL, asked one thing after the other. `with Trl(python) as trl: trl.ask(do="pack", ...)`."""

    def __init__(self, python: Path):
        """python: of TRL's environment."""
        if not python.exists():
            raise SystemExit(f"there is no {python}: make bench-data builds TRL's environment")
        self._python = python

    def __enter__(self) -> Trl:
        environ = {**os.environ, "TOKENIZERS_PARALLELISM": "false", "CUDA_VISIBLE_DEVICES": ""}
        environ |= {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error", "TQDM_DISABLE": "1"}
        self._child = subprocess.Popen(
            [str(self._python), str(ROOT / "tools" / "bench" / "trl_sides.py")],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environ,
        )
        return self

    def __exit__(self, *error: object) -> None:
        assert self._child.stdin is not None
        self._child.stdin.close()
        self._child.wait()

    def ask(self, **request: Any) -> dict[str, float]:
        assert self._child.stdin is not None and self._child.stdout is not None
        print(json.dumps(request), file=self._child.stdin, flush=True)
        answer = self._child.stdout.readline()
        if not answer:
            raise SystemExit(f"TRL's process ended with {self._child.wait()} at {request}")
        found: dict[str, float] = json.loads(answer)
        return found
