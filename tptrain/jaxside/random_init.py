"""New weights: what they are, on the host, and as a program that makes them where they are to stay.

A weight matrix is normal(key, size) * initializer_range, with a key for each row of the parameter table; the
first matrix of an adapter is uniform, as PEFT begins it.
JAX's generator ("threefry2x32", partitionable) counts positions: a number depends on the key and on its
position alone. So it is the same however layers are stacked and devices split them, and a device computes
its own numbers without those of another. In a JAX program they are, but for rounding (see `inverse_erf`),
`jax.random.normal(row_key(seed, name), size) * initializer_range`.
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Sequence
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import torch

from tptrain.family import ParamRow
from tptrain.family.table import Init
from tptrain.jaxside.lowering import lower_to_hlo

# A buffer of a backend: its rows, and whether they are stacked along a new first dim.
NewBuffer = tuple[tuple[ParamRow, ...], bool]

_GENERATOR = "threefry2x32"

# Coefficients from the highest power down; of M. Giles' polynomials below and above a logarithm of 5.
_CENTRAL = (
    *(2.81022636e-08, 3.43273939e-07, -3.5233877e-06, -4.39150654e-06, 0.00021858087, -0.00125372503),
    *(-0.00417768164, 0.246640727, 1.50140941),
)
_TAIL = (
    *(-0.000200214257, 0.000100950558, 0.00134934322, -0.00367342844, 0.00573950773, -0.0076224613),
    *(0.00943887047, 1.00167406, 2.83297682),
)
_LOG = (
    *(7.0376836292e-2, -1.1514610310e-1, 1.1676998740e-1, -1.2420140846e-1, 1.4249322787e-1),
    *(-1.6668057665e-1, 2.0000714765e-1, -2.4999993993e-1, 3.3333331174e-1),
)
_LOG_2_HIGH, _LOG_2_LOW = np.float32(0.693359375), np.float32(-2.12194440e-4)
_SQRT_HALF_BITS, _MANTISSA_BITS = 0x3F3504F3, 23


class RandomSource:
    """A TensorSource of new weights: float32, a pure function of (seed, row name, position in the row).

    A matrix is normal with mean 0 and standard deviation `initializer_range`; norms are ones, biases zeros;
    `kaiming_uniform` is He's (arXiv:1502.01852) with a = sqrt(5): within the root of 1 / (size of the last
    dim).
    On the host a matrix is made as a whole; the one asked for last is kept for its next slice.
    """

    def __init__(self, seed: int, initializer_range: float):
        self.seed = seed
        self.initializer_range = initializer_range
        self._lock = threading.Lock()
        self._kept: tuple[ParamRow, np.ndarray] | None = None

    def read(self, row: ParamRow, index: tuple[slice, ...]) -> torch.Tensor:
        """The slice `index` of a row, as a float32 CPU tensor."""
        assert row.tied_to is None, f"{row.name} is tied to {row.tied_to} and has no data of its own"
        return torch.from_numpy(self._whole(row)[index].copy())

    def _whole(self, row: ParamRow) -> np.ndarray:
        with self._lock:
            if self._kept is None or self._kept[0] != row:
                self._kept = None  # or two matrices would be in memory
                self._kept = row, self._make(row)
            return self._kept[1]

    def _make(self, row: ParamRow) -> np.ndarray:
        with jax.threefry_partitionable(True):
            words = key_words(self.seed, row.name)
            return np.asarray(_values(words, row.init, row.size, self.initializer_range))


def key_words(seed: int, name: str) -> np.ndarray:
    """The two uint32 of a row's key: the first eight bytes, little-endian, of SHA-256 of "<seed>/<name>"."""
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    return np.frombuffer(digest[:8], "<u4").astype(np.uint32)


def row_key(seed: int, name: str) -> jax.Array:
    """JAX's key of the row that Hugging Face files call `name`."""
    return jax.random.wrap_key_data(jnp.asarray(key_words(seed, name)), impl=_GENERATOR)


def keys_of(buffers: Sequence[NewBuffer], seed: int) -> np.ndarray:
    """The argument of `new_weights_hlo`: int32 [rows of all buffers, 2], the bits of each row's key."""
    return np.stack([key_words(seed, row.name) for rows, _ in buffers for row in rows]).view(np.int32)


@cache
def new_weights_hlo(buffers: tuple[NewBuffer, ...], initializer_range: float) -> bytes:
    """The module of (keys) -> a float32 array for every buffer, in memory size; padding is zero."""
    count = sum(len(rows) for rows, _ in buffers)

    def make(keys: jax.Array) -> list[jax.Array]:
        words, at, made = jax.lax.bitcast_convert_type(keys, jnp.uint32), 0, []
        for rows, stacked in buffers:
            one = partial(_padded, row=rows[0], initializer_range=initializer_range)
            made.append(jax.vmap(one)(words[at : at + len(rows)]) if stacked else one(words[at]))
            at += len(rows)
        return made

    # For CPUs, JAX lowers the generator to loops over whole arrays. As it lowers it for other platforms, a
    # CPU compiles it sooner, runs it faster, and keeps no array beside the result.
    with jax.threefry_partitionable(True):
        return lower_to_hlo(make, [jax.ShapeDtypeStruct((count, 2), jnp.int32)], "tpu")


def _padded(words: jax.Array, row: ParamRow, initializer_range: float) -> jax.Array:
    """A row in memory size. What is added at its end leaves the positions before it, and so the numbers."""
    size, padded = row.size, row.padded_size
    assert size[1:] == padded[1:], f"{row.name}: only the first dim may be padded"
    values: jax.Array = _values(words, row.init, padded, initializer_range)
    if size == padded:
        return values
    inside = jax.lax.broadcasted_iota(jnp.int32, padded, 0) < size[0]
    return jnp.where(inside, values, np.float32(0))


@partial(jax.jit, static_argnums=(1, 2, 3))
def _values(words: jax.Array, init: Init, size: tuple[int, ...], initializer_range: float) -> jax.Array:
    """words: uint32 [2], of the row's key."""
    if init in ("ones", "zeros"):
        return jnp.full(size, 1.0 if init == "ones" else 0.0, jnp.float32)
    key = jax.random.wrap_key_data(words, impl=_GENERATOR)
    above = np.nextafter(np.float32(-1), np.float32(0))
    uniform = jax.random.uniform(key, size, jnp.float32, above, 1)
    if init == "kaiming_uniform":
        return uniform * np.float32(1 / np.sqrt(size[-1]))
    return inverse_erf(uniform) * np.float32(np.sqrt(2) * initializer_range)


def inverse_erf(x: jax.Array) -> jax.Array:
    """The inverse error function of float32 in (-1, 1): M. Giles, "Approximating the erfinv function".

    It differs from `jax.lax.erf_inv` in the logarithm (and is closer to the truth). On CPUs XLA's rounds
    differently in the vectorised part of a loop and in the rest, so that a number would depend on the shape
    of a device's piece.
    """
    w = -_log((1 - x) * (1 + x))
    is_central = w < 5
    w = jnp.where(is_central, w - np.float32(2.5), jnp.sqrt(w) - np.float32(3))
    pairs = zip(_CENTRAL, _TAIL, strict=True)
    return _polynomial(w, [jnp.where(is_central, np.float32(c), np.float32(t)) for c, t in pairs]) * x


def _log(x: jax.Array) -> jax.Array:
    """The natural logarithm of normal positive float32, as Cephes' logf computes it."""
    bits = jax.lax.bitcast_convert_type(x, jnp.int32)
    exponent = (bits - _SQRT_HALF_BITS) >> _MANTISSA_BITS
    fraction = jax.lax.bitcast_convert_type(bits - (exponent << _MANTISSA_BITS), jnp.float32) - 1
    square, power = fraction * fraction, exponent.astype(jnp.float32)
    small = _polynomial(fraction, [np.float32(each) for each in _LOG]) * fraction * square
    small = small + power * _LOG_2_LOW - square * np.float32(0.5)
    return fraction + small + power * _LOG_2_HIGH


def _polynomial(x: jax.Array, coefficients: Sequence[jax.Array | np.float32]) -> jax.Array:
    value, *others = coefficients
    for coefficient in others:
        value = value * x + coefficient
    return jnp.asarray(value)
