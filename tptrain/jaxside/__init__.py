"""What tptrain takes from JAX; with `ckpt`, the only part of the package that imports it."""
