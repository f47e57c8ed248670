"""Reading a Hugging Face config.json as plain data: types, required fields, both spellings of RoPE.

transformers 4 writes `rope_theta` and `rope_scaling`; transformers 5 writes `rope_parameters` alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from tptrain.errors import Problem, unknown_name
from tptrain.family.facts import RopeFacts

SLIDING, FULL = "sliding_attention", "full_attention"
# RoPE type -> the fields it needs.
ROPE_KINDS: dict[str, tuple[str, ...]] = {
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
}
_SETTING = "model.config"
_ROPE_NAMES = ("rope_theta", "rope_type", "type")


class ConfigReader:
    """Typed access to a config dict that collects every problem instead of stopping at the first.

    fields: what was read, as a config.json that leaves nothing to a default would say it: Hugging Face name
            -> value, RoPE in both spellings.
    asked:  every name that was looked for.
    """

    def __init__(self, config: Mapping[str, Any]):
        self.config = config
        self.problems: list[Problem] = []
        self.fields: dict[str, Any] = {}
        self.asked: set[str] = set()

    def report(self, field: str, value: object, rule: str, other: str, fix: str) -> None:
        self.problems.append(Problem(f"{_SETTING}.{field}", value, rule, other, fix))

    def is_bad(self, *fields: str) -> bool:
        """Whether one of these fields has been reported, so that checks built on it would only repeat it."""
        return any(
            problem.setting in {f"{_SETTING}.{field}" for field in fields} for problem in self.problems
        )

    def get(self, field: str, default: Any = None) -> Any:
        """What the config holds, as it is."""
        self.asked.add(field)
        return self.config.get(field, default)

    def gives(self, field: str) -> bool:
        """Whether the config has the field; null is as good as nothing."""
        return self.get(field) is not None

    def size(self, field: str, default: int | None = None) -> int:
        """A whole number above 0; without a default the field is required."""
        value = self.get(field, default)
        if value is None:
            self.report(field, None, "is required", "the config has no such field", "a whole number above 0")
            value = 1
        elif isinstance(value, bool) or not isinstance(value, int) or value < 1:
            self.report(field, value, "must be a whole number above 0", "smallest: 1", "1 or more")
            value = 1
        self.fields[field] = value
        return value

    def size_by(self, field: str, other_field: str, default: int) -> int:
        """A size that has two names; with both present, they must agree."""
        theirs = self.get(other_field)
        value = self.size(field, default if theirs is None else theirs)
        if theirs is not None and theirs != value:
            self.report(field, value, "must agree with", f"{other_field}={theirs}", str(theirs))
        self.fields[other_field] = value
        return value

    def whole_number(self, field: str, default: int) -> int:
        """A whole number that may be 0."""
        value = self.get(field, default)
        if isinstance(value, bool) or not isinstance(value, int) or value < 0:
            self.report(field, value, "must be a whole number", "smallest: 0", "0 or more")
            value = default
        self.fields[field] = value
        return value

    def optional_size(self, field: str, default: int | None = None) -> int | None:
        """The same, or null; `default` where the field is missing."""
        if self.get(field, default) is None:
            self.fields[field] = None
            return None
        return self.size(field, default)

    def number(self, field: str, default: float) -> float:
        value = self.get(field, default)
        if isinstance(value, bool) or not isinstance(value, int | float):
            self.report(field, value, "must be a number", f"default: {default}", str(default))
            value = default
        self.fields[field] = value  # transformers takes no float for a field that it has an integer in
        return float(value)

    def optional_number(self, field: str, default: float | None = None) -> float | None:
        """The same, or null; `default` where the field is missing."""
        if self.get(field, default) is None:
            self.fields[field] = None
            return None
        return self.number(field, 1.0 if default is None else default)

    def flag(self, field: str, default: bool) -> bool:
        value = self.get(field, default)
        if not isinstance(value, bool):
            self.report(field, value, "must be true or false", f"default: {default}", str(default).lower())
            value = default
        self.fields[field] = value
        return value

    def must_be(self, field: str, allowed: tuple[Any, ...], write: bool = False) -> None:
        """A field that may be missing, but only holds values this package computes correctly.

        write: whether a complete config says it, too.
        """
        value = self.get(field, allowed[0])
        if value not in allowed:
            listed = " or ".join(repr(a) for a in allowed)
            self.report(field, value, "is not supported", f"supported: {listed}", listed)
        if write or field in self.config:
            self.fields[field] = value

    def layer_numbers(self, field: str, count: int) -> list[int]:
        """Numbers of some of `count` layers; none where the field is missing or null."""
        given = self.get(field)
        numbers: list[int] = [] if given is None else given
        is_list = isinstance(numbers, list) and all(type(number) is int for number in numbers)
        if not is_list or not all(0 <= number < count for number in numbers):
            rule, other = "must list layers by number", f"num_hidden_layers={count}"
            self.report(field, given, rule, other, f"a list of numbers from 0 to {count - 1}")
            numbers = []
        self.fields[field] = numbers
        return numbers

    def layer_types(self, default: Sequence[str]) -> list[str]:
        """For every layer SLIDING or FULL. default: where the config does not list them."""
        types = self.get("layer_types")
        if types is None:
            types = list(default)
        listed = f"a list of {len(default)} of {SLIDING!r} and {FULL!r}"
        if not isinstance(types, list) or len(types) != len(default):
            other = f"num_hidden_layers={len(default)}"
            self.report("layer_types", types, "must name the attention of every layer", other, listed)
            types = list(default)
        elif unknown := sorted({str(each) for each in types} - {SLIDING, FULL}):
            self.report(
                "layer_types", ", ".join(unknown), "is not supported", f"known: {SLIDING}, {FULL}", listed
            )
            types = list(default)
        self.fields["layer_types"] = types
        return types

    def rope(self, theta: float = 10000.0) -> RopeFacts:
        """RoPE facts from either spelling. With both present, they must agree on the theta.

        theta: where the config gives none.
        """
        new = self.get("rope_parameters") or {}
        old = self.get("rope_scaling") or {}
        found = self.rope_section({**old, **new}, self._theta(new, "rope_theta", theta), "rope_parameters")
        section = self._section(found, {**old, **new})
        self._write_rope(found, section, section)
        return found

    def ropes_by_layer_type(self, full: float, sliding: float) -> tuple[RopeFacts, RopeFacts]:
        """RoPE facts of full and of sliding layers, which transformers 4 calls the local ones.

        full, sliding: thetas where the config gives none.
        """
        new = self.get("rope_parameters") or {}
        news = [new.get(kind) or {} for kind in (FULL, SLIDING)]
        old = self.get("rope_scaling") or {}
        settings = [{**old, **news[0]}, news[1]]
        thetas = [
            self._theta(news[0], "rope_theta", full),
            self._theta(news[1], "rope_local_base_freq", sliding),
        ]
        kinds = (FULL, SLIDING)
        found = [
            self.rope_section(setting, theta, f"rope_parameters.{kind}")
            for setting, theta, kind in zip(settings, thetas, kinds, strict=True)
        ]
        sections = [self._section(rope, setting) for rope, setting in zip(found, settings, strict=True)]
        self._write_rope(found[0], sections[0], dict(zip(kinds, sections, strict=True)))
        self.fields["rope_local_base_freq"] = found[1].theta
        return found[0], found[1]

    def _theta(self, new: Mapping[str, Any], old_field: str, default: float) -> float:
        theta = new.get("rope_theta", self.get(old_field, default))
        if "rope_theta" in new and self.get(old_field, theta) != theta:
            other = f"rope_parameters' rope_theta={theta}"
            self.report(old_field, self.config[old_field], "must agree with", other, str(theta))
        return float(theta)

    def rope_section(self, settings: Mapping[str, Any], theta: float, path: str) -> RopeFacts:
        """The facts in one section of settings. path: where they stand, for messages."""
        kind = settings.get("rope_type", settings.get("type", "default"))
        if kind not in ROPE_KINDS:
            self.problems.append(
                unknown_name(f"{_SETTING}.{path}.rope_type", str(kind), "RoPE type", ROPE_KINDS)
            )
            return RopeFacts("default", theta)
        values: dict[str, Any] = {}
        for field in ROPE_KINDS[kind]:
            if not isinstance(settings.get(field), int | float):
                rule, other = "is required", f"rope_type={kind}"
                self.report(f"{path}.{field}", settings.get(field), rule, other, "a number")
            else:
                values[field] = settings[field]
        return RopeFacts(kind, theta, **values)

    @staticmethod
    def _section(rope: RopeFacts, given: Mapping[str, Any]) -> dict[str, Any]:
        # transformers 4 warns of a factor that is not a float.
        scaling = {
            name: float(value) if name.endswith("factor") else value
            for name, value in given.items()
            if name not in _ROPE_NAMES
        }
        return {"rope_theta": rope.theta, "rope_type": rope.kind, **scaling}

    def _write_rope(self, rope: RopeFacts, section: Mapping[str, Any], new: Mapping[str, Any]) -> None:
        """Both spellings; section: of `rope`. In the old one, null stands for the default kind."""
        scaling = {name: value for name, value in section.items() if name != "rope_theta"}
        self.fields["rope_theta"] = rope.theta
        self.fields["rope_scaling"] = None if rope.kind == "default" else scaling
        self.fields["rope_parameters"] = dict(new)
