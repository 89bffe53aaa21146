#!/usr/bin/env python3
"""Makes tests/fixtures/pack/golden.safetensors, and checks the configs beside it.

Packed tensors come from compressed-tensors' own compressor (0.19 or newer) and, for the AWQ layout, from
AutoAWQ's published loop written in numpy. Tensor names are `<layout>/<bits>/<group>/<sym|asym>/<tensor>`;
`codes` and `zeros` are unsigned, `scales` are float32 and exact in the type of the packed scales.

`ct_config.json` and `awq_config.json` hold what the toolkit writes (a Rust test holds that); here the
readers' own classes parse them. Run with a Python that has torch, compressed-tensors and transformers.
"""

import json
from pathlib import Path

import numpy as np
import torch
from compressed_tensors import __version__ as ct_version
from compressed_tensors.compressors.pack_quantized.base import PackedQuantizationCompressor
from compressed_tensors.quantization import (
    QuantizationArgs,
    QuantizationConfig,
    QuantizationScheme,
    apply_quantization_config,
)
from safetensors.torch import save_file
from transformers.utils.quantization_config import AwqConfig, CompressedTensorsConfig

import unpack_awq

OUT = Path(__file__).parent.parent / "fixtures" / "pack"
AWQ_ORDER = [0, 2, 4, 6, 1, 3, 5, 7]  # AutoAWQ, WQLinear_GEMM.from_linear: order_map


def parameters(rng, bits, groups, n, k, symmetric, dtype):
    """Codes [n, k], zeros [n, groups], and scales [n, groups] rounded to dtype."""
    codes = rng.integers(0, 2**bits, (n, k), dtype=np.uint8)
    zeros = rng.integers(0, 2**bits, (n, groups), dtype=np.uint8)
    if symmetric:
        zeros[:] = 2 ** (bits - 1)
    scales = torch.from_numpy(rng.uniform(0.001, 0.1, (n, groups)).astype(np.float32)).to(dtype)
    return codes, zeros, scales


def case(tensors, prefix, codes, zeros, scales, packed):
    given = {"codes": torch.from_numpy(codes), "zeros": torch.from_numpy(zeros), "scales": scales.float()}
    for name, tensor in (given | packed).items():
        tensors[f"{prefix}/{name}"] = tensor.contiguous()


def compressed_tensors_case(tensors, rng, bits, group, symmetric):
    n, k = (13, 37) if group == -1 else (10, 48)
    groups = 1 if group == -1 else k // group
    dtype = torch.bfloat16 if bits % 2 else torch.float16
    codes, zeros, scales = parameters(rng, bits, groups, n, k, symmetric, dtype)
    middle = 2 ** (bits - 1)
    # In float32 the product is exact, so the compressor's own quantization finds the codes again.
    signed = codes.astype(np.float32) - np.repeat(zeros, k // groups, axis=1)
    weight = torch.from_numpy(signed) * scales.float().repeat_interleave(k // groups, dim=1)
    args = QuantizationArgs(
        num_bits=bits,
        symmetric=symmetric,
        strategy="channel" if group == -1 else "group",
        group_size=None if group == -1 else group,
    )
    scheme = QuantizationScheme(targets=["Linear"], weights=args)
    state = {"weight": weight, "weight_scale": scales.float()}
    state["weight_zero_point"] = torch.from_numpy((zeros.astype(np.int16) - middle).astype(np.int8))
    packed = PackedQuantizationCompressor.compress(state, scheme)
    back = PackedQuantizationCompressor.decompress(packed, scheme)["weight"]
    assert torch.equal(back, weight), "the compressor found other codes"
    assert ("weight_zero_point" in packed) != symmetric
    packed["weight_scale"] = scales
    kind = "sym" if symmetric else "asym"
    case(tensors, f"compressed-tensors/{bits}/{group}/{kind}", codes, zeros, scales, packed)


def awq_words(values):
    """[rows, N] codes to int32 [rows, N/8]."""
    rows, n = values.shape
    words = np.zeros((rows, n // 8), dtype=np.uint32)
    for column in range(n // 8):
        for i in range(8):
            words[:, column] |= values[:, column * 8 + AWQ_ORDER[i]].astype(np.uint32) << np.uint32(4 * i)
    return words.view(np.int32)


def awq_case(tensors, rng, group, symmetric):
    n, k = 24, 32
    groups = 1 if group == -1 else k // group
    codes, zeros, scales = parameters(rng, 4, groups, n, k, symmetric, torch.float16)
    qweight, qzeros = awq_words(codes.T), awq_words(zeros.T)
    assert np.array_equal(unpack_awq.unpack_words(qweight), codes.T)
    wanted = (codes.astype(np.float32) - np.repeat(zeros, k // groups, axis=1)) * np.repeat(
        scales.float().numpy(), k // groups, axis=1
    )
    assert np.array_equal(unpack_awq.dequantize(qweight, qzeros, scales.numpy().T), wanted)
    packed = {"qweight": torch.from_numpy(qweight), "qzeros": torch.from_numpy(qzeros), "scales_packed": scales.T}
    case(tensors, f"awq/4/{group}/{'sym' if symmetric else 'asym'}", codes, zeros, scales, packed)


def check_own_schemes(config):
    """compressed-tensors gives every linear the scheme that its name asks for, before that of its class."""
    layer = {"self_attn": ["q_proj", "o_proj"], "mlp": ["gate", "gate_proj", "down_proj"]}

    def module(children):
        parent = torch.nn.Module()
        for name, child in children.items():
            parent.add_module(name, child)
        return parent

    def linears(names):
        return module({name: torch.nn.Linear(128, 128, bias=False) for name in names})

    layers = [module({name: linears(own) for name, own in layer.items()}) for _ in range(2)]
    model = module({"model": module({"layers": torch.nn.ModuleList(layers)}), "lm_head": torch.nn.Linear(128, 8)})
    apply_quantization_config(model, QuantizationConfig.model_validate(config))
    found = {
        name: (child.quantization_scheme.weights.num_bits, child.quantization_scheme.weights.strategy)
        for name, child in model.named_modules()
        if getattr(child, "quantization_scheme", None) is not None
    }
    common = (4, "group")
    assert found == {
        "model.layers.0.self_attn.q_proj": common,
        "model.layers.0.self_attn.o_proj": common,
        "model.layers.0.mlp.gate": common,
        "model.layers.0.mlp.gate_proj": common,
        "model.layers.0.mlp.down_proj": (8, "group"),
        "model.layers.1.self_attn.q_proj": common,
        "model.layers.1.self_attn.o_proj": (4, "channel"),
        "model.layers.1.mlp.gate_proj": common,
        "model.layers.1.mlp.down_proj": (8, "group"),
    }, found


def check_configs():
    for name, config in json.loads((OUT / "ct_config.json").read_text()).items():
        parsed = QuantizationConfig.model_validate(config)
        assert list(parsed.config_groups) == list(config["config_groups"])
        for group, scheme in parsed.config_groups.items():
            weights, written = scheme.weights, config["config_groups"][group]["weights"]
            assert (weights.num_bits, weights.symmetric) == (written["num_bits"], written["symmetric"])
            assert (weights.strategy, weights.group_size) == (written["strategy"], written["group_size"])
            assert weights.actorder == written["actorder"]
            assert scheme.format == "pack-quantized"
        assert parsed.ignore == config["ignore"]
        assert CompressedTensorsConfig(**config).is_quantization_compressed
        print(f"{name}: accepted by compressed-tensors {ct_version} and transformers")
    check_own_schemes(json.loads((OUT / "ct_config.json").read_text())["w4_g128_sym_mixed"])
    for name, config in json.loads((OUT / "awq_config.json").read_text()).items():
        parsed = AwqConfig.from_dict(config)
        assert (parsed.bits, parsed.group_size, parsed.zero_point) == (4, config["group_size"], True)
        assert parsed.modules_to_not_convert == config.get("modules_to_not_convert")
        print(f"{name}: accepted by transformers")


def main():
    rng, tensors = np.random.default_rng(20), {}
    for bits in (2, 3, 4, 5, 8):
        for symmetric in (True, False):
            for group in (-1, 16):
                compressed_tensors_case(tensors, rng, bits, group, symmetric)
    for symmetric in (True, False):
        for group in (-1, 16):
            awq_case(tensors, rng, group, symmetric)
    path = OUT / "golden.safetensors"
    save_file(tensors, path)
    print(f"{path.name}: {path.stat().st_size} bytes, {len(tensors)} tensors")
    check_configs()


if __name__ == "__main__":
    main()
