"""Which libtpu compiles: its library, and the version that goes into every report."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from tptrain.errors import refuse

# The version that a run loads, from the extra `tpu`; a test compares it with pyproject.toml.
RUN_VERSION = "0.0.21"
LIBRARY = "libtpu.so"


@dataclass(frozen=True)
class Libtpu:
    """A TPU compiler. version: of the package that the library is from; "unknown" outside a package."""

    library: Path
    version: str

    @property
    def identity(self) -> str:
        """What tells one compiler from another in a cache."""
        if self.version != "unknown":
            return self.version
        stat = self.library.stat()
        return f"{self.library.resolve()} {stat.st_size} {stat.st_mtime_ns}"


def installed_libtpu() -> Libtpu | None:
    """The libtpu of this environment, which a run here would load; None without one."""
    spec = importlib.util.find_spec("libtpu")
    for folder in (spec.submodule_search_locations or ()) if spec else ():
        library = Path(folder) / LIBRARY
        if library.is_file():
            return Libtpu(library, _version_beside(library))
    return None


def libtpu_at(path: Path) -> Libtpu:
    """The libtpu that a path names: the library, the package's folder, or the folder it was installed into.

    Such a folder is made by `pip install --no-deps --target DIR libtpu==0.0.52`. Raises ProblemsError.
    """
    for library in (path, path / LIBRARY, path / "libtpu" / LIBRARY):
        if library.is_file():
            return Libtpu(library.resolve(), _version_beside(library.resolve()))
    rule = f"must be {LIBRARY} or a folder that libtpu was installed into"
    fix = f"the folder of `pip install --no-deps --target DIR libtpu=={RUN_VERSION}`"
    raise refuse("--libtpu", path, rule, f"looked for {LIBRARY} in it and in libtpu/", fix)


def _version_beside(library: Path) -> str:
    """The version of the package whose folder the library lies in."""
    for found in metadata.distributions(path=[str(library.parent.parent)]):
        if found.metadata["Name"] == "libtpu":
            return found.version
    return "unknown"
