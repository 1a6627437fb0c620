"""The library's only pseudo-random permutation: the same on every machine and with every version of numpy."""

from __future__ import annotations

from collections.abc import Sequence

import numpy
from numpy.typing import NDArray


def permutation(count: int, seed: Sequence[int]) -> NDArray[numpy.int64]:
    """A permutation of 0 ... count - 1, int64 [count], that depends on `seed` alone.

    numpy guarantees the raw bits of a generator, but not the results of its shuffles.
    """
    bits = numpy.random.PCG64(numpy.random.SeedSequence(seed)).random_raw(count)
    return numpy.argsort(bits, kind="stable")
