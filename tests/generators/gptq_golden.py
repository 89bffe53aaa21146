#!/usr/bin/env python3
"""Makes tests/fixtures/pack/gptq.safetensors, and checks the configs in gptq_config.json.

Packed tensors come from the definition of the GPTQ layout, written bit by bit with numpy, and are read back
by AutoRound's `QuantLinear`, which takes zero points as they are stored (`gptq_v2`). Tensor names are
`gptq/<bits>/<group>/<sym|asym>/<tensor>`; `codes` and `zeros` are unsigned, `scales` are float32 and exact in
the type of the packed scales. Symmetric cases are stored as v1, zero points minus one, asymmetric ones as v2.

`gptq_config.json` holds what the toolkit writes (a Rust test holds that); here transformers parses it, and the
`dynamic` rules are looked up the way GPTQModel and vLLM do. Run with a Python that has torch, transformers and
auto-round.
"""

import json
import re
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from transformers.utils.quantization_config import GPTQConfig

OUT = Path(__file__).parent.parent / "fixtures" / "pack"


def words(values, bits):
    """[count, other] codes to int32 [count * bits / 32, other]: one stream of bits along the first axis."""
    count, other = values.shape
    assert count % 32 == 0
    stream = (values[:, None, :].astype(np.uint32) >> np.arange(bits)[None, :, None]) & 1
    stream = stream.reshape(count * bits // 32, 32, other)
    return (stream << np.arange(32, dtype=np.uint32)[None, :, None]).sum(axis=1, dtype=np.uint32).view(np.int32)


def three_bit_words(values):
    """The 3-bit packing as AutoGPTQ's loop spells it, 32 rows to three words."""
    out = []
    for i in range(0, len(values), 32):
        v = [row.astype(np.uint64) for row in values[i : i + 32]]
        first = sum(v[j] << np.uint64(3 * j) for j in range(10)) | (v[10] << np.uint64(30))
        second = (v[10] >> np.uint64(2)) & np.uint64(1)
        second |= sum(v[11 + j] << np.uint64(3 * j + 1) for j in range(10)) | (v[21] << np.uint64(31))
        third = (v[21] >> np.uint64(1)) & np.uint64(3)
        third |= sum(v[22 + j] << np.uint64(3 * j + 2) for j in range(10))
        out += [(word & np.uint64(0xFFFFFFFF)).astype(np.uint32).view(np.int32) for word in (first, second, third)]
    return np.stack(out)


def read_by_auto_round(bits, group, packed):
    """Weights [K, N] of the reader in AutoRound, which wants `gptq_v2` zero points."""
    from auto_round_extension.torch.qlinear_torch import QuantLinear

    k, n = packed["g_idx"].shape[0], packed["scales_packed"].shape[1]
    layer = QuantLinear(bits, group, k, n, bias=False, g_idx=True)
    layer.qweight, layer.qzeros, layer.g_idx = packed["qweight"], packed["qzeros"], packed["g_idx"]
    layer.scales = packed["scales_packed"].float()
    return layer(torch.eye(k))


def case(tensors, rng, bits, group, symmetric, n, k):
    width = k if group == -1 else group
    groups = k // width
    dtype = torch.bfloat16 if bits % 2 else torch.float16
    codes = rng.integers(0, 2**bits, (n, k), dtype=np.uint8)
    zeros = rng.integers(0, 2**bits, (n, groups), dtype=np.uint8)
    if symmetric:
        zeros[:] = 2 ** (bits - 1)
    else:
        zeros[:2, 0] = 0, 2**bits - 1
    scales = torch.from_numpy(rng.uniform(0.001, 0.1, (n, groups)).astype(np.float32)).to(dtype)
    packed = {
        "qweight": torch.from_numpy(words(codes.T, bits)),
        "qzeros": torch.from_numpy(words(zeros, bits).T.copy()),
        "scales_packed": scales.T,
        "g_idx": torch.arange(k, dtype=torch.int32) // width,
    }
    if bits == 3:
        assert np.array_equal(packed["qweight"].numpy(), three_bit_words(codes.T))
        assert np.array_equal(packed["qzeros"].numpy(), three_bit_words(zeros).T)
    wanted = (codes.astype(np.float32) - np.repeat(zeros, width, axis=1)) * scales.float().numpy().repeat(width, axis=1)
    assert torch.equal(read_by_auto_round(bits, group, packed), torch.from_numpy(wanted.T))
    if symmetric:
        packed["qzeros"] = torch.from_numpy(words(zeros - 1, bits).T.copy())
        known = {4: 0x77777777, 8: 0x7F7F7F7F, 2: 0x55555555}.get(bits)
        assert known is None or (packed["qzeros"] == known).all()
    given = {"codes": torch.from_numpy(codes), "zeros": torch.from_numpy(zeros), "scales": scales.float()}
    for name, tensor in (given | packed).items():
        tensors[f"gptq/{bits}/{group}/{'sym' if symmetric else 'asym'}/{name}"] = tensor.contiguous()


def dynamic_get(config, name):
    """GPTQModel's and vLLM's lookup: the first pattern that matches from the start. False: not quantized."""
    for pattern, overrides in config.get("dynamic", {}).items():
        if pattern.startswith("-:"):
            if re.match(pattern.removeprefix("-:"), name):
                return False
        elif re.match(pattern.removeprefix("+:"), name):
            return overrides
    return None


def check_configs():
    configs = json.loads((OUT / "gptq_config.json").read_text())
    for name, config in configs.items():
        parsed = GPTQConfig.from_dict(config)
        assert (parsed.bits, parsed.group_size, parsed.sym) == (config["bits"], config["group_size"], config["sym"])
        assert parsed.format == ("gptq" if config["sym"] else "gptq_v2")
        assert not parsed.desc_act and parsed.modules_in_block_to_quantize is None
        print(f"{name}: accepted by transformers")
    mixed = configs["w4_g128_sym_mixed"]
    wide = {"bits": 8, "group_size": 128}
    for name, wanted in {
        "model.layers.0.mlp.down_proj": wide,
        "model.layers.10.mlp.down_proj": None,
        "model.layers.1.self_attn.q_proj": wide,
        "model.layers.1.self_attn.qkv_proj": wide,
        "model.layers.1.mlp.gate": False,
        "model.layers.1.mlp.gate_proj": None,
        "model.layers.2.mlp.experts": {"bits": 4, "group_size": 32},
        "model.layers.2.mlp.experts.0.up_proj": {"bits": 4, "group_size": 32},
        "lm_head": None,
    }.items():
        assert dynamic_get(mixed, name) == wanted, name


def main():
    rng, tensors = np.random.default_rng(21), {}
    for bits in (2, 3, 4, 8):
        # Widths that are no whole number of cache lines, where the fixture stays small.
        case(tensors, rng, bits, 32, True, 32, 96 if bits in (3, 4) else 32)
        case(tensors, rng, bits, 16, False, 32, 64)
        case(tensors, rng, bits, -1, False, 32, 32)
    path = OUT / "gptq.safetensors"
    save_file(tensors, path)
    print(f"{path.name}: {path.stat().st_size} bytes, {len(tensors)} tensors")
    check_configs()


if __name__ == "__main__":
    main()
