"""The topology of the machine at hand, told from its environment variables and nothing else."""

from __future__ import annotations

from collections.abc import Mapping

from tptrain.errors import refuse


def local_topology(environ: Mapping[str, str], backend: str = "xla") -> str:
    """What `topology=auto` stands for, as text for `parse_topology`.

    On a TPU VM its TPU_ACCELERATOR_TYPE, times MEGASCALE_NUM_SLICES; elsewhere, and with PJRT_DEVICE=CPU, as
    many virtual CPU devices as torch_xla's CPU_NUM_DEVICES asks for. The torch backend has one device.
    """
    if backend == "torch":
        return "cpu-1"
    accelerator = environ.get("TPU_ACCELERATOR_TYPE")
    if accelerator and environ.get("PJRT_DEVICE", "TPU") != "CPU":
        slices = _count(environ, "MEGASCALE_NUM_SLICES")
        return accelerator if slices == 1 else f"{slices}x{accelerator}"
    if environ.get("PJRT_DEVICE") == "TPU":
        rule = "must be named: this machine does not say which slice it belongs to"
        other = "PJRT_DEVICE=TPU, TPU_ACCELERATOR_TYPE is not set"
        raise refuse("topology", "auto", rule, other, "the slice's name, such as v6e-8")
    return f"cpu-{_count(environ, 'CPU_NUM_DEVICES')}"


def _count(environ: Mapping[str, str], variable: str) -> int:
    text = environ.get(variable, "1")
    if not text.isdecimal() or int(text) < 1:
        other = "it sets what topology=auto means"
        raise refuse(f"environment variable {variable}", text, "must be a whole number above 0", other, "1")
    return int(text)
