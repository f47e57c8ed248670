"""Flags of the TPU compiler: those of a recipe, and those that suit the chip."""

from __future__ import annotations

import re
from collections.abc import Mapping

from tptrain.chips import Chip

AUTO = "auto"
DEFAULT = "default"
_FLAG = re.compile(r"--([A-Za-z]\w*)=(\S+)")

# KiB of a chip's vector memory that one operation may fill. By default it is 16 MiB, and matrix products of
# large models then wait for their operands: BUILD.md has the compiled programs. Chips that are not named
# keep the default.
_SCOPED_VMEM = "xla_tpu_scoped_vmem_limit_kib"
_SCOPED_VMEM_KIB = {"v5e": 49152, "v5p": 49152, "v6e": 98304}
# Products smaller than so many MiB are not cut into steps that each wait for one neighbour's piece.
_COLLECTIVE_MATMUL = "xla_jf_spmd_threshold_for_windowed_einsum_mib"
_NEVER_MIB = 1_000_000


def compiler_flags(text: str) -> dict[str, str]:
    """Name -> value of every flag that is written out; the words "auto" and "default" name none.

    Raises ValueError with the part that is neither a flag nor a first word.

    >>> compiler_flags("auto --xla_tpu_a=true --xla_b=4")
    {'xla_tpu_a': 'true', 'xla_b': '4'}
    """
    found: dict[str, str] = {}
    parts = text.split()
    for part in parts[1:] if parts[:1] == [AUTO] or parts == [DEFAULT] else parts:
        match = _FLAG.fullmatch(part)
        if match is None or match[1] in found:
            raise ValueError(part)
        found[match[1]] = match[2]
    return found


def chosen_flags(text: str, chip: Chip) -> dict[str, str]:
    """What the compiler is given: after "auto" the tuned flags, overridden by those written out."""
    tuned = tuned_flags(chip) if text.split()[:1] == [AUTO] else {}
    return {**tuned, **compiler_flags(text)}


def cuts_products_up(flags: Mapping[str, str]) -> bool:
    """Whether, with these flags, a product may run in steps beside the exchange of its operand or result."""
    return flags.get(_COLLECTIVE_MATMUL) != str(_NEVER_MIB)


def tuned_flags(chip: Chip) -> dict[str, str]:
    """Flags with which the programs of BUILD.md are estimated faster than with the compiler's own choices.

    Products run whole: cut up, they fill the matrix units so badly that waiting for what is exchanged costs
    less, also where a tensor axis exchanges activations.
    """
    found = {}
    if chip.name in _SCOPED_VMEM_KIB:
        found[_SCOPED_VMEM] = str(_SCOPED_VMEM_KIB[chip.name])
    if chip.platform == "tpu":
        found[_COLLECTIVE_MATMUL] = str(_NEVER_MIB)
    return found
