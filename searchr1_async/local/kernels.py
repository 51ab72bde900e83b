"""Compiled kernels for decoding a few rows on a CPU, in float32: all that lies between a layer's products.

In torch these are thirty operations a layer, each of which costs more to call than to compute while the weights stream through the
processor's caches. numba compiles each kernel at its first call and keeps it on disk. Shapes: R rows, H heads, K key heads, S head
size, N hidden size, M outputs of the gate.
"""

from __future__ import annotations

import numpy as np
from numba import njit
from numpy.typing import NDArray

Floats = NDArray[np.float32]
Integers = NDArray[np.int64]
# As fast as -ffast-math where it matters, but infinities and NaN keep their meaning: they tell that training has diverged.
_OPTIONS = {"fastmath": {"reassoc", "contract", "arcp", "nsz"}, "error_model": "numpy", "cache": True, "nogil": True}


@njit(**_OPTIONS)
def add_and_norm(x_RN: Floats, y_RN: Floats, weight_N: Floats, eps: float, out_RN: Floats, rows: int) -> None:
    """Adds y to x in place; ``out = x / sqrt(mean(x²) + eps) · weight``, of the first ``rows``."""
    size = x_RN.shape[1]
    for row in range(rows):
        square = np.float32(0.0)
        for i in range(size):
            value = x_RN[row, i] + y_RN[row, i]
            x_RN[row, i] = value
            square += value * value
        inverse = np.float32(1.0 / np.sqrt(square / size + eps))
        for i in range(size):
            out_RN[row, i] = x_RN[row, i] * inverse * weight_N[i]


@njit(**_OPTIONS)
def swiglu(gate_up_R2M: Floats, out_RM: Floats, rows: int) -> None:
    """``silu(gate) · up``, gate first, of the first ``rows``."""
    size = out_RM.shape[1]
    for row in range(rows):
        for i in range(size):
            gate = gate_up_R2M[row, i]
            out_RM[row, i] = gate / (np.float32(1.0) + np.exp(-gate)) * gate_up_R2M[row, size + i]


@njit(**_OPTIONS)
def rotate_and_store(
    qkv_RX: Floats,
    turns: tuple[Floats, Floats],
    keys_values: tuple[Floats, Floats],
    slots_R: Integers,
    places_R: Integers,
    first: int,
) -> None:
    """Rotates queries and keys in place, and stores keys and values.

    ``qkv`` [rows, (H + 2K) · S]: queries, keys and values. ``turns``: cosine and sine [rows, S / 2]. ``keys_values``: of one layer,
    each [slots, K, capacity, S]. Row ``first + r`` is the token at ``places[r]`` of ``slots[r]``.
    """
    (cos, sin), (keys, values) = turns, keys_values
    _, key_heads, _, size = keys.shape
    heads = qkv_RX.shape[1] // size - 2 * key_heads
    half = size // 2
    for r in range(len(slots_R)):
        row = first + r
        for head in range(heads + key_heads):
            vector = qkv_RX[row, head * size : (head + 1) * size]
            for i in range(half):
                low, high = vector[i], vector[half + i]
                vector[i] = low * cos[row, i] - high * sin[row, i]
                vector[half + i] = high * cos[row, i] + low * sin[row, i]
        for head in range(key_heads):
            start = (heads + head) * size
            keys[slots_R[r], head, places_R[r]] = qkv_RX[row, start : start + size]
            start += key_heads * size
            values[slots_R[r], head, places_R[r]] = qkv_RX[row, start : start + size]


@njit(**_OPTIONS)
def attend(
    qkv_RX: Floats,
    keys_values: tuple[Floats, Floats],
    slots_R: Integers,
    places_R: Integers,
    out_RN: Floats,
    first: int,
    share: tuple[int, int],
) -> None:
    """Attention after :func:`rotate_and_store`: each row to its slot up to itself; ``out`` [rows, H · S].

    ``share`` (i, n): only the i-th of n equal shares of the rows and key heads, so that n threads can work at once.
    """
    keys, values = keys_values
    _, key_heads, capacity, size = keys.shape
    group = out_RN.shape[1] // size // key_heads
    scores = np.empty((group, capacity), np.float32)
    number, shares = share
    items = len(slots_R) * key_heads
    for item in range(items * number // shares, items * (number + 1) // shares):
        r, head = item // key_heads, item % key_heads
        row, seen = first + r, places_R[r] + 1
        columns = slice(head * group * size, (head + 1) * group * size)
        queries = qkv_RX[row, columns].reshape(group, size)
        outputs = out_RN[row, columns].reshape(group, size)
        for g in range(group):
            _score(queries[g], keys[slots_R[r], head], scores[g, :seen])
            _softmax(scores[g, :seen], np.float32(1.0 / np.sqrt(size)))
        _mix(scores[:, :seen], values[slots_R[r], head], outputs)


@njit(**_OPTIONS)
def _score(query_S: Floats, keys_TS: Floats, scores_T: Floats) -> None:
    """The query's product with each of the first T keys. Four at a time: each load of the query serves four."""
    size, seen = len(query_S), len(scores_T)
    for t in range(0, seen - 3, 4):
        a = b = c = d = np.float32(0.0)
        for i in range(size):
            q = query_S[i]
            a += q * keys_TS[t, i]
            b += q * keys_TS[t + 1, i]
            c += q * keys_TS[t + 2, i]
            d += q * keys_TS[t + 3, i]
        scores_T[t], scores_T[t + 1], scores_T[t + 2], scores_T[t + 3] = a, b, c, d
    for t in range(seen // 4 * 4, seen):
        a = np.float32(0.0)
        for i in range(size):
            a += query_S[i] * keys_TS[t, i]
        scores_T[t] = a


@njit(**_OPTIONS)
def _mix(weights_GT: Floats, values_TS: Floats, out_GS: Floats) -> None:
    """The first T values, weighted and added. Four at a time, for the same reason."""
    group, seen = weights_GT.shape
    size = out_GS.shape[1]
    out_GS[:] = np.float32(0.0)
    for t in range(0, seen - 3, 4):
        for g in range(group):
            a, b, c, d = weights_GT[g, t], weights_GT[g, t + 1], weights_GT[g, t + 2], weights_GT[g, t + 3]
            for i in range(size):
                out_GS[g, i] += (
                    a * values_TS[t, i] + b * values_TS[t + 1, i] + c * values_TS[t + 2, i] + d * values_TS[t + 3, i]
                )
    for t in range(seen // 4 * 4, seen):
        for g in range(group):
            for i in range(size):
                out_GS[g, i] += weights_GT[g, t] * values_TS[t, i]


@njit(**_OPTIONS)
def _softmax(scores_T: Floats, scale: np.float32) -> None:
    most = scores_T[0]
    for t in range(len(scores_T)):
        most = max(most, scores_T[t])
    total = np.float32(0.0)
    for t in range(len(scores_T)):
        scores_T[t] = np.exp((scores_T[t] - most) * scale)
        total += scores_T[t]
    for t in range(len(scores_T)):
        scores_T[t] /= total
