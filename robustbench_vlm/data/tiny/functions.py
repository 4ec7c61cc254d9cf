"""Functions and matrix products of arrays, with the same bits on every processor once they are float32.

Numpy's own for float32 take other instructions on a processor with AVX-512, and its matrix products have a
kernel for every kind. They differ in the last bit, which gave one image in a thousand another pixel. Here the
value is found in float64, where processors differ in digits that float32 does not have, and rounded once to
the type of the arguments.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float32]
Floats = NDArray[np.floating[Any]]


def _in_float64(function: Callable[..., Any], *values: Any) -> Any:  # noqa: ANN401 - of the arguments' shape
    kind = np.result_type(*values)
    return function(*(np.asarray(value, np.float64) for value in values)).astype(kind)


def cos(angle: Floats) -> Any:  # noqa: ANN401 - an array of angle's shape and type
    """The cosine of angles in radians."""
    return _in_float64(np.cos, angle)


def sin(angle: Floats) -> Any:  # noqa: ANN401 - an array of angle's shape and type
    """The sine of angles in radians."""
    return _in_float64(np.sin, angle)


def hypot(x: Floats, y: Floats) -> Any:  # noqa: ANN401 - an array of x's and y's shape
    """The length of vectors (x, y)."""
    return _in_float64(np.hypot, x, y)


def arctan2(y: Floats, x: Floats) -> Any:  # noqa: ANN401 - an array of x's and y's shape
    """The angle of vectors (x, y) to the x axis, in radians."""
    return _in_float64(np.arctan2, y, x)


def product(left: Floats, right: Floats) -> Any:  # noqa: ANN401 - an array of the product's shape
    """The matrix product of (..., M, K) and (..., K, N)."""
    return _in_float64(np.matmul, left, right)
