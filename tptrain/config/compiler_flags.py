"""Flags of the TPU compiler, written in a recipe as libtpu takes them: `--name=value --other=value`."""

from __future__ import annotations

import re

DEFAULT = "default"
_FLAG = re.compile(r"--([A-Za-z]\w*)=(\S+)")


def compiler_flags(text: str) -> dict[str, str]:
    """Name -> value of every flag; "default" has none. Raises ValueError with the part that is no flag.

    >>> compiler_flags("--xla_tpu_a=true --xla_b=4")
    {'xla_tpu_a': 'true', 'xla_b': '4'}
    """
    found: dict[str, str] = {}
    for part in [] if text == DEFAULT else text.split():
        match = _FLAG.fullmatch(part)
        if match is None or match[1] in found:
            raise ValueError(part)
        found[match[1]] = match[2]
    return found
