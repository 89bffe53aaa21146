#!/usr/bin/env python3
"""Makes crates/smoothquant/tests/golden.json: scales and quantized activations by other hands.

Scales are the published formulas in float64. llm-compressor's `SmoothQuantModifier` is asked too and must agree; LMDeploy's
formula is written from its `awq.py` (a = max|x|, r = 0.5, one group per row). Quantized activations come from
compressed-tensors' `calculate_qparams` and `fake_quantize` where the engine's rule is the same (static scales, asymmetric
and float tokens, MX, NVFP4), and from the rule of vLLM's kernel, in numpy, for symmetric integer tokens.

Run with a Python that has torch, compressed-tensors and llmcompressor.
"""

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from compressed_tensors.quantization import QuantizationArgs
from compressed_tensors.quantization.lifecycle.forward import fake_quantize
from compressed_tensors.quantization.utils import calculate_qparams, compute_dynamic_scales_and_zp, generate_gparam
from llmcompressor.modifiers.transform.smoothquant.base import SmoothQuantModifier

OUT = Path(__file__).parent.parent.parent / "crates" / "smoothquant" / "tests" / "golden.json"
K, ROWS = 12, (5, 7)


def floats(tensor):
    """Nine digits, which give every float32 back."""
    return [float(f"{v:.9g}") for v in np.asarray(tensor, dtype=np.float64).ravel()]


def smooth(a, weights, alpha):
    w = np.max([np.abs(m).max(axis=0) for m in weights], axis=0)
    return np.where(w > 0, a**alpha / np.where(w > 0, w, 1) ** (1 - alpha), a)


def ask_llm_compressor(spans, weights, algorithm, alpha):
    layers = [SimpleNamespace(weight=torch.tensor(m, dtype=torch.float64)) for m in weights]
    modifier = SmoothQuantModifier(smoothing_strength=alpha, algorithm=algorithm)
    return modifier._calculate_smoothing_scales(layers, torch.tensor(spans, dtype=torch.float64)).numpy()


def lmdeploy(a, weights, frozen):
    w = np.concatenate(weights)
    mean = (np.abs(w) / np.abs(w).max(axis=1, keepdims=True)).mean(axis=0)
    s = np.maximum(a**0.5 / mean**0.5, 1e-4)
    live = s[~frozen]
    s = s / np.sqrt(live.max() * live.min())
    s[frozen] = 1
    return s


def scale_cases(rng):
    a = np.exp(rng.normal(size=K) * 1.5).astype(np.float32).astype(np.float64)
    weights = [(rng.normal(size=(n, K)) * 0.05).astype(np.float32).astype(np.float64) for n in ROWS]
    unread = [m.copy() for m in weights]
    for m in unread:
        m[:, 4] = 0
    cases = []
    for alpha in (0.0, 0.3, 0.5, 0.8, 1.0):
        for name, ms in (("read", weights), ("unread", unread)):
            expected = smooth(a, ms, alpha)
            # It takes max - min and 2 max|W|: with symmetric activations a common factor, but for unread channels.
            asked = ask_llm_compressor(2 * a, ms, "smoothquant", alpha)
            read = np.abs(np.concatenate(ms)).max(axis=0) > 0
            assert np.allclose(asked[read], expected[read] * 2 ** (2 * alpha - 1), rtol=1e-12)
            assert np.allclose(asked[~read], 2 * expected[~read], rtol=1e-12)
            cases.append({"weights": name, "algorithm": "smoothquant", "exponent": alpha, "scales": floats(expected)})
    expected = a / np.log2(2 + a)
    assert np.allclose(ask_llm_compressor(a, weights, "log_equalization", 0.5), expected, rtol=1e-12)
    cases.append({"weights": "read", "algorithm": "log_equalization", "exponent": 0.0, "scales": floats(expected)})
    frozen = np.zeros(K, bool)
    frozen[[2, 7]] = True
    expected = lmdeploy(a, weights, frozen)
    cases.append({"weights": "read", "algorithm": "lmdeploy", "exponent": 0.5, "scales": floats(expected)})
    sets = {"read": [floats(m) for m in weights], "unread": [floats(m) for m in unread]}
    return {"abs_max": floats(a), "rows": ROWS, "frozen": frozen.tolist(), "weights": sets, "cases": cases}


def vllm_tokens(x, top):
    absmax = np.abs(x).max(axis=1, keepdims=True)
    codes = np.rint(x * (np.float32(top) / absmax)).clip(-top - 1, top)
    return codes.astype(np.float32) * (absmax / np.float32(top))


def activation_cases(rng):
    width = 32
    x = (rng.normal(size=(6, width)) * np.exp(rng.normal(size=(6, 1)))).astype(np.float32)
    x[:, 3] *= 20
    x[2] = np.abs(x[2]) - 0.01
    t = torch.tensor(x)[None]  # batch, token, channel
    cases = []

    def add(format, scale, group, values, found=None):
        case = {"format": format, "scale": scale, "group": group, "values": floats(values)}
        if found is not None:
            case["found"] = [float(found[0]), int(found[1])]
        cases.append(case)

    for bits in (4, 8):
        add(f"int{bits}", "token", width, vllm_tokens(x, 2 ** (bits - 1) - 1))
        args = QuantizationArgs(num_bits=bits, type="int", symmetric=False, strategy="token", dynamic=True)
        add(f"uint{bits}", "token", width, fake_quantize(t, *compute_dynamic_scales_and_zp(t, args, None), args))
    for format, kind, bits in (("e4m3", "float", 8), ("int8", "int", 8), ("uint8", "int", 8)):
        args = QuantizationArgs(num_bits=bits, type=kind, symmetric=format != "uint8", strategy="tensor")
        scale, zero = calculate_qparams(t.min(), t.max(), args)
        add(format, "tensor", width, fake_quantize(t, scale, zero, args), (scale.item(), zero.item()))
    args = QuantizationArgs(num_bits=8, type="float", strategy="token", dynamic=True)
    add("e4m3", "token", width, fake_quantize(t, *compute_dynamic_scales_and_zp(t, args, None), args))
    args = QuantizationArgs(num_bits=8, type="float", strategy="group", group_size=16, dynamic=True)
    add("e4m3", "group", 16, fake_quantize(t, *compute_dynamic_scales_and_zp(t, args, None), args))
    for format, bits in (("e2m1", 4), ("e4m3", 8)):
        args = QuantizationArgs(num_bits=bits, type="float", strategy="group", group_size=32, dynamic=True, scale_dtype=torch.uint8, zp_dtype=torch.uint8)
        add(format, "mx", 32, fake_quantize(t, *compute_dynamic_scales_and_zp(t, args, None), args))
    args = QuantizationArgs(num_bits=4, type="float", strategy="tensor_group", group_size=16, dynamic="local", scale_dtype=torch.float8_e4m3fn, zp_dtype=torch.float8_e4m3fn)
    outer = generate_gparam(t.min(), t.max())
    scales, zero = compute_dynamic_scales_and_zp(t, args, None, global_scale=outer)
    add("e2m1", "local", 16, fake_quantize(t, scales, zero, args, global_scale=outer), (1 / outer.item(), 0))
    return {"width": width, "tokens": floats(x), "cases": cases}


def main():
    rng = np.random.default_rng(20)
    OUT.write_text(json.dumps({"scales": scale_cases(rng), "activations": activation_cases(rng)}) + "\n")


if __name__ == "__main__":
    main()
