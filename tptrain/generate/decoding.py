"""Greedy decoding on any backend, with a static key-value cache.

Two programs are compiled per shape: one reads the padded prompts into the cache, one appends a token to
every row. Neither depends on the prompts' lengths. Shapes: B rows, P prompt tokens, M new tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from tptrain.backends.base import TORCH_DTYPES, Backend, CompiledStep, Tensors
from tptrain.config.plan import Plan
from tptrain.errors import refuse
from tptrain.mesh import Spec, spec_of
from tptrain.models.attention import KVCache
from tptrain.models.calling import call_method

# Steps between two looks at whether every row has ended; each look waits for the device.
_STEPS_BETWEEN_LOOKS = 16


class Generator:
    """Greedy answers for batches of prompts of up to `prompt_tokens` tokens.

    rows:           prompts answered at a time; rounded up to what the mesh splits evenly.
    prompt_tokens:  longest prompt. new_tokens: longest answer.
    stop_ids:       tokens that end an answer; they are not part of it.
    """

    def __init__(
        self,
        backend: Backend,
        plan: Plan,
        rows: int,
        prompt_tokens: int,
        new_tokens: int,
        stop_ids: Sequence[int],
    ):
        self._check_length(plan, prompt_tokens, new_tokens)
        self.rows = -(-rows // plan.batch_shards) * plan.batch_shards
        self.prompt_tokens, self.new_tokens = prompt_tokens, new_tokens
        self._backend, self._plan, self._stop_ids = backend, plan, tuple(stop_ids)
        self._decoder = backend.decoder()
        self._constants = {n: backend.put_constant(t) for n, t in self._decoder.constants().items()}
        self._programs: tuple[CompiledStep, CompiledStep] | None = None

    @staticmethod
    def _check_length(plan: Plan, prompt_tokens: int, new_tokens: int) -> None:
        longest = plan.facts.max_position_embeddings
        if prompt_tokens + new_tokens > longest:
            other = f"longest prompt {prompt_tokens}, max_position_embeddings={longest}"
            fix = f"at most {max(longest - prompt_tokens, 0)}, or shorter prompts"
            raise refuse("max_new_tokens", new_tokens, "with the prompt must fit the positions", other, fix)

    def generate(self, params: Tensors, prompts: Sequence[Sequence[int]]) -> list[list[int]]:
        """Token ids that follow each prompt, without the stop token.

        params: weights by buffer name, left as they are.
        """
        answers: list[list[int]] = []
        for start in range(0, len(prompts), self.rows):
            answers += self._generate_batch(params, prompts[start : start + self.rows])
        return answers

    def _generate_batch(self, params: Tensors, prompts: Sequence[Sequence[int]]) -> list[list[int]]:
        state, inputs = self._start(prompts)
        weights = {f"params/{name}": tensor for name, tensor in params.items()} | self._constants
        if self._programs is None:
            self._programs = self._compile(state, weights, inputs)
        prefill, append = self._programs
        state, outputs = prefill(state, {**weights, **inputs})
        for step in range(1, self.new_tokens):
            if step % _STEPS_BETWEEN_LOOKS == 0 and self._backend.fetch_scalars(outputs)["open_rows"] == 0:
                break
            state, outputs = append(state, weights)
        emitted = self._backend.fetch_rows(state["emitted"])
        return [self._cut(row) for row in emitted[: len(prompts)].tolist()]

    def _cut(self, ids: list[int]) -> list[int]:
        """Up to the first stop token, or to the first slot never written (-1)."""
        ends = [i for i, token in enumerate(ids) if token in self._stop_ids or token < 0]
        return ids[: ends[0]] if ends else ids

    def _start(self, prompts: Sequence[Sequence[int]]) -> tuple[Tensors, Tensors]:
        """Empty caches and the padded prompts. Rows without a prompt repeat the first one."""
        tokens = np.zeros((self.rows, self.prompt_tokens), np.int32)
        lengths = np.ones((self.rows, 1), np.int32)
        for row in range(self.rows):
            ids = prompts[row] if row < len(prompts) else prompts[0]
            assert 0 < len(ids) <= self.prompt_tokens, (
                f"prompt of {len(ids)} tokens, room for {self.prompt_tokens}"
            )
            tokens[row, : len(ids)], lengths[row] = ids, len(ids)
        positions = np.broadcast_to(np.arange(self.prompt_tokens, dtype=np.int32), tokens.shape).copy()
        dtype = TORCH_DTYPES[self._plan.recipe.precision.compute]
        caches = self._backend.make_caches(self.rows, self.prompt_tokens + self.new_tokens, dtype)
        rows = {
            "position": lengths - 1,
            "count": np.zeros((self.rows, 1), np.int32),
            "emitted": np.full((self.rows, self.new_tokens), -1, np.int32),
        }
        state = {**caches, **self._backend.put_batch(rows)}
        inputs = self._backend.put_batch({"prompt": tokens, "prompt_positions": positions})
        return state, inputs

    def _compile(
        self, state: Tensors, weights: Tensors, inputs: Tensors
    ) -> tuple[CompiledStep, CompiledStep]:
        specs = self._specs(state)
        # Compiling needs live arguments but does not consume them, so both programs take the same ones.
        prefill = self._backend.compile_step(self._prefill, state, {**weights, **inputs}, specs)
        append = self._backend.compile_step(self._append, state, weights, specs)
        return prefill, append

    def _specs(self, state: Tensors) -> dict[str, Spec]:
        acts = self._plan.rules.acts
        row = spec_of(("act_batch", "act_tokens"), acts)
        cache = spec_of(("act_batch", "act_keys", "act_kv_heads", "act_head_dim"), acts)
        return {n: row if t.ndim == 2 else ((),) * (t.ndim - 4) + cache for n, t in state.items()}

    def _prefill(self, state: Tensors, inputs: Tensors) -> tuple[Tensors, Tensors]:
        """Read the prompts; the first new token follows from the hidden state at each row's last token."""
        hidden, caches = self._run(state, inputs, inputs["prompt"], inputs["prompt_positions"])
        at_last = inputs["prompt_positions"] == state["position"]
        last = torch.where(at_last[..., None], hidden, 0.0).sum(1)
        return self._emit(state, caches, self._logits(inputs, last))

    def _append(self, state: Tensors, inputs: Tensors) -> tuple[Tensors, Tensors]:
        """Run the newest token of every row and choose the next one."""
        newest = self._slots(state) == state["count"] - 1
        token = torch.where(newest, state["emitted"], 0).sum(-1, keepdim=True, dtype=torch.int32)
        hidden, caches = self._run(state, inputs, token, state["position"])
        return self._emit(state, caches, self._logits(inputs, hidden[:, 0]))

    def _emit(
        self, state: Tensors, caches: Sequence[KVCache], logits: torch.Tensor
    ) -> tuple[Tensors, Tensors]:
        """Take the likeliest token [B], write it down, and move every row one position on."""
        token = logits.argmax(-1).to(torch.int32)[:, None]
        emitted = torch.where(self._slots(state) == state["count"], token, state["emitted"])
        ended = torch.zeros_like(emitted, dtype=torch.bool)
        for stop_id in self._stop_ids:
            ended = ended | (emitted == stop_id)
        new_state = {
            "position": state["position"] + 1,
            "count": state["count"] + 1,
            "emitted": emitted,
        }
        for index, cache in enumerate(caches):
            new_state[f"key.{index}"], new_state[f"value.{index}"] = cache.key, cache.value
        open_rows = (~ended.any(-1)).to(torch.int32).sum()
        return {name: new_state[name] for name in state}, {"open_rows": open_rows}

    def _slots(self, state: Tensors) -> torch.Tensor:
        """[1, M]: the numbers of the places for new tokens."""
        return torch.arange(self.new_tokens, device=state["emitted"].device)[None, :]

    def _run(
        self, state: Tensors, inputs: Tensors, tokens: torch.Tensor, positions: torch.Tensor
    ) -> tuple[torch.Tensor, Sequence[KVCache]]:
        count = sum(name.startswith("key.") for name in state)
        caches = [KVCache(state[f"key.{i}"], state[f"value.{i}"]) for i in range(count)]
        with torch.no_grad():
            return self._call("forward_cached", inputs, (tokens, positions, caches))

    def _logits(self, inputs: Tensors, hidden: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            return self._call("logits", inputs, (hidden,))

    def _call(self, method: str, inputs: Tensors, arguments: tuple[Any, ...]) -> Any:
        """Call a method of the decoder with the weights that are among `inputs`, in the compute format."""
        dtype = TORCH_DTYPES[self._plan.recipe.precision.compute]
        modules = {n[len("params/") :]: t.to(dtype) for n, t in inputs.items() if n.startswith("params/")}
        modules |= {name: inputs[name] for name in self._constants}
        return call_method(self._decoder, method, modules, arguments)
