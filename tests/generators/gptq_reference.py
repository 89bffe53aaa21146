#!/usr/bin/env python3
"""Makes tests/fixtures/gptq/layer.safetensors: one seeded layer solved by textbook GPTQ in float64.

Shares no code and no shortcut with the toolkit: the factor is Cholesky, inverse, upper Cholesky (Frantar et al. 2022,
algorithm 1), every column is handled on its own, activation order permutes explicitly. Group parameters are static:
min/max of the original weight in float32. `refined` is then three sweeps of coordinate descent over codes and scales.

The seed is the first from SEED on for which every rounding of the solve is at least MARGIN steps away from a tie, so
that arithmetic in float32 must give the very same codes.

Tensors: `weight` [N, K], `gram` [K, K]; for sym and asym: `scales`, `zeros` [N, G]; for each of these with `ordered` and
`plain` columns: `codes` [N, K], `loss` [1], `refined/codes`, `refined/scales`, `refined/loss`. Needs numpy only.
"""

import json
import struct
from pathlib import Path

import numpy as np

OUT = Path(__file__).parent.parent / "fixtures" / "gptq" / "layer.safetensors"
N, K, GROUP, BITS, TOKENS, DAMP, SWEEPS = 24, 96, 32, 4, 600, 0.01, 3
SEED, MARGIN = 20240607, 2e-5
TOP = 2**BITS - 1
NAMES = {"float32": "F32", "float64": "F64", "uint8": "U8"}


def layer(seed):
    """A weight and correlated inputs with decaying spectrum and a few loud channels."""
    rng = np.random.default_rng(seed)
    weight = (rng.standard_normal((N, K)) * 0.05).astype(np.float32)
    spectrum = 1.0 / (1.0 + np.arange(K)) ** 0.6
    x = (rng.standard_normal((TOKENS, K)) * spectrum) @ rng.standard_normal((K, K)) / np.sqrt(K)
    x[:, 5::29] *= 6.0
    return weight, (x.T @ x / TOKENS).astype(np.float32)


def parameters(weight, symmetric):
    """Scales and zeros [N, G], in float32 arithmetic."""
    groups = weight.reshape(N, K // GROUP, GROUP)
    low, high = np.minimum(groups.min(axis=2), 0), np.maximum(groups.max(axis=2), 0)
    if symmetric:
        scales = np.maximum(-low, high) / np.float32(2 ** (BITS - 1) - 0.5)
        return scales, np.full(scales.shape, 2 ** (BITS - 1), np.uint8)
    top = np.float32(TOP)
    scales = high / top - low / top
    return scales, np.clip(np.round(-low / scales), 0, TOP).astype(np.uint8)


def gptq(weight, gram, scales, zeros, ordered):
    """Codes [N, K] and the least distance of a rounding from a tie, in steps."""
    w, h = weight.astype(np.float64), gram.astype(np.float64)
    order = np.argsort(-np.diag(h), kind="stable") if ordered else np.arange(K)
    w, h = w[:, order], h[np.ix_(order, order)]
    h = h + DAMP * np.mean(np.diag(h)) * np.eye(K)
    lower = np.linalg.cholesky(h)
    inverse = np.linalg.inv(lower)
    upper = np.linalg.cholesky(inverse.T @ inverse).T
    codes, margin = np.zeros((N, K), np.uint8), 1.0
    for j in range(K):
        column = order[j]
        scale = scales[:, column // GROUP].astype(np.float64)
        zero = zeros[:, column // GROUP].astype(np.float64)
        position = w[:, j] / scale
        code = np.clip(np.round(position) + zero, 0, TOP)
        codes[:, column] = code
        margin = min(margin, np.min(np.abs(position - np.floor(position) - 0.5)))
        error = (w[:, j] - (code - zero) * scale) / upper[j, j]
        w[:, j:] -= np.outer(error, upper[j, j:])
    return codes, margin


def values(codes, scales, zeros):
    spread = lambda a: np.repeat(a.astype(np.float64), GROUP, axis=1)
    return (codes - spread(zeros)) * spread(scales)


def loss(weight, gram, codes, scales, zeros):
    d = weight - values(codes, scales, zeros)
    return np.array([np.sum((d @ gram.astype(np.float64)) * d)])


def refine(weight, gram, codes, scales, zeros):
    """Coordinate descent; the residual is computed anew for every move."""
    h = gram.astype(np.float64)
    h = h + DAMP * np.mean(np.diag(h)) * np.eye(K)
    codes, scales = codes.astype(np.float64), scales.copy()
    for _ in range(SWEEPS):
        for j in range(K):
            scale = scales[:, j // GROUP].astype(np.float64)
            zero = zeros[:, j // GROUP].astype(np.float64)
            residual = (weight - values(codes, scales, zeros)) @ h[:, j]
            best = (codes[:, j] - zero) * scale + residual / h[j, j]
            codes[:, j] = np.clip(np.round(best / scale) + zero, 0, TOP)
        for g in range(K // GROUP):
            own = slice(g * GROUP, (g + 1) * GROUP)
            steps = codes[:, own] - zeros[:, g : g + 1]
            residual = (weight - values(codes, scales, zeros)) @ h[:, own]
            curvature = np.sum((steps @ h[own, own]) * steps, axis=1)
            scales[:, g] = scales[:, g] + np.sum(residual * steps, axis=1) / curvature
    return codes.astype(np.uint8), scales


def write(path, tensors):
    header, data = {}, b""
    for name, array in tensors.items():
        blob = np.ascontiguousarray(array).tobytes()
        header[name] = {
            "dtype": NAMES[array.dtype.name],
            "shape": list(array.shape),
            "data_offsets": [len(data), len(data) + len(blob)],
        }
        data += blob
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)


def case(seed):
    """All tensors of one seed, or None if a rounding is too close to a tie."""
    weight, gram = layer(seed)
    tensors = {"weight": weight, "gram": gram}
    for kind in ("sym", "asym"):
        scales, zeros = parameters(weight, kind == "sym")
        tensors |= {f"{kind}/scales": scales, f"{kind}/zeros": zeros}
        for ordered in (True, False):
            prefix = f"{kind}/{'ordered' if ordered else 'plain'}"
            codes, margin = gptq(weight, gram, scales, zeros, ordered)
            if margin < MARGIN:
                return None
            refined, fitted = refine(weight, gram, codes, scales, zeros)
            tensors |= {
                f"{prefix}/codes": codes,
                f"{prefix}/loss": loss(weight, gram, codes, scales, zeros),
                f"{prefix}/refined/codes": refined,
                f"{prefix}/refined/scales": fitted,
                f"{prefix}/refined/loss": loss(weight, gram, refined, fitted, zeros),
            }
    return tensors


def main():
    seed = SEED
    while (tensors := case(seed)) is None:
        seed += 1
    for name in tensors:
        if name.endswith("loss"):
            print(seed, name, tensors[name][0])
    write(OUT, tensors)


if __name__ == "__main__":
    main()
