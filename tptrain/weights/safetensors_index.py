"""The index of a sharded checkpoint: which file holds which tensor, and whether the files agree with it."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath, PureWindowsPath

from tptrain.errors import Problem, ProblemsError, raise_if_any, refuse
from tptrain.untrusted import bounded_json, link_problems, printable
from tptrain.weights.stored_tensor import StoredTensor

TensorsByFile = Mapping[str, Mapping[str, StoredTensor]]


@dataclass(frozen=True)
class Index:
    """weight_map: tensor name -> file name. total_size: the bytes of all tensors as it says, or None."""

    path: Path
    weight_map: Mapping[str, str]
    total_size: object

    @property
    def files(self) -> list[str]:
        return sorted(set(self.weight_map.values()))


def read_index(path: Path, setting: str) -> Index:
    """Read an index; every file name in it is known to stay inside the folder, links aside.

    Raises ProblemsError if it is no index, or names files as no checkpoint does.
    """

    def bad(rule: str, other: str) -> ProblemsError:
        return refuse(setting, path, rule, other, "the index as save_pretrained wrote it, downloaded again")

    raise_if_any(link_problems(path.parent, [path.name], setting))
    try:
        content = bounded_json(path)
    except (OSError, ValueError) as error:
        raise bad("must be a JSON file", str(error)) from error
    weight_map = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise bad("must map tensor names to files", "it has no weight_map, or an empty one")
    wrong = [f"{printable(name)}: {file!r}" for name, file in weight_map.items() if not isinstance(file, str)]
    if wrong:
        raise bad("must map tensor names to file names", "; ".join(wrong))
    unclear = sorted({repr(name) for entry in weight_map.items() for name in entry if not _is_clear(name)})
    if unclear:
        raise bad("must name tensors and files in printable characters", ", ".join(unclear))
    outside = sorted({file for file in weight_map.values() if _leaves_folder(file)})
    if outside:
        raise bad("must name files inside its own folder", ", ".join(outside))
    metadata = content.get("metadata")
    return Index(path, weight_map, metadata.get("total_size") if isinstance(metadata, dict) else None)


def _is_clear(name: str) -> bool:
    # Neither empty, nor with a NUL, a control character or half of a surrogate pair, which no path may have.
    return bool(name) and name.isprintable()


def _leaves_folder(file: str) -> bool:
    """Whether a name leads out of its folder, on this or on another system. Links are looked at elsewhere."""
    path = PurePosixPath(file)
    return (
        path.is_absolute()
        or ".." in path.parts
        or not path.parts
        or "\\" in file
        or bool(PureWindowsPath(file).drive)
    )


def index_problems(index: Index, by_file: TensorsByFile, setting: str) -> list[Problem]:
    """Where an index and its files contradict each other: absent, unnamed and double tensors, the size."""
    homes = defaultdict(list)
    for file, tensors in by_file.items():
        for name in tensors:
            homes[name].append(file)
    absent = [f"{name} in {file}" for name, file in index.weight_map.items() if name not in by_file[file]]
    double = [f"{name} in {' and '.join(files)}" for name, files in homes.items() if len(files) > 1]
    unnamed = [
        f"{name} in {files[0]}"
        for name, files in homes.items()
        if len(files) == 1 and index.weight_map.get(name) != files[0]
    ]
    kinds = [
        (absent, "must name tensors that its files hold", "absent"),
        (double, "must belong to files that hold each tensor once", "stored more than once"),
        (unnamed, "must name every tensor of its files", "unnamed"),
    ]
    fix = "the checkpoint as it was saved, downloaded again"
    problems = [
        Problem(setting, index.path, rule, f"{len(found)} {label}: {', '.join(found)}", fix)
        for found, rule, label in kinds
        if found
    ]
    return problems or _size_problems(index, by_file, setting)


def _size_problems(index: Index, by_file: TensorsByFile, setting: str) -> list[Problem]:
    """A `total_size` that is not the bytes of all stored tensors, as transformers 4 and 5 write it."""
    stored = sum(tensor.num_bytes for tensors in by_file.values() for tensor in tensors.values())
    said = index.total_size
    if said is None or (isinstance(said, int | float) and said == stored):
        return []
    rule = "must give the bytes of all its tensors as metadata.total_size"
    fix = f"files that are complete; or, if they are, {stored} there"
    return [Problem(setting, index.path, rule, f"it says {said!r}, the files hold {stored}", fix)]
