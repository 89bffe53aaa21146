#!/usr/bin/env python3
"""A tiny random gpt-oss in MXFP4, and the values transformers reads from its codes.

    python tests/generators/fused_experts.py tests/fixtures/fused

`gpt-oss-mxfp4` holds `config.json` and `model.safetensors` as such models are published, experts of a layer in
`gate_up_proj_blocks`, `gate_up_proj_scales` and so on, and `values.safetensors`: the weights of the experts one by one,
dequantized by transformers' `convert_moe_packed_tensors` (in bfloat16, which holds them exactly) and with gate and up
taken apart as its `GptOssExperts` does.

Written for torch 2.10 (CPU), transformers 5.17, safetensors 0.8.
"""

import json
import shutil
import sys
import tempfile
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformers import GptOssConfig, GptOssForCausalLM
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

E, H, I = 3, 64, 32
CONFIG = dict(num_hidden_layers=2, num_local_experts=E, num_experts_per_tok=2, hidden_size=H, intermediate_size=I,
              vocab_size=64, head_dim=16, num_attention_heads=4, num_key_value_heads=2, sliding_window=8,
              eos_token_id=2)


@torch.no_grad()
def main():
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    folder = Path(sys.argv[1]) / "gpt-oss-mxfp4"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    gen = torch.Generator().manual_seed(20)
    model = GptOssForCausalLM(GptOssConfig(**CONFIG))
    for name, p in sorted(model.named_parameters()):
        scale = 0.3 if name.endswith("bias") or name.endswith("sinks") else p.shape[-1] ** -0.5
        p.copy_((1.0 if "norm" in name else 0.0) + torch.randn(p.shape, generator=gen) * scale)
    with tempfile.TemporaryDirectory() as tmp:
        model.bfloat16().save_pretrained(tmp)
        tensors = load_file(Path(tmp) / "model.safetensors")
        config = json.loads((Path(tmp) / "config.json").read_text())
    values = {}
    for layer in range(CONFIG["num_hidden_layers"]):
        p = f"model.layers.{layer}.mlp.experts."
        parts = {}
        for name, outputs, inputs in [("gate_up_proj", 2 * I, H), ("down_proj", H, I)]:
            wanted = tensors.pop(p + name)
            assert tuple(wanted.shape) == (E, inputs, outputs), wanted.shape
            blocks = torch.randint(0, 256, (E, outputs, inputs // 32, 16), generator=gen, dtype=torch.uint8)
            scales = torch.randint(120, 126, (E, outputs, inputs // 32), generator=gen, dtype=torch.uint8)
            tensors[f"{p}{name}_blocks"], tensors[f"{p}{name}_scales"] = blocks, scales
            parts[name] = convert_moe_packed_tensors(blocks, scales)
            assert parts[name].shape == wanted.shape and parts[name].dtype == torch.bfloat16
        for e in range(E):
            gate_up = parts["gate_up_proj"][e]
            values[f"{p}{e}.gate_proj.weight"] = gate_up[:, ::2].T.contiguous()
            values[f"{p}{e}.up_proj.weight"] = gate_up[:, 1::2].T.contiguous()
            values[f"{p}{e}.down_proj.weight"] = parts["down_proj"][e].T.contiguous()
            bias = tensors[f"{p}gate_up_proj_bias"][e]
            values[f"{p}{e}.gate_proj.bias"] = bias[::2].contiguous()
            values[f"{p}{e}.up_proj.bias"] = bias[1::2].contiguous()
            values[f"{p}{e}.down_proj.bias"] = tensors[f"{p}down_proj_bias"][e].contiguous()
    config["quantization_config"] = {
        "modules_to_not_convert": ["model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens",
                                   "lm_head"], "quant_method": "mxfp4"}
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    save_file(values, folder / "values.safetensors")
    print(sum(p.stat().st_size for p in folder.iterdir()) // 1024, "KiB")


if __name__ == "__main__":
    main()
