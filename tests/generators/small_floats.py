#!/usr/bin/env python3
"""Makes tests/fixtures/pack/presets.safetensors, presets_config.json and tests/fixtures/small_floats.json.

The first holds one awkward float32 weight (ties, zeros of both signs, outliers, N no multiple of a block) and the
tensors that compressed-tensors' own compressor (0.19) makes of it under each preset, named `<preset>/<tensor>`; the
second the groups of their configs as the library writes them. The third holds what torch's float8 types say of every
code, and FNV-1a hashes of their roundings of all bf16 numbers. Run with a Python that has torch and compressed-tensors.
"""

import json
from pathlib import Path

import numpy as np
import torch
from compressed_tensors.compressors.base import compress_module
from compressed_tensors.quantization import (
    QuantizationArgs,
    QuantizationConfig,
    initialize_module_for_quantization,
    preset_name_to_scheme,
)
from compressed_tensors.compressors.format import infer_module_format
from compressed_tensors.quantization.utils.fp4_utils import cast_to_fp4
from compressed_tensors.quantization.utils.helpers import calculate_qparams, generate_gparam
from compressed_tensors.quantization.utils.mxfp_utils import generate_mx_scales
from compressed_tensors.compressors.nvfp4.helpers import pack_fp4_to_uint8
from safetensors.torch import save_file

FIXTURES = Path(__file__).parent.parent / "fixtures"
N, K = 20, 128
INPUT_ABSMAX = 4.0  # 2688 / 4 is the reciprocal of a float32


def awkward_weight():
    torch.manual_seed(4)
    weight = torch.randn(N, K) * 0.05
    e4m3 = torch.arange(0, 127, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    weight[0, :126] = (e4m3[:-1] + e4m3[1:]) / 2  # every tie of e4m3 under a scale of 1
    weight[0, 126:] = torch.tensor([448.0, -448.0])
    e2m1 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])
    ties = (e2m1[:-1] + e2m1[1:]) / 2
    weight[1] = torch.cat([ties, -ties, e2m1, -e2m1, torch.tensor([6.0, -6.0])]).repeat(4)[:K]
    weight[2] = 0.0
    weight[3, ::2], weight[3, 1::2] = 0.0, -0.0
    weight[3, 40] = 0.3
    weight[4, 7] = 1000.0  # an outlier
    weight[5] *= 1e-20
    weight[6, 32:64] = 0.0  # a group of zeros
    weight[7] = torch.linspace(-1.74, 1.75, K)
    weight[8] = torch.arange(K) / 2 - 32  # ties of int8 under a scale of 1 over two
    weight[9, 64:] *= 1e4
    return weight


def reduced(weight, args):
    """Smallest and largest value of each group, in the shape of the scales."""
    n, k = weight.shape
    if args.strategy == "tensor":
        parts = weight.reshape(1, -1)
        return parts.amin(-1), parts.amax(-1)
    if args.strategy == "channel":
        return weight.amin(-1, keepdim=True), weight.amax(-1, keepdim=True)
    if args.strategy in ("group", "tensor_group"):
        parts = weight.reshape(n, k // args.group_size, args.group_size)
        return parts.amin(-1), parts.amax(-1)
    tall, wide = args.block_structure
    padded = torch.nn.functional.pad(weight, (0, -k % wide, 0, -n % tall))
    parts = padded.reshape(padded.shape[0] // tall, tall, -1, wide).transpose(1, 2).flatten(-2)
    return parts.amin(-1), parts.amax(-1)


def compressed(weight, scheme):
    linear = torch.nn.Linear(K, N, bias=False)
    linear.weight.data = weight.clone()
    initialize_module_for_quantization(linear, scheme)
    args = scheme.weights
    low, high = reduced(weight, args)
    divisor = None
    if args.strategy == "tensor_group":
        divisor = generate_gparam(weight.amin(), weight.amax())
        linear.weight_global_scale.data = divisor
    scale, zero = calculate_qparams(low, high, args, global_scale=divisor)
    assert scale.shape == linear.weight_scale.shape, (scale.shape, linear.weight_scale.shape)
    linear.weight_scale.data, linear.weight_zero_point.data = scale, zero
    inputs = scheme.input_activations
    if inputs is not None and inputs.dynamic is False:
        at = torch.tensor([INPUT_ABSMAX])
        linear.input_scale.data = calculate_qparams(-at, at, inputs)[0]
    if inputs is not None and inputs.dynamic == "local":
        linear.input_global_scale.data = generate_gparam(torch.tensor(-INPUT_ABSMAX), torch.tensor(INPUT_ABSMAX))
    compress_module(linear)
    tensors = dict(linear.state_dict())
    tensors.pop("input_zero_point", None)
    return tensors


def schemes():
    names = ["W4A16", "W4A16_ASYM", "W8A16", "W8A8", "W4A8", "W4AFP8", "FP8", "FP8_DYNAMIC", "FP8_BLOCK"]
    for name in names + ["NVFP4", "NVFP4A16", "MXFP4", "MXFP4A16", "MXFP8", "MXFP8A16"]:
        yield name, preset_name_to_scheme(name, ["Linear"])
    cut = preset_name_to_scheme("FP8_BLOCK", ["Linear"])
    cut.weights = QuantizationArgs(num_bits=8, type="float", strategy="block", block_structure=[8, 48])
    yield "FP8_BLOCK_8x48", cut


def presets():
    weight = awkward_weight()
    tensors, configs = {"weight": weight}, {}
    for name, scheme in schemes():
        # llm-compressor's example of W4AFP8 asks for this; left alone it takes a byte for a four-bit code.
        scheme.format = "pack-quantized" if name == "W4AFP8" else infer_module_format(torch.nn.Linear, scheme)
        for suffix, tensor in compressed(weight, scheme).items():
            tensors[f"{name}/{suffix}"] = tensor.contiguous()
        config = QuantizationConfig(config_groups={"group_0": scheme})
        configs[name] = dict(sorted(config.model_dump(mode="json")["config_groups"]["group_0"].items()))
        for key in ("weights", "input_activations"):
            configs[name][key] = configs[name][key] and dict(sorted(configs[name][key].items()))
    path = FIXTURES / "pack" / "presets.safetensors"
    save_file(tensors, path)
    print(f"{path.name}: {path.stat().st_size} bytes, {len(tensors)} tensors")
    (FIXTURES / "pack" / "presets_config.json").write_text(json.dumps(configs, indent=1) + "\n")


def fnv(data):
    value = 0xCBF29CE484222325
    for byte in data:
        value = (value ^ byte) * 0x100000001B3 % 2**64
    return f"{value:016x}"


def small_floats():
    bits = np.arange(65536, dtype=np.uint32)
    numbers = torch.from_numpy((bits << 16).view(np.float32).copy())
    numbers = numbers[~numbers.isnan()]
    out = {"numbers": len(numbers)}
    codes = torch.arange(256, dtype=torch.uint8)
    for name, dtype in [("e4m3", torch.float8_e4m3fn), ("e5m2", torch.float8_e5m2), ("e8m0", torch.float8_e8m0fnu)]:
        values = codes.view(dtype).float()
        values = [None if value != value else value for value in values.tolist()]
        out[f"{name}_values"] = [str(value) if value in (float("inf"), float("-inf")) else value for value in values]
        if name != "e8m0":
            top = torch.finfo(dtype).max
            out[f"{name}_codes"] = fnv(numbers.clamp(-top, top).to(dtype).view(torch.uint8).numpy().tobytes())
    # A pair of each number, so that every code fills both halves of a byte. cast_to_fp4 drops the sign of zero.
    pairs = cast_to_fp4(numbers.clamp(-6, 6).clone()).repeat_interleave(2).reshape(1, -1)
    out["e2m1_codes"] = fnv(pack_fp4_to_uint8(pairs).numpy().tobytes())
    # From 1.75 · 2^127 on the power of two is infinite.
    sizes = numbers[(numbers >= torch.finfo(torch.float32).tiny) & (numbers < 1e38)]
    for name, width in [("e4m3", 8), ("e2m1", 4)]:
        scales = generate_mx_scales(sizes, num_bits=width).clamp(0, 254).to(torch.uint8)
        out[f"{name}_mx_codes"] = fnv(scales.numpy().tobytes())
    (FIXTURES / "small_floats.json").write_text(json.dumps(out) + "\n")
    print("small_floats.json", len(json.dumps(out)), "bytes")


if __name__ == "__main__":
    presets()
    small_floats()
