"""When a step is saved and which saved steps are kept: small objects that know nothing of files.

A run saves a step when its SavePolicy says so, and always its last one. It keeps what any of its KeepPolicies
keeps, and always the newest step.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol


class SavePolicy(Protocol):
    """When to save."""

    def due(self, step: int, seconds_since_last_save: float) -> bool:
        """Whether `step`, counted from 1 and just done, is to be saved."""
        ...


@dataclass(frozen=True)
class EverySteps:
    """Every step that is a multiple of `steps`."""

    steps: int

    def due(self, step: int, seconds_since_last_save: float) -> bool:
        return step % self.steps == 0


@dataclass(frozen=True)
class EverySeconds:
    """The first step that ends when `seconds` have gone by since the last save, or since training began."""

    seconds: float

    def due(self, step: int, seconds_since_last_save: float) -> bool:
        return seconds_since_last_save >= self.seconds


@dataclass(frozen=True)
class AnyOf:
    """What any of these asks for; none of them: never."""

    policies: tuple[SavePolicy, ...]

    def due(self, step: int, seconds_since_last_save: float) -> bool:
        return any(policy.due(step, seconds_since_last_save) for policy in self.policies)


@dataclass(frozen=True)
class SavedStep:
    """A published step. metrics: what it was saved with, by name; empty for a step that was not scored."""

    step: int
    metrics: Mapping[str, float] = field(default_factory=dict)


class KeepPolicy(Protocol):
    """Which saved steps to keep."""

    def kept(self, saved: Sequence[SavedStep]) -> set[int]:
        """The steps, of those that are saved, that this policy keeps. saved: in any order."""
        ...


@dataclass(frozen=True)
class KeepLast:
    """The newest `count` steps."""

    count: int

    def kept(self, saved: Sequence[SavedStep]) -> set[int]:
        return set(sorted((s.step for s in saved), reverse=True)[: self.count])


@dataclass(frozen=True)
class KeepEvery:
    """Every saved step that is a multiple of `steps`."""

    steps: int

    def kept(self, saved: Sequence[SavedStep]) -> set[int]:
        return {s.step for s in saved if s.step % self.steps == 0}


@dataclass(frozen=True)
class KeepBest:
    """The `count` steps with the best `metric`; of equal ones the newer. Steps without that metric: none."""

    count: int
    metric: str
    higher_is_better: bool = True

    def kept(self, saved: Sequence[SavedStep]) -> set[int]:
        sign = 1 if self.higher_is_better else -1
        scored = [(sign * s.metrics[self.metric], s.step) for s in saved if self.metric in s.metrics]
        return {step for _, step in sorted(scored, reverse=True)[: self.count]}


def steps_to_delete(saved: Sequence[SavedStep], policies: Sequence[KeepPolicy]) -> list[int]:
    """Steps that no policy keeps, oldest first; never the newest, whatever the policies say."""
    if not saved:
        return []
    kept = {max(s.step for s in saved)}.union(*(policy.kept(saved) for policy in policies))
    return sorted(s.step for s in saved if s.step not in kept)
