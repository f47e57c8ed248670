"""Which attention a plan runs, with the tiles of its kernel, and how it computes the products of experts.

Both are decided here, before anything is compiled.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from tptrain.config.schema import KernelsSection, Recipe
from tptrain.config.settings import settings, shown, value_of
from tptrain.errors import Problem
from tptrain.family import ModelFacts
from tptrain.topology import Topology

# How the products of experts are computed: those of the tokens that chose them, or of all tokens.
ExpertsCore = Literal["grouped", "plain"]

# A TPU's vector registers are so wide, and the kernel lays tokens out along them.
LANES = 128
LARGEST_AUTO_BLOCK = 512

_TILE_SETTINGS = (
    *("kernels.splash_block_q", "kernels.splash_block_kv", "kernels.splash_block_kv_compute"),
    "kernels.splash_fused_backward",
)


@dataclass(frozen=True)
class SplashBlocks:
    """Tile sizes of the splash attention kernels, forward and backward, in tokens.

    query, key:     so many queries and keys lie in the chip's vector memory at a time; both are multiples of
                    128 that divide the tokens of a row.
    key_compute:    so many of those keys are worked on at a time; divides `key`.
    fused_backward: one backward kernel with 5 matrix products a tile, instead of two with 7 together. It
                    writes the gradient of the queries once per block of keys, in the compute format, and adds
                    them up afterwards: tokens / key times the memory of the queries.
    """

    query: int = LARGEST_AUTO_BLOCK
    key: int = LARGEST_AUTO_BLOCK
    key_compute: int = LARGEST_AUTO_BLOCK
    fused_backward: bool = False

    def describe(self) -> str:
        backward = "one backward kernel" if self.fused_backward else "two backward kernels"
        return f"{self.query} queries x {self.key} keys a tile, {self.key_compute} keys at a time, {backward}"


@dataclass(frozen=True)
class ChosenAttention:
    """The attention of a plan. blocks: the tiles of splash attention, None where plain attention runs."""

    blocks: SplashBlocks | None
    problems: tuple[Problem, ...] = ()
    notices: tuple[str, ...] = ()


def choose_attention(recipe: Recipe, topology: Topology) -> ChosenAttention:
    """Splash attention where the run is on TPUs and the kernel takes its rows, plain attention otherwise.

    What stands against the kernel is a problem where it was asked for. Under "auto" it is a notice, except
    on CPUs and with plain PyTorch, where nobody expects it.
    """
    asked = recipe.kernels.attention
    place, rows = _place_problems("kernels.attention", asked, recipe, topology), _row_problems(recipe)
    if asked == "plain" or (asked == "auto" and place):
        return ChosenAttention(None, notices=_idle_tiles(recipe))
    if asked == "auto" and rows:
        reason = f"{rows[0].setting}={rows[0].value} {rows[0].rule}"
        notice = f"Plain attention runs, not the splash kernel: {reason}; {rows[0].fix} would do."
        return ChosenAttention(None, notices=(notice, *_idle_tiles(recipe)))
    problems = [*place, *rows] or _tile_problems(recipe)
    return ChosenAttention(None if problems else _blocks(recipe), tuple(problems))


@dataclass(frozen=True)
class ChosenExperts:
    """How a plan computes the products of experts; core: None for a model without."""

    core: ExpertsCore | None
    problems: tuple[Problem, ...] = ()
    notices: tuple[str, ...] = ()


def choose_experts(recipe: Recipe, topology: Topology, facts: ModelFacts) -> ChosenExperts:
    """Grouped products where the run is on TPUs, plain ones otherwise."""
    asked = recipe.kernels.experts
    if facts.experts is None:
        idle = f"kernels.experts={asked} has no effect: the model has no experts."
        return ChosenExperts(None, notices=() if asked == "auto" else (idle,))
    place = _place_problems("kernels.experts", asked, recipe, topology)
    if asked == "plain" or (asked == "auto" and place):
        return ChosenExperts("plain")
    return ChosenExperts("grouped", tuple(place))


def _place_problems(setting: str, asked: str, recipe: Recipe, topology: Topology) -> list[Problem]:
    """What stands against a kernel for TPUs."""
    fix = "auto or plain"
    if recipe.backend != "xla":
        return [Problem(setting, asked, "needs the XLA backend", f"backend={recipe.backend}", fix)]
    if topology.chip.platform != "tpu":
        return [Problem(setting, asked, "is a kernel for TPUs", f"topology={topology.name}", fix)]
    return []


def _row_problems(recipe: Recipe) -> list[Problem]:
    seq_len = recipe.data.seq_len
    if seq_len % LANES == 0:
        return []
    below = seq_len // LANES * LANES
    fix = f"{below} or {below + LANES}" if below else f"{LANES}"
    other = f"kernels.attention={recipe.kernels.attention}"
    return [Problem("data.seq_len", seq_len, f"must be a multiple of {LANES}", other, fix)]


def _tile_problems(recipe: Recipe) -> list[Problem]:
    """Block sizes against the tokens of a row; the recipe's rows are known to be multiples of LANES."""
    seq_len, kernels = recipe.data.seq_len, recipe.kernels
    problems = [
        *_block_problem("splash_block_q", kernels, "data.seq_len", seq_len),
        *_block_problem("splash_block_kv", kernels, "data.seq_len", seq_len),
    ]
    if problems:
        return problems
    key = _block(kernels.splash_block_kv, seq_len)
    return _block_problem("splash_block_kv_compute", kernels, "kernels.splash_block_kv", key)


def _block_problem(name: str, kernels: KernelsSection, whole_name: str, whole: int) -> list[Problem]:
    value = getattr(kernels, name)
    passing = [block for block in range(LANES, whole + 1, LANES) if whole % block == 0]
    if value == -1 or value in passing:
        return []
    rule = f"must be a multiple of {LANES} that divides {whole_name}"
    fix = ", ".join(str(block) for block in passing)
    return [Problem(f"kernels.{name}", value, rule, f"{whole_name}={whole}", f"-1 or one of {fix}")]


def _blocks(recipe: Recipe) -> SplashBlocks:
    kernels = recipe.kernels
    key = _block(kernels.splash_block_kv, recipe.data.seq_len)
    return SplashBlocks(
        query=_block(kernels.splash_block_q, recipe.data.seq_len),
        key=key,
        key_compute=_block(kernels.splash_block_kv_compute, key),
        fused_backward=kernels.splash_fused_backward,
    )


def _block(asked: int, whole: int) -> int:
    """The block asked for; -1: the largest one up to LARGEST_AUTO_BLOCK that divides `whole`."""
    if asked != -1:
        return asked
    largest = min(LARGEST_AUTO_BLOCK, whole)
    return max(block for block in range(LANES, largest + 1, LANES) if whole % block == 0)


def _idle_tiles(recipe: Recipe) -> tuple[str, ...]:
    """A sentence for every tile setting that was changed although no kernel runs."""
    changed = [settings()[path] for path in _TILE_SETTINGS]
    values = [(setting, value_of(recipe, setting)) for setting in changed]
    return tuple(
        f"{setting.path}={shown(value)} has no effect with plain attention."
        for setting, value in values
        if value != setting.default
    )
