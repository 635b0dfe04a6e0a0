"""Weights in eight bits: what the policy that ships and the web edition's models are stored as.

A matrix [..., n] becomes whole numbers from -127 to 127, and one float16 scale for each GROUP of
numbers side by side: `name` and `name.scale` in a safetensors file. All else is float16. Numpy
alone: the web edition is built without torch.
"""

from collections.abc import Mapping
from math import gcd

import numpy as np

GROUP = 64
SCALE = ".scale"


def quantised(matrix: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """A float matrix [..., n] as (int8 [..., n], float16 scales [..., n / group]).

    Each number is off by at most half a scale: the largest of its group divided by 127, rounded up.
    """
    *rows, n = matrix.shape
    groups = matrix.astype(np.float32).reshape(*rows, -1, gcd(n, GROUP))
    largest = np.abs(groups).max(-1)
    scales = (largest / 127).astype(np.float16)
    too_small = 127 * scales.astype(np.float32) < largest  # it would clip the largest number
    scales = np.where(too_small, np.nextafter(scales, np.float16(np.inf)), scales)
    divisors = np.where(scales > 0, scales, np.float16(1)).astype(np.float32)
    whole = np.rint(groups / divisors[..., None]).astype(np.int8)
    return whole.reshape(matrix.shape), scales


def restored(whole: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """The float32 matrix of `quantised`'s two parts."""
    groups = whole.reshape(*scales.shape, -1).astype(np.float32)
    return (groups * scales.astype(np.float32)[..., None]).reshape(whole.shape)


def pack(tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Every matrix in eight bits, every vector in float16: what is stored."""
    packed = {}
    for name, tensor in tensors.items():
        if tensor.ndim < 2:
            packed[name] = tensor.astype(np.float16)
        else:
            packed[name], packed[name + SCALE] = quantised(tensor)
    return packed


def unpack(stored: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The float32 tensors of what `pack` stored."""
    return {
        name: restored(tensor, stored[name + SCALE])
        if name + SCALE in stored
        else tensor.astype(np.float32)
        for name, tensor in stored.items()
        if not name.endswith(SCALE)
    }
