"""Ways in which a step's files can go wrong, each as a function that does it to a step folder.

The step is of a Llama of two or more layers with an untied head, and an older step lies beside it. Every
function returns the path of the file that must be named.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

from tptrain.ckpt.digests import MANIFEST

Damage = Callable[[Path], str]

WEIGHTS = "params/model.layers.1.mlp.up_proj.weight/0.0"
MOMENT = "nu/lm_head.weight/0.0"


def flip(path: str, position: float, bit: int) -> Damage:
    """Flip one bit at a part of the file's length."""

    def do(step: Path) -> str:
        file = step / path
        content = bytearray(file.read_bytes())
        content[int(position * (len(content) - 1))] ^= 1 << bit
        file.write_bytes(content)
        return path

    return do


def truncate(path: str, keep: float) -> Damage:
    def do(step: Path) -> str:
        os.truncate(step / path, int((step / path).stat().st_size * keep))
        return path

    return do


def grow(path: str) -> Damage:
    def do(step: Path) -> str:
        with (step / path).open("ab") as file:
            file.write(b"\0")
        return path

    return do


def delete(path: str) -> Damage:
    def do(step: Path) -> str:
        (step / path).unlink()
        return path

    return do


def swap(one: str, other: str) -> Damage:
    """Exchange two files of the same size."""

    def do(step: Path) -> str:
        assert (step / one).stat().st_size == (step / other).stat().st_size
        os.rename(step / one, step / "aside")
        os.rename(step / other, step / one)
        os.rename(step / "aside", step / other)
        return one

    return do


def from_another_step(path: str) -> Damage:
    """The file of the step before: right in every respect but its content."""

    def do(step: Path) -> str:
        shutil.copyfile(step_before(step) / path, step / path)
        return path

    return do


def add(path: str) -> Damage:
    def do(step: Path) -> str:
        (step / path).write_bytes(b"\1" * 16)
        return path

    return do


def zero(path: str) -> Damage:
    """What a crash of the machine leaves of a file that never reached the disk."""

    def do(step: Path) -> str:
        (step / path).write_bytes(bytes((step / path).stat().st_size))
        return path

    return do


def manifest(text: str) -> Damage:
    def do(step: Path) -> str:
        (step / MANIFEST).write_text(text, encoding="utf-8")
        return MANIFEST

    return do


def edit_manifest(old: str, new: str) -> Damage:
    def do(step: Path) -> str:
        content = (step / MANIFEST).read_text(encoding="utf-8")
        assert old in content
        (step / MANIFEST).write_text(content.replace(old, new, 1), encoding="utf-8")
        return MANIFEST

    return do


def manifest_of_the_step_before(step: Path) -> str:
    shutil.copyfile(step_before(step) / MANIFEST, step / MANIFEST)
    return MANIFEST


def step_before(step: Path) -> Path:
    """The oldest step beside this one."""
    return step.parent / str(min(int(path.name) for path in step.parent.iterdir() if path.name.isdecimal()))


DAMAGES: dict[str, Damage] = {
    "first bit of weights": flip(WEIGHTS, 0.0, 0),
    "sign bit amid weights": flip(WEIGHTS, 0.5, 7),
    "last bit of a moment": flip(MOMENT, 1.0, 3),
    "bit of the run item": flip("run/metadata", 0.5, 1),
    "bit of the tree's metadata": flip("mu/_METADATA", 0.3, 2),
    "bit of an array's metadata": flip("params/model.norm.weight/.zarray", 0.4, 0),
    "weights cut": truncate(WEIGHTS, 0.9),
    "weights empty": truncate(WEIGHTS, 0.0),
    "run item cut": truncate("run/metadata", 0.5),
    "weights grown": grow(WEIGHTS),
    "weights gone": delete(WEIGHTS),
    "moment gone": delete(MOMENT),
    "run item gone": delete("run/metadata"),
    "array's metadata gone": delete("mu/model.norm.weight/.zarray"),
    "two matrices swapped": swap(WEIGHTS, "params/model.layers.0.mlp.up_proj.weight/0.0"),
    "weights and moment swapped": swap(WEIGHTS, WEIGHTS.replace("params", "mu")),
    "weights of another step": from_another_step(WEIGHTS),
    "run item of another step": from_another_step("run/metadata"),
    "a chunk too many": add("params/model.layers.1.mlp.up_proj.weight/9.9"),
    "weights zeroed": zero(WEIGHTS),
    "manifest empty": manifest(""),
    "manifest no JSON": manifest("{"),
    "manifest without files": manifest('{"format": 1, "algorithm": "xxh3_128", "step": 1}'),
    "manifest of another format": edit_manifest('"format": 1', '"format": 2'),
    "manifest of another step": manifest_of_the_step_before,
}
