#!/usr/bin/env python3
"""Tiny random checkpoints of the families with experts, with the logits transformers computes for them.

    python tests/generators/moe_fixtures.py tests/fixtures/families [case ...]
    python tests/generators/moe_fixtures.py OUT gpt-oss --fused

The folders, files and checks are those of decoder_fixtures.py.  Experts are stored one by one, as published; so are
gpt-oss's, which are published fused: that is how the fused ones are read.  `--fused` writes these as transformers does.
Besides: no router is near a tie (the windows are drawn until the closest decision is MARGIN apart), every
expert is reached by the first window, and a case may hold layers of multi-token prediction behind the last
one, which no forward pass reads.

Written for torch 2.10 (CPU), transformers 5.17, safetensors 0.8.
"""

import hashlib
import json
import math
import re
import shutil
import sys
import tempfile
from pathlib import Path

import torch
import torch.nn.functional as F
import transformers
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import (AutoModelForCausalLM, DeepseekV2Config, DeepseekV2ForCausalLM, DeepseekV3Config,
                          DeepseekV3ForCausalLM, Glm4MoeConfig, Glm4MoeForCausalLM, GptOssConfig, GptOssForCausalLM,
                          MixtralConfig, MixtralForCausalLM, Qwen2MoeConfig, Qwen2MoeForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM)

import decoder_fixtures as base
from decoder_fixtures import BF16, DTYPE_NAME, F32, llama_build, max_diff, published, run, spread

MAX_CASE_BYTES = 150 * 1024
MARGIN = 1e-3
CORRECTION = "e_score_correction_bias"

base.CONFIG_CLASS.update({
    Qwen3MoeForCausalLM: Qwen3MoeConfig, Qwen2MoeForCausalLM: Qwen2MoeConfig, MixtralForCausalLM: MixtralConfig,
    Glm4MoeForCausalLM: Glm4MoeConfig, DeepseekV2ForCausalLM: DeepseekV2Config,
    DeepseekV3ForCausalLM: DeepseekV3Config, GptOssForCausalLM: GptOssConfig,
})


def cases():
    out = []

    def add(name, model, dtype, build, config, differs=(), mtp=0):
        out.append(dict(name=name, family="moe", model=model, dtype=dtype, windows=[32, 32], build=build,
                        config=config, differs=list(differs), mtp=mtp))

    def rope(kind="default", theta=10000.0, **kw):
        return {"rope_type": kind, "rope_theta": theta, **kw}

    small = dict(hidden_size=32, intermediate_size=48)

    # Qwen3: the second layer has no experts.
    moe = dict(num_experts=8, num_experts_per_tok=3, moe_intermediate_size=16, norm_topk_prob=True,
               decoder_sparse_step=1, mlp_only_layers=[1])
    b = llama_build(**small, **moe, num_hidden_layers=3, head_dim=16, rms_norm_eps=1e-6)
    add("qwen3-moe", Qwen3MoeForCausalLM, BF16, b,
        published(b, "qwen3_moe", "Qwen3MoeForCausalLM", BF16, "4.51.0", **moe, attention_bias=False,
                  attention_dropout=0.0, head_dim=16, max_window_layers=3, output_router_logits=False,
                  rope_scaling=None, rope_theta=10000.0, router_aux_loss_coef=0.001, sliding_window=None,
                  use_sliding_window=False),
        [dict(norm_topk_prob=False), dict(num_experts_per_tok=2)])

    # Qwen2: every second layer, a shared expert with its gate, weights not normalised, the biases of q, k and v.
    moe = dict(num_experts=6, num_experts_per_tok=2, moe_intermediate_size=16, shared_expert_intermediate_size=32,
               norm_topk_prob=False, decoder_sparse_step=2)
    b = llama_build(**small, **moe, num_hidden_layers=4, num_key_value_heads=4, rms_norm_eps=1e-6)
    add("qwen2-moe", Qwen2MoeForCausalLM, BF16, b,
        published(b, "qwen2_moe", "Qwen2MoeForCausalLM", BF16, "4.39.0.dev0", **moe, attention_dropout=0.0,
                  max_window_layers=21, output_router_logits=False, rope_theta=10000.0, router_aux_loss_coef=0.001,
                  sliding_window=32768, use_sliding_window=False),
        [dict(norm_topk_prob=True), dict(num_experts_per_tok=3)])

    moe = dict(num_local_experts=5, num_experts_per_tok=2)
    b = llama_build(hidden_size=32, intermediate_size=32, **moe, sliding_window=None)
    add("mixtral", MixtralForCausalLM, BF16, b,
        published(b, "mixtral", "MixtralForCausalLM", BF16, "4.36.0.dev0", **moe, attention_dropout=0.0,
                  output_router_logits=False, rope_theta=10000.0, router_aux_loss_coef=0.02, sliding_window=None),
        [dict(num_experts_per_tok=1)])

    # gpt-oss: sinks, biases everywhere, clamped gated units, every second layer within a window, a ramp of frequencies
    # that is not rounded to whole dimensions.
    moe = dict(num_local_experts=6, num_experts_per_tok=3)
    yarn = dict(factor=4.0, original_max_position_embeddings=64, beta_fast=4.0, beta_slow=0.25, truncate=False)
    layers = dict(layer_types=["sliding_attention", "full_attention"], sliding_window=12)
    b = llama_build(hidden_size=32, intermediate_size=32, **moe, **layers, head_dim=16, attention_bias=True,
                    max_position_embeddings=256, rope_parameters=rope("yarn", **yarn))
    add("gpt-oss", GptOssForCausalLM, BF16, b,
        published(b, "gpt_oss", "GptOssForCausalLM", BF16, "4.55.0.dev0", **moe, **layers, attention_bias=True,
                  attention_dropout=0.0, experts_per_token=3, head_dim=16, initial_context_length=64,
                  output_router_logits=False, rope_scaling=dict(yarn, rope_type="yarn"), rope_theta=10000,
                  router_aux_loss_coef=0.9, swiglu_limit=7.0),
        [dict(num_experts_per_tok=2), dict(sliding_window=11), dict(layer_types=layers["layer_types"][::-1]),
         dict(rope_parameters=rope("yarn", **dict(yarn, truncate=True))), dict(rope_parameters=rope())])

    # GLM-4.5: sigmoids, correction bias, norms of queries and keys, biases, half of each head rotated.
    moe = dict(n_routed_experts=8, num_experts_per_tok=3, moe_intermediate_size=16, n_shared_experts=1,
               routed_scaling_factor=1.5, norm_topk_prob=True, n_group=1, topk_group=1, first_k_dense_replace=1)
    b = llama_build(**small, **moe, num_hidden_layers=3, head_dim=16, use_qk_norm=True, attention_bias=True,
                    num_nextn_predict_layers=1, rope_parameters=rope(partial_rotary_factor=0.5))
    glm = dict(attention_dropout=0.0, head_dim=16, attention_bias=True, rope_theta=10000, rope_scaling=None,
               partial_rotary_factor=0.5)
    add("glm4-moe", Glm4MoeForCausalLM, BF16, b,
        published(b, "glm4_moe", "Glm4MoeForCausalLM", BF16, "4.54.0", **moe, **glm, use_qk_norm=True,
                  num_nextn_predict_layers=1),
        [dict(routed_scaling_factor=1.0), dict(norm_topk_prob=False)])
    # As its smaller sibling: no norms, and the layer of multi-token prediction is stored.
    moe = dict(moe, n_routed_experts=4, num_experts_per_tok=2, routed_scaling_factor=1.0)
    b = dict(b, **moe, num_hidden_layers=2, use_qk_norm=False)
    add("glm4-moe-mtp", Glm4MoeForCausalLM, BF16, b,
        published(b, "glm4_moe", "Glm4MoeForCausalLM", BF16, "4.54.0", **moe, **glm, use_qk_norm=False,
                  num_nextn_predict_layers=1),
        [dict(rope_parameters=rope(partial_rotary_factor=1.0))], mtp=1)

    # DeepSeek: latent attention.  The Lite model has no latent of the queries and no groups.
    mla = dict(kv_lora_rank=16, q_lora_rank=None, qk_nope_head_dim=16, qk_rope_head_dim=8, v_head_dim=12)
    moe = dict(n_routed_experts=8, num_experts_per_tok=3, moe_intermediate_size=16, n_shared_experts=2,
               routed_scaling_factor=1.0, norm_topk_prob=False, first_k_dense_replace=1, topk_method="greedy",
               n_group=1, topk_group=1)
    # Such that two of the four frequencies are kept, and the others interpolated.
    yarn = dict(factor=40.0, original_max_position_embeddings=64, beta_fast=4, beta_slow=1, mscale=0.707,
                mscale_all_dim=0.707)

    def old(y):
        return dict({k: int(v) if k == "factor" else v for k, v in y.items()}, type="yarn")

    common = dict(attention_bias=False, attention_dropout=0.0, aux_loss_alpha=0.001, ep_size=1, moe_layer_freq=1,
                  rope_theta=10000, seq_aux=True)
    b = llama_build(**small, **mla, **moe, num_hidden_layers=3, num_key_value_heads=4, max_position_embeddings=2560,
                    rms_norm_eps=1e-6, rope_parameters=rope("yarn", **yarn))
    add("deepseek-v2-lite", DeepseekV2ForCausalLM, BF16, b,
        published(b, "deepseek_v2", "DeepseekV2ForCausalLM", BF16, "4.33.1", **mla, **moe, **common,
                  rope_scaling=old(yarn), scoring_func="softmax"),
        [dict(rope_parameters=rope("yarn", **dict(yarn, mscale_all_dim=0))), dict(rope_parameters=rope()),
         dict(num_experts_per_tok=2)])
    # The full model: both latents, groups by their best expert.  Biases, which no published model has.
    mla = dict(mla, q_lora_rank=32)
    grouped = dict(moe, topk_method="group_limited_greedy", n_group=4, topk_group=2, routed_scaling_factor=2.5)
    b = dict(b, **mla, **grouped, num_hidden_layers=2, attention_bias=True, rms_norm_eps=0.01)
    add("deepseek-v2", DeepseekV2ForCausalLM, BF16, b,
        published(b, "deepseek_v2", "DeepseekV2ForCausalLM", BF16, "4.39.3", **mla, **grouped,
                  **dict(common, attention_bias=True), rope_scaling=old(yarn), scoring_func="softmax"),
        [dict(topk_method="greedy"), dict(topk_group=3), dict(routed_scaling_factor=1.0), dict(attention_bias=True,
         rms_norm_eps=1e-6)])
    # V3: sigmoids, correction bias, groups by their two best experts, a layer of multi-token prediction; values wider
    # than keys.
    moe = dict(n_routed_experts=6, num_experts_per_tok=3, moe_intermediate_size=16, n_shared_experts=1,
               routed_scaling_factor=2.5, norm_topk_prob=True, first_k_dense_replace=1, n_group=3, topk_group=2)
    yarn = dict(yarn, mscale=1.0, mscale_all_dim=1.0)
    mla = dict(mla, v_head_dim=16, qk_nope_head_dim=4)
    b = llama_build(**small, **mla, **moe, num_hidden_layers=2, num_key_value_heads=4, max_position_embeddings=2560,
                    rms_norm_eps=1e-6, num_nextn_predict_layers=1, rope_parameters=rope("yarn", **yarn))
    del common["aux_loss_alpha"], common["seq_aux"]
    add("deepseek-v3", DeepseekV3ForCausalLM, BF16, b,
        published(b, "deepseek_v3", "DeepseekV3ForCausalLM", BF16, "4.33.1", **mla, **moe, **common,
                  rope_scaling=old(yarn), scoring_func="sigmoid", topk_method="noaux_tc", num_nextn_predict_layers=1),
        [dict(norm_topk_prob=False), dict(topk_group=3), dict(routed_scaling_factor=1.0), dict(rope_interleave=False),
         dict(rope_parameters=rope("yarn", **dict(yarn, mscale_all_dim=0)))], mtp=1)
    return out


# ---------------------------------------------------------------------------------------------------------
# Weights


def fill(model, gen):
    """Random weights, as decoder_fixtures.py has them; router logits with a spread of 2."""
    cfg = model.config

    def randn(shape, std):
        return torch.randn(shape, generator=gen, dtype=F32) * std

    def rule(name, shape):
        leaf = name.split(".")[-2]
        root = math.sqrt(shape[-1])
        if name.endswith(CORRECTION):
            return randn(shape, 0.15)
        if name.endswith(".sinks"):
            return randn(shape, 1.5)
        if cfg.model_type == "gpt_oss" and ".experts." in name:
            # `[experts, in, out]`; a few percent of gates and ups are clamped.
            std = {"gate_up_proj": 4.0 / math.sqrt(shape[1]), "down_proj": 0.15 / math.sqrt(shape[1]),
                   "gate_up_proj_bias": 0.6, "down_proj_bias": 0.3}
            return randn(shape, std[name.split(".")[-1]])
        if name.endswith("experts.gate_up_proj"):
            w = randn(shape, 1.0 / root)
            w[:, : shape[1] // 2] *= 1.5
            return w
        if name.endswith("experts.down_proj"):
            return randn(shape, 1.5 / root)
        if name.endswith(".bias"):
            return randn(shape, 0.6 if leaf in ("q_proj", "k_proj") else 0.3)
        if leaf in ("q_norm", "k_norm"):
            return (1.5 + randn(shape, 0.3)).clamp(0.5, 2.5)
        if leaf == "norm" or leaf.endswith("layernorm"):
            return (1.0 + randn(shape, 0.3)).clamp(0.3, 1.7)
        if leaf == "embed_tokens":
            return randn(shape, 1.0 / root)
        if leaf in ("gate", "router", "lm_head"):
            return randn(shape, 2.0 / root)
        if leaf in ("q_proj", "k_proj", "q_b_proj", "kv_b_proj", "kv_a_proj_with_mqa"):
            return randn(shape, 1.6 / root)
        if leaf in ("gate_proj", "down_proj"):
            return randn(shape, 1.5 / root)
        if leaf in ("up_proj", "v_proj", "o_proj", "q_a_proj", "shared_expert_gate"):
            return randn(shape, 1.0 / root)
        raise AssertionError(f"no rule for {name}")

    with torch.no_grad():
        for name, p in sorted([*model.named_parameters(), *model.named_buffers()]):
            if name in model.state_dict():
                p.copy_(rule(name, tuple(p.shape)))
    assert cfg.tie_word_embeddings is False


def fused(tensors):
    """Experts one by one, as stored, to those of transformers' classes."""
    out, experts = {}, {}
    for name, t in tensors.items():
        m = re.fullmatch(r"(.*)\.experts\.(\d+)\.(\w+)\.(weight|bias)", name)
        if m:
            part = {"w1": "gate_proj", "w3": "up_proj", "w2": "down_proj"}.get(m[3], m[3])
            part = part if m[4] == "weight" else f"{part}.bias"
            experts.setdefault(m[1].replace("block_sparse_moe", "mlp"), {})[int(m[2]), part] = t
        else:
            out[name.replace("block_sparse_moe", "mlp")] = t
    for module, parts in experts.items():
        numbers = sorted({e for e, _ in parts})
        assert numbers == list(range(len(numbers)))
        if (0, "gate_proj.bias") in parts:
            for end, stored in (("", ""), (".bias", "_bias")):
                # Rows of gate and up in turn.
                pairs = [torch.stack([parts[e, f"{x}_proj{end}"] for x in ("gate", "up")], 1) for e in numbers]
                gate_up = torch.stack([pair.flatten(0, 1) for pair in pairs])
                down = torch.stack([parts[e, f"down_proj{end}"] for e in numbers])
                for part, w in (("gate_up_proj", gate_up), ("down_proj", down)):
                    out[f"{module}.experts.{part}{stored}"] = w if end else w.transpose(1, 2).contiguous()
            continue
        out[f"{module}.experts.gate_up_proj"] = torch.stack(
            [torch.cat([parts[e, "gate_proj"], parts[e, "up_proj"]]) for e in numbers])
        out[f"{module}.experts.down_proj"] = torch.stack([parts[e, "down_proj"] for e in numbers])
    return out


def apart(tensors):
    """gpt-oss's experts as linears, one by one; transformers keeps them fused, transposed, gate and up in turn."""
    out = {}
    for name, t in tensors.items():
        m = re.fullmatch(r"(.*\.experts)\.(gate_up_proj|down_proj)(_bias)?", name)
        if not m:
            out[name] = t
            continue
        for e, w in enumerate(t):
            w = w if m[3] else w.T
            parts = {"gate_proj": w[0::2], "up_proj": w[1::2]} if m[2] == "gate_up_proj" else {m[2]: w}
            for part, w in parts.items():
                out[f"{m[1]}.{e}.{part}.{'bias' if m[3] else 'weight'}"] = w.contiguous()
    return out


def layer_of(name):
    m = re.match(r"model\.layers\.(\d+)\.", name)
    return int(m[1]) if m else -1


def fresh_model(case, tensors, changed=None):
    """A new f32 model of the case's class holding `tensors` (stored names); everything computed the plain way."""
    config = base.make_config(case, changed)
    config._attn_implementation = config._experts_implementation = "eager"
    model = case["model"](config).float().eval()
    state = {k: v.float() for k, v in tensors.items() if layer_of(k) < config.num_hidden_layers}
    model.load_state_dict(fused(state), strict=True)
    return model


base.fresh_model = fresh_model


def mtp_layers(tensors, case, gen):
    """Layers of multi-token prediction behind the last one, with the names of the published ones."""
    layers, h, vocab = (case["build"][k] for k in ("num_hidden_layers", "hidden_size", "vocab_size"))
    out = {}
    for i in range(layers, layers + case["mtp"]):
        p = f"model.layers.{i}."
        for name, t in tensors.items():
            if layer_of(name) == layers - 1:
                out[p + name.split(".", 3)[3]] = (torch.randn(t.shape, generator=gen) * t.float().std()).to(t.dtype)
        new = {"eh_proj": (h, 2 * h), "enorm": (h,), "hnorm": (h,), "shared_head.norm": (h,),
               "shared_head.head": (vocab, h), "embed_tokens": (vocab, h)}
        for name, shape in new.items():
            out[f"{p}{name}.weight"] = torch.randn(shape, generator=gen).to(case["dtype"])
    return out


# ---------------------------------------------------------------------------------------------------------
# Checks


def smallest_margin(model, windows):
    """The closest decision of any router, between the last chosen and the first not chosen: in logits where scores
    are a softmax, which keeps their order, or in sigmoids with their correction."""
    closest, reached = [], []

    def last_gap(values, k):
        ordered = values.sort(-1, descending=True).values
        return (ordered[:, k - 1] - ordered[:, k]).min().item() if k < values.shape[-1] else float("inf")

    def hook(router, args, outputs):
        logits = F.linear(args[0].reshape(-1, args[0].shape[-1]).float(), router.weight.float(),
                          getattr(router, "bias", None))
        corrected = hasattr(router, CORRECTION)
        scores = logits.sigmoid() + router.e_score_correction_bias if corrected else logits
        groups = getattr(router, "num_group", None) or 1
        if getattr(router, "topk_method", None) == "greedy":
            groups = 1
        if groups > 1:
            grouped = scores.view(len(scores), groups, -1)
            ranks = grouped.topk(2, -1).values.sum(-1) if corrected else grouped.max(-1).values
            closest.append(last_gap(ranks, router.topk_group))
            kept = torch.zeros_like(ranks).scatter(1, ranks.topk(router.topk_group, -1).indices, 1.0)
            scores = grouped.masked_fill(kept[..., None] == 0, float("-inf")).reshape(scores.shape)
        closest.append(last_gap(scores, router.top_k))
        chosen = scores.topk(router.top_k, -1).indices
        assert torch.equal(chosen.sort(-1).values, outputs[2].sort(-1).values), "not transformers' choice"
        reached.append(torch.bincount(chosen.flatten(), minlength=scores.shape[-1]).min().item())

    handles = [m.register_forward_hook(hook) for n, m in model.named_modules() if type(m).__name__.endswith("Router")]
    assert handles
    run(model, windows[0])
    fewest = min(reached)
    for window in windows[1:]:
        run(model, window)
    for handle in handles:
        handle.remove()
    return min(closest), fewest


def check_clamps(case, tensors, windows, logits):
    """gpt-oss's limit, which transformers does not read from config.json, must show in the logits."""
    model = fresh_model(case, tensors)
    for module in model.modules():
        if hasattr(module, "limit"):
            module.limit = 1e9
    d = max_diff(logits[:1], [run(model, windows[0])])
    assert d > 0.05, d


def from_disk(case, folder, ids):
    """What transformers makes of the folder itself; of gpt-oss, with its experts fused again."""
    if case["model"] is GptOssForCausalLM:
        tensors = load_file(folder / "model.safetensors")
        with tempfile.TemporaryDirectory() as tmp:
            shutil.copyfile(folder / "config.json", Path(tmp) / "config.json")
            save_file(fused(tensors), Path(tmp) / "model.safetensors", metadata={"format": "pt"})
            return read_disk(case, tmp, ids)
    return read_disk(case, folder, ids)


def read_disk(case, folder, ids):
    model, info = AutoModelForCausalLM.from_pretrained(folder, dtype=F32, attn_implementation="eager",
                                                       experts_implementation="eager", output_loading_info=True)
    layers = case["build"]["num_hidden_layers"]
    assert not any(layer_of(k) < layers for k in info["unexpected_keys"]), info
    assert not info["missing_keys"] and not info["mismatched_keys"], info
    return run(model.eval(), ids)


def generate(case, out, keep_fused=False):
    name, dtype = case["name"], case["dtype"]
    gen = torch.Generator().manual_seed(int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "little"))
    folder = out / name
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)

    config = base.make_config(case)
    model = case["model"](config)
    fill(model, gen)
    corrections = {k: v.clone() for k, v in model.state_dict().items() if k.endswith(CORRECTION)}
    model = model.to(dtype)
    with tempfile.TemporaryDirectory() as tmp:
        model.save_pretrained(tmp)
        tensors = load_file(Path(tmp) / "model.safetensors")
    if case["model"] is GptOssForCausalLM:
        saved, tensors = tensors, apart(tensors)
        again = fused(tensors)
        assert saved.keys() == again.keys() and all(torch.equal(saved[k], again[k]) for k in saved)
    # The one tensor that is published in f32.
    tensors.update(corrections)
    if case["mtp"]:
        tensors.update(mtp_layers(tensors, case, gen))
    save_file({k: v.contiguous() for k, v in tensors.items()}, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(dict(sorted(case["config"].items())), indent=2) + "\n")
    with safe_open(folder / "model.safetensors", "pt") as f:
        assert all(f.get_tensor(k).dtype == (F32 if k.endswith(CORRECTION) else dtype) for k in f.keys())
        assert any(".experts.1." in k for k in f.keys()), "experts are stored one by one"

    for attempt in range(1000):
        windows = [torch.randint(0, config.vocab_size, (n,), generator=gen) for n in case["windows"]]
        margin, fewest = smallest_margin(fresh_model(case, tensors), windows)
        if margin >= MARGIN and fewest > 0:
            break
    assert margin >= MARGIN and fewest > 0, (margin, fewest)
    logits = [run(fresh_model(case, tensors), w) for w in windows]
    for w, l in zip(windows, logits):
        assert torch.equal(from_disk(case, folder, w), l), "config as published"
    own = {k: v for k, v in tensors.items() if layer_of(k) < config.num_hidden_layers}
    least, weakest = base.check_sensitive(case, own, windows, logits)
    if case["model"] is GptOssForCausalLM:
        check_clamps(case, tensors, windows, logits)
        if keep_fused:
            save_file(fused(tensors), folder / "model.safetensors", metadata={"format": "pt"})
    exact = [run(fresh_model(case, tensors).double(), w) for w in windows]
    stds = [l.std().item() for l in logits]
    assert all(0.8 < s < 4 for s in stds), stds

    expected = {"input_ids": torch.stack(windows), "logits": torch.stack(logits)}
    save_file({k: v.contiguous() for k, v in expected.items()}, folder / "expected.safetensors")
    size = sum(p.stat().st_size for p in folder.iterdir())
    assert size <= MAX_CASE_BYTES, size
    print("  ".join([
        f"{name:18s} {size / 1024:6.1f} KiB {DTYPE_NAME[dtype]}", f"logits std {min(stds):.2f}..{max(stds):.2f}",
        f"top attention {spread(case, tensors, windows[-1]):.2f}", f"f32 vs f64 {max_diff(logits, exact):.1e}",
        f"margin {margin:.1e} (draw {attempt + 1})", f"least tensor {least[0]:.2f} ({least[1]})",
        f"least option {weakest:.2f}"]))
    return size


def main():
    if len(sys.argv) < 2:
        sys.exit(__doc__)
    keep_fused = "--fused" in sys.argv[2:]
    out, only = Path(sys.argv[1]), set(sys.argv[2:]) - {"--fused"}
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    torch.set_num_threads(1)
    print(f"torch {torch.__version__}, transformers {transformers.__version__}")
    chosen = [c for c in cases() if not only or c["name"] in only]
    total = sum(generate(c, out, keep_fused) for c in chosen)
    print(f"{len(chosen)} cases, {total / 1024:.0f} KiB")


if __name__ == "__main__":
    main()
