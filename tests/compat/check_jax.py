"""Run the README's snippet in this environment, and compare what it restores with what tptrain reads.

    python tests/compat/check_jax.py --readme README.md --params STEP/params --expected expected.npz

expected: an .npz of whole tensors by name (tests/compat/write_expected.py). The environment has neither torch
nor tptrain; JAX_NUM_CPU_DEVICES says on how many devices the weights are split.
"""

import argparse
import importlib.util
from pathlib import Path

import jax
import numpy as np

PLACE = "/path/to/runs/tiny_gsm8k/checkpoints/100/params"


def main() -> None:
    """Exits with an error unless every tensor is there, bit for bit, and split over all devices."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--readme", type=Path, required=True)
    parser.add_argument("--params", type=Path, required=True)
    parser.add_argument("--expected", type=Path, required=True)
    args = parser.parse_args()
    for name in ("torch", "tptrain"):
        assert importlib.util.find_spec(name) is None, f"{name} is installed here"
    names = {}
    exec(snippet(args.readme, args.params), names)
    params, expected = names["params"], np.load(args.expected)
    assert set(params) == set(expected.files), set(params) ^ set(expected.files)
    for name, array in params.items():
        assert np.array_equal(np.asarray(array), expected[name]), f"{name} differs"
        assert len(array.sharding.device_set) == jax.device_count(), name
    split = sum(not array.sharding.is_fully_replicated for array in params.values())
    assert jax.device_count() > 1 and split > len(params) // 2
    print(
        f"jax {jax.__version__}: {len(params)} tensors equal, {split} split over {jax.device_count()} devices"
    )


def snippet(readme: Path, params: Path) -> str:
    """The README's code that restores weights in plain JAX, for the folder `params`."""
    blocks = readme.read_text(encoding="utf-8").split("```python\n")[1:]
    (code,) = [block.split("```")[0] for block in blocks if PLACE in block]
    return code.replace(PLACE, str(params.absolute()))


if __name__ == "__main__":
    main()
