"""Write the weights of a checkpoint step as tptrain reads them, for check_jax.py.

python tests/compat/write_expected.py --step RUN/checkpoints/30 --out expected.npz
"""

import argparse
from pathlib import Path

import numpy as np

from tptrain.ckpt.reading import StepReader
from tptrain.family import facts_from_config, parameter_table, stored_rows


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--step", type=Path, required=True, help="the step's folder")
    parser.add_argument("--out", type=Path, required=True, help="the file to write")
    args = parser.parse_args()
    reader = StepReader(args.step)
    rows = stored_rows(parameter_table(facts_from_config(reader.run["hf_config"])))
    np.savez(args.out, **{row.name: reader.read(row).numpy() for row in rows})
    print(f"{args.out}: {len(rows)} tensors")


if __name__ == "__main__":
    main()
