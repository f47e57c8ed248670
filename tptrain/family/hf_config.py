"""Reading a Hugging Face config.json as plain data: types, required fields, both spellings of RoPE.

transformers 4 writes `rope_theta` and `rope_scaling`; transformers 5 writes `rope_parameters` alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tptrain.errors import Problem, unknown_name
from tptrain.family.facts import RopeFacts

ROPE_KINDS = ("default", "linear", "llama3")
_SETTING = "model.config"


class ConfigReader:
    """Typed access to a config dict that collects every problem instead of stopping at the first."""

    def __init__(self, config: Mapping[str, Any]):
        self.config = config
        self.problems: list[Problem] = []

    def report(self, field: str, value: object, rule: str, other: str, fix: str) -> None:
        self.problems.append(Problem(f"{_SETTING}.{field}", value, rule, other, fix))

    def is_bad(self, *fields: str) -> bool:
        """Whether one of these fields has been reported, so that checks built on it would only repeat it."""
        return any(
            problem.setting in {f"{_SETTING}.{field}" for field in fields} for problem in self.problems
        )

    def size(self, field: str, default: int | None = None) -> int:
        """A whole number above 0; without a default the field is required."""
        value = self.config.get(field, default)
        if value is None:
            self.report(field, None, "is required", "the config has no such field", "a whole number above 0")
            return 1
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            self.report(field, value, "must be a whole number above 0", "smallest: 1", "1 or more")
            return 1
        return value

    def number(self, field: str, default: float) -> float:
        value = self.config.get(field, default)
        if isinstance(value, bool) or not isinstance(value, int | float):
            self.report(field, value, "must be a number", f"default: {default}", str(default))
            return default
        return float(value)

    def flag(self, field: str, default: bool) -> bool:
        value = self.config.get(field, default)
        if not isinstance(value, bool):
            self.report(field, value, "must be true or false", f"default: {default}", str(default).lower())
            return default
        return value

    def must_be(self, field: str, allowed: tuple[Any, ...]) -> None:
        """A field that may be missing, but only holds values this package computes correctly."""
        if field in self.config and self.config[field] not in allowed:
            listed = " or ".join(repr(a) for a in allowed)
            self.report(field, self.config[field], "is not supported", f"supported: {listed}", listed)

    def rope(self) -> RopeFacts:
        """RoPE facts from either spelling. With both present, they must agree on the theta."""
        new = self.config.get("rope_parameters") or {}
        old = self.config.get("rope_scaling") or {}
        settings = {**old, **new}
        theta = new.get("rope_theta", self.config.get("rope_theta", 10000.0))
        if "rope_theta" in new and self.config.get("rope_theta", theta) != theta:
            other = f"rope_parameters.rope_theta={theta}"
            self.report("rope_theta", self.config["rope_theta"], "must agree with", other, str(theta))
        kind = settings.get("rope_type", settings.get("type", "default"))
        if kind not in ROPE_KINDS:
            self.problems.append(
                unknown_name(f"{_SETTING}.rope_parameters.rope_type", str(kind), "RoPE type", ROPE_KINDS)
            )
            return RopeFacts("default", float(theta))
        needed = {
            "default": (),
            "linear": ("factor",),
            "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
        }[kind]
        values: dict[str, Any] = {}
        for field in needed:
            if not isinstance(settings.get(field), int | float):
                path = f"rope_parameters.{field}"
                self.report(path, settings.get(field), "is required", f"rope_type={kind}", "a number")
            else:
                values[field] = settings[field]
        return RopeFacts(kind, float(theta), **values)
