"""Random numbers that are a function of what they are for, the same with every version of every library.

Owns: SplitMix64 (Steele et al., OOPSLA 2014), keys, permutations. Does not own: what is drawn with them.
"""

import numpy as np


def splitmix(z: np.ndarray) -> np.ndarray:
    """uint64 of any shape to uint64, well mixed."""
    with np.errstate(over="ignore"):
        z = z + np.uint64(0x9E3779B97F4A7C15)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return z ^ (z >> np.uint64(31))


def hashed(keys: tuple[int, ...], start: int, stop: int) -> np.ndarray:
    """uint64 [stop - start]: number i depends on `keys` and `start + i` alone."""
    state = np.zeros((), dtype=np.uint64)
    for key in keys:
        state = splitmix(state ^ np.uint64(key % 2**64))
    return splitmix(splitmix(np.arange(start, stop, dtype=np.uint64)) ^ state)


def uniform(keys: tuple[int, ...], start: int, stop: int) -> np.ndarray:
    """float64 [stop - start] in [0, 1), as `hashed`."""
    return (hashed(keys, start, stop) >> np.uint64(11)).astype(np.float64) * 2.0**-53


def permutation(keys: tuple[int, ...], size: int) -> np.ndarray:
    """int64 [size]: the numbers below `size` in an order that `keys` name."""
    return np.argsort(hashed(keys, 0, size), kind="stable")
