"""Order: which examples a step sees, as a pure function of (seed, step).

The data is an endless stream of epochs, each a fresh permutation; step s reads the s-th slice of the stream,
which may straddle two epochs. Nothing is remembered: a run is resumed by one integer, and any step can be
computed by itself.
"""

from functools import lru_cache

import numpy as np


def step_indices(*, seed: int, step: int, batch_size: int, size: int) -> list[int]:
    """The indices of the examples of one step.

    Args:
        seed: names the stream, ≥ 0.
        step: optimiser step, ≥ 0.
        batch_size: examples a step over all processes, ≥ 1; it may be larger than `size`.
        size: examples in the data, ≥ 1.
    Returns: `batch_size` indices in [0, size); over the stream every index comes once an epoch.
    Raises: ValueError naming the argument that is out of range.

    >>> sorted(i for step in (0, 1) for i in step_indices(seed=0, step=step, batch_size=2, size=4))
    [0, 1, 2, 3]
    """
    for name, value, least in (
        ("seed", seed, 0),
        ("step", step, 0),
        ("batch_size", batch_size, 1),
        ("size", size, 1),
    ):
        if value < least:
            raise ValueError(f"{name} must be at least {least}, got {value}")
    places = range(step * batch_size, (step + 1) * batch_size)
    return [int(_permutation(seed, place // size, size)[place % size]) for place in places]


@lru_cache(maxsize=4)
def _permutation(seed: int, epoch: int, size: int) -> np.ndarray:
    return np.random.default_rng([seed, epoch]).permutation(size)
