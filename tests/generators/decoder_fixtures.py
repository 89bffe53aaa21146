#!/usr/bin/env python3
"""Tiny random checkpoints of each decoder family, with the logits transformers computes for them.

    python tests/generators/decoder_fixtures.py tests/fixtures/families [case ...]

Each case becomes a folder in the Hugging Face layout (config.json, model.safetensors) plus
expected.safetensors: the token windows and the reference logits (f32, eager attention).  Windows of one
length are stored as `input_ids` [windows, tokens] and `logits` [windows, tokens, vocab]; windows of
different lengths as `input_ids.N` [1, tokens] and `logits.N` [1, tokens, vocab].  Every window is
computed by a freshly loaded model (dynamic rope keeps state between calls), without a KV cache.

Written for torch 2.10 (CPU), transformers 5.17, safetensors 0.8.  The checks below run on every
regeneration: tensor names are the published ones, the config on disk gives the logits of the config the
model was built with, each tensor and each special option of the case changes the logits, and the families
transformers has no class for agree with a second, plain-torch forward.
"""

import hashlib
import json
import math
import shutil
import sys
import tempfile
from pathlib import Path

import torch
import torch.nn.functional as F
import transformers
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import (AutoModelForCausalLM, Gemma2Config, Gemma2ForCausalLM, Gemma3ForCausalLM, Gemma3TextConfig,
                          Glm4Config, Glm4ForCausalLM, GlmConfig, GlmForCausalLM, GraniteConfig, GraniteForCausalLM,
                          LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM, Olmo2Config,
                          Olmo2ForCausalLM, Phi3Config, Phi3ForCausalLM, Qwen2Config, Qwen2ForCausalLM, Qwen3Config,
                          Qwen3ForCausalLM, Starcoder2Config, Starcoder2ForCausalLM)

MAX_CASE_BYTES = 300 * 1024
F32, BF16 = torch.float32, torch.bfloat16
DTYPE_NAME = {F32: "float32", BF16: "bfloat16"}


# ---------------------------------------------------------------------------------------------------------
# The cases.  `build` holds the arguments of transformers' own config class (rope in its present
# `rope_parameters` form); `published` the config.json in the style of the published checkpoints, or None to
# keep what save_pretrained wrote.  `differs` lists changed builds whose logits must not match.


def llama_build(**kw):
    d = dict(vocab_size=64, hidden_size=48, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
             num_key_value_heads=2, max_position_embeddings=128, rms_norm_eps=1e-5, bos_token_id=1, eos_token_id=2,
             tie_word_embeddings=False, rope_parameters={"rope_type": "default", "rope_theta": 10000.0})
    d.update(kw)
    return d


SHARED_KEYS = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
               "num_key_value_heads", "max_position_embeddings", "rms_norm_eps", "bos_token_id", "eos_token_id",
               "tie_word_embeddings")


def published(build, model_type, arch, dtype, version, **kw):
    d = {k: build[k] for k in SHARED_KEYS if k in build}
    d.update(architectures=[arch], model_type=model_type, hidden_act="silu", initializer_range=0.02, use_cache=True,
             torch_dtype=DTYPE_NAME[dtype], transformers_version=version)
    d.update(kw)
    return d


def cases():
    out = []

    def add(name, family, model, dtype, windows, build, config, differs=()):
        out.append(dict(name=name, family=family, model=model, dtype=dtype, windows=windows, build=build,
                        config=config, differs=list(differs)))

    def rope(kind, theta=10000.0, **kw):
        return {"rope_type": kind, "rope_theta": theta, **kw}

    plain = rope("default")

    # Llama 2: multi-head attention, no rope_theta in the published file (10000 by default).
    b = llama_build(num_key_value_heads=4)
    add("llama2", "llama", LlamaForCausalLM, F32, [32, 32], b,
        published(b, "llama", "LlamaForCausalLM", F32, "4.31.0.dev0", pretraining_tp=1, rope_scaling=None))

    # Llama 3.x: grouped heads, tied embeddings, frequencies in all three bands; present-day config style.
    b = llama_build(hidden_size=64, intermediate_size=80, num_key_value_heads=2, head_dim=16, vocab_size=80,
                    tie_word_embeddings=True,
                    rope_parameters=rope("llama3", 500000.0, factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
                                         original_max_position_embeddings=64))
    add("llama3", "llama", LlamaForCausalLM, BF16, [48, 48], b, None,
        [dict(rope_parameters=rope("default", 500000.0)), dict(rope_parameters=rope("linear", 500000.0, factor=8.0)),
         dict(rope_parameters=dict(b["rope_parameters"], high_freq_factor=2.0)),
         dict(rope_parameters=dict(b["rope_parameters"], low_freq_factor=2.0))])

    b = llama_build(rope_parameters=rope("linear", factor=4.0))
    add("llama-linear-rope", "llama", LlamaForCausalLM, F32, [40, 40], b,
        published(b, "llama", "LlamaForCausalLM", F32, "4.33.2", pretraining_tp=1, rope_theta=10000.0,
                  rope_scaling={"factor": 4.0, "type": "linear"}), [dict(rope_parameters=plain)])

    # Windows below, just past and far past max_position_embeddings.
    b = llama_build(max_position_embeddings=32, rope_parameters=rope("dynamic", factor=2.0))
    add("llama-dynamic-rope", "llama", LlamaForCausalLM, F32, [24, 33, 80], b,
        published(b, "llama", "LlamaForCausalLM", F32, "4.33.2", pretraining_tp=1, rope_theta=10000.0,
                  rope_scaling={"factor": 2.0, "type": "dynamic"}), [dict(rope_parameters=plain)])

    b = llama_build(attention_bias=True, mlp_bias=True, rms_norm_eps=0.01)
    add("llama-bias", "llama", LlamaForCausalLM, F32, [32, 32], b,
        published(b, "llama", "LlamaForCausalLM", F32, "4.42.3", attention_bias=True, attention_dropout=0.0,
                  mlp_bias=True, pretraining_tp=1, rope_scaling=None, rope_theta=10000.0), [dict(rms_norm_eps=1e-5)])

    # YaRN with its optional keys, so that both ends of the ramp fall inside the head.
    y = dict(factor=4.0, original_max_position_embeddings=64, beta_fast=2.0, beta_slow=0.25, attention_factor=1.3)
    b = llama_build(head_dim=16, max_position_embeddings=256, rope_parameters=rope("yarn", 1000.0, **y))
    add("llama-yarn-options", "llama", LlamaForCausalLM, F32, [48, 48], b,
        published(b, "llama", "LlamaForCausalLM", F32, "4.45.0", head_dim=16, rope_theta=1000.0,
                  rope_scaling=dict(rope_type="yarn", **y)),
        [dict(rope_parameters=rope("yarn", 1000.0, **dict(y, **c)))
         for c in (dict(attention_factor=1.0), dict(beta_fast=32.0), dict(beta_slow=1.0), dict(truncate=False))])

    b = llama_build(head_dim=16, sliding_window=12, rms_norm_eps=0.01, rope_parameters=rope("default", 1000000.0))
    add("mistral", "llama", MistralForCausalLM, BF16, [48, 48], b,
        published(b, "mistral", "MistralForCausalLM", BF16, "4.42.0", attention_dropout=0.0, head_dim=16,
                  rope_theta=1000000.0, sliding_window=12),
        [dict(sliding_window=None), dict(sliding_window=11), dict(sliding_window=13)])

    # Qwen2: `sliding_window` is smaller than the windows but `use_sliding_window` is false: no effect.
    b = llama_build(hidden_size=64, rms_norm_eps=1e-6, tie_word_embeddings=True, sliding_window=8,
                    use_sliding_window=False, max_window_layers=1, rope_parameters=rope("default", 1000000.0))
    qwen2 = dict(attention_dropout=0.0, max_window_layers=1, rope_theta=1000000.0, sliding_window=8,
                 use_sliding_window=False)
    add("qwen2", "qwen2", Qwen2ForCausalLM, BF16, [40, 40], b,
        published(b, "qwen2", "Qwen2ForCausalLM", BF16, "4.43.1", **qwen2), [dict(use_sliding_window=True)])

    y = dict(factor=4.0, original_max_position_embeddings=32)
    b = llama_build(hidden_size=64, max_position_embeddings=128, rms_norm_eps=1e-6, sliding_window=8,
                    use_sliding_window=False, max_window_layers=2, rope_parameters=rope("yarn", **y))
    add("qwen2-yarn", "qwen2", Qwen2ForCausalLM, BF16, [64, 64], b,
        published(b, "qwen2", "Qwen2ForCausalLM", BF16, "4.43.1",
                  **dict(qwen2, max_window_layers=2, rope_theta=10000.0, rope_scaling=dict(y, type="yarn"))),
        [dict(rope_parameters=plain), dict(rope_parameters=rope("linear", factor=4.0)),
         dict(rope_parameters=rope("yarn", **y, attention_factor=1.0))])

    # The first `max_window_layers` layers attend to everything, the others within the window.
    b = llama_build(num_hidden_layers=3, rms_norm_eps=1e-6, sliding_window=12, use_sliding_window=True,
                    max_window_layers=1, rope_parameters=rope("default", 1000000.0))
    add("qwen2-sliding", "qwen2", Qwen2ForCausalLM, BF16, [48, 48], b,
        published(b, "qwen2", "Qwen2ForCausalLM", BF16, "4.43.1",
                  **dict(qwen2, sliding_window=12, use_sliding_window=True)),
        [dict(use_sliding_window=False), dict(sliding_window=11), dict(sliding_window=13), dict(max_window_layers=0),
         dict(max_window_layers=2)])

    # Qwen3: present-day config style, head_dim larger than hidden / heads.
    b = llama_build(hidden_size=64, intermediate_size=80, head_dim=24, rms_norm_eps=0.01, vocab_size=96,
                    rope_parameters=rope("default", 1000000.0))
    add("qwen3", "qwen3", Qwen3ForCausalLM, BF16, [40, 40], b, None, [dict(rms_norm_eps=1e-6)])

    # InternLM2 and InternLM3 have no class in transformers: the reference is Llama with the same weights.
    internlm2 = dict(
        attn_implementation="eager",
        auto_map={"AutoConfig": "configuration_internlm2.InternLM2Config",
                  "AutoModelForCausalLM": "modeling_internlm2.InternLM2ForCausalLM",
                  "AutoModel": "modeling_internlm2.InternLM2ForCausalLM"},
        bias=False, pad_token_id=2, pretraining_tp=1, rope_theta=1000000)
    b = llama_build(hidden_size=64, rope_parameters=rope("default", 1000000.0))
    add("internlm2", "internlm2", LlamaForCausalLM, BF16, [40, 40], b,
        published(b, "internlm2", "InternLM2ForCausalLM", BF16, "4.41.0", **internlm2, rope_scaling=None))
    b = llama_build(num_attention_heads=6, num_key_value_heads=2, max_position_embeddings=32,
                    rope_parameters=rope("dynamic", 1000000.0, factor=2.0))
    add("internlm2-dynamic", "internlm2", LlamaForCausalLM, BF16, [24, 72], b,
        published(b, "internlm2", "InternLM2ForCausalLM", BF16, "4.41.0", **internlm2,
                  rope_scaling={"type": "dynamic", "factor": 2.0}),
        [dict(rope_parameters=rope("default", 1000000.0))])

    internlm3 = dict(
        attention_dropout=0.0,
        auto_map={"AutoConfig": "configuration_internlm3.InternLM3Config",
                  "AutoModel": "modeling_internlm3.InternLM3Model",
                  "AutoModelForCausalLM": "modeling_internlm3.InternLM3ForCausalLM"},
        pad_token_id=2, rope_scaling={"factor": 6.0, "rope_type": "dynamic"}, rope_theta=50000000)
    b = llama_build(hidden_size=64, head_dim=16, max_position_embeddings=32,
                    rope_parameters=rope("dynamic", 50000000.0, factor=6.0))
    add("internlm3", "llama", LlamaForCausalLM, BF16, [72, 72], b,
        published(b, "internlm3", "InternLM3ForCausalLM", BF16, "4.47.1", bias=False, qkv_bias=False, head_dim=16,
                  **internlm3),
        [dict(rope_parameters=rope("default", 50000000.0))])
    b = llama_build(head_dim=20, max_position_embeddings=32, attention_bias=True, mlp_bias=True,
                    rope_parameters=rope("dynamic", 50000000.0, factor=6.0))
    add("internlm3-bias", "llama", LlamaForCausalLM, BF16, [48, 48], b,
        published(b, "internlm3", "InternLM3ForCausalLM", BF16, "4.47.1", bias=True, qkv_bias=True, head_dim=20,
                  **internlm3),
        [dict(rope_parameters=rope("default", 50000000.0))])

    phi3 = dict(attention_dropout=0.0, embd_pdrop=0.0, resid_pdrop=0.0, pad_token_id=2, rope_theta=10000.0)
    b = llama_build(pad_token_id=2, sliding_window=2047, original_max_position_embeddings=128)
    add("phi3", "phi3", Phi3ForCausalLM, BF16, [40, 40], b,
        published(b, "phi3", "Phi3ForCausalLM", BF16, "4.41.2", **phi3, original_max_position_embeddings=128,
                  rope_scaling=None, sliding_window=2047))

    # LongRoPE: below, far past, exactly at, and one past original_max_position_embeddings.
    b = llama_build(hidden_size=64, pad_token_id=2, sliding_window=262144, max_position_embeddings=256,
                    original_max_position_embeddings=32)
    lr = dict(long_factor=[1.0, 1.35, 2.0, 3.1, 4.7, 6.25, 7.5, 8.0],
              short_factor=[1.0, 1.02, 1.05, 1.1, 1.15, 1.4, 1.75, 2.0])
    b["rope_parameters"] = rope("longrope", **lr)
    add("phi3-longrope", "phi3", Phi3ForCausalLM, BF16, [24, 64, 32, 33], b,
        published(b, "phi3", "Phi3ForCausalLM", BF16, "4.43.3", **phi3, attention_bias=False,
                  original_max_position_embeddings=32, rope_scaling=dict(lr, type="longrope"), sliding_window=262144),
        [dict(rope_parameters=plain), dict(rope_parameters=rope("longrope", **lr, attention_factor=1.0)),
         dict(rope_parameters=rope("longrope", **dict(lr, short_factor=lr["long_factor"]))),
         dict(rope_parameters=rope("longrope", **dict(lr, long_factor=lr["short_factor"])))])

    b = llama_build(hidden_size=64, pad_token_id=2, sliding_window=None, original_max_position_embeddings=128,
                    rms_norm_eps=0.01, rope_parameters=rope("default", partial_rotary_factor=0.5))
    add("phi3-partial", "phi3", Phi3ForCausalLM, BF16, [40, 40], b,
        published(b, "phi3", "Phi3ForCausalLM", BF16, "4.48.1", **phi3, attention_bias=False,
                  original_max_position_embeddings=128, partial_rotary_factor=0.5, rope_scaling=None,
                  sliding_window=None),
        [dict(rope_parameters=plain)])

    # Phi-4-mini: LongRoPE over three quarters of each head, tied embeddings.
    b = llama_build(hidden_size=64, pad_token_id=2, sliding_window=262144, max_position_embeddings=256,
                    original_max_position_embeddings=32, tie_word_embeddings=True)
    lr = dict(long_factor=[1.0, 1.5, 2.4, 4.0, 6.0, 8.0], short_factor=[1.0, 1.0, 1.1, 1.2, 1.5, 2.0])
    b["rope_parameters"] = rope("longrope", partial_rotary_factor=0.75, **lr)
    add("phi4-mini", "phi3", Phi3ForCausalLM, BF16, [24, 48], b,
        published(b, "phi3", "Phi3ForCausalLM", BF16, "4.45.0", **phi3, attention_bias=False,
                  original_max_position_embeddings=32, partial_rotary_factor=0.75,
                  rope_scaling=dict(lr, type="longrope"), sliding_window=262144),
        [dict(rope_parameters=rope("default", partial_rotary_factor=0.75))])

    # Mistral Nemo: heads narrower than hidden / heads, no window.
    b = llama_build(head_dim=8, sliding_window=None, rope_parameters=rope("default", 1000000.0))
    add("mistral-nemo", "llama", MistralForCausalLM, BF16, [40, 40], b,
        published(b, "mistral", "MistralForCausalLM", BF16, "4.43.0.dev0", attention_dropout=0.0, head_dim=8,
                  rope_theta=1000000.0, sliding_window=None), [dict(sliding_window=12)])

    factors = dict(attention_multiplier=0.4, embedding_multiplier=1.5, logits_scaling=1.25, residual_multiplier=0.7)
    b = llama_build(**factors)
    add("granite", "llama", GraniteForCausalLM, BF16, [40, 40], b,
        published(b, "granite", "GraniteForCausalLM", BF16, "4.46.0.dev0", attention_bias=False, attention_dropout=0.0,
                  mlp_bias=False, rope_scaling=None, rope_theta=10000.0, **factors),
        [{k: v * 1.3} for k, v in factors.items()])

    b = llama_build(num_key_value_heads=2, rms_norm_eps=0.01, rope_parameters=rope("default", 500000.0))
    add("olmo2", "olmo2", Olmo2ForCausalLM, F32, [40, 40], b,
        published(b, "olmo2", "Olmo2ForCausalLM", F32, "4.47.0", attention_bias=False, attention_dropout=0.0,
                  rope_scaling=None, rope_theta=500000), [dict(rms_norm_eps=1e-5)])

    # GLM-4: neighbouring dimensions are rotated together, half of each head; biases on q, k and v.
    glm = dict(attention_bias=True, attention_dropout=0.0, head_dim=16, pad_token_id=0, partial_rotary_factor=0.5,
               rope_theta=10000.0)
    b = llama_build(head_dim=16, attention_bias=True, pad_token_id=0,
                    rope_parameters=rope("default", partial_rotary_factor=0.5))
    add("glm", "glm", GlmForCausalLM, BF16, [40, 40], b,
        published(b, "glm", "GlmForCausalLM", BF16, "4.46.0.dev0", **glm),
        [dict(rope_parameters=rope("default", partial_rotary_factor=1.0))])
    b = dict(b, attention_bias=False, rms_norm_eps=0.01)
    add("glm4", "glm4", Glm4ForCausalLM, BF16, [40, 40], b,
        published(b, "glm4", "Glm4ForCausalLM", BF16, "4.52.0.dev0", **dict(glm, attention_bias=False)),
        [dict(rms_norm_eps=1e-5)])

    # ChatGLM3 and GLM-4 9B as first published have no class in transformers: Glm computes the same function.
    for name, arch, eps, ratio in (("chatglm3", "ChatGLMModel", 1e-5, None),
                                   ("glm4-chat", "ChatGLMForConditionalGeneration", 0.01, 50)):
        b = llama_build(head_dim=16, attention_bias=True, pad_token_id=0, rms_norm_eps=eps,
                        rope_parameters=rope("default", 10000.0 * (ratio or 1), partial_rotary_factor=0.5))
        config = dict(
            add_bias_linear=False, add_qkv_bias=True, apply_query_key_layer_scaling=True,
            apply_residual_connection_post_layernorm=False, architectures=[arch], attention_dropout=0.0,
            attention_softmax_in_fp32=True, auto_map={
                "AutoConfig": "configuration_chatglm.ChatGLMConfig",
                "AutoModel": "modeling_chatglm.ChatGLMForConditionalGeneration",
                "AutoModelForCausalLM": "modeling_chatglm.ChatGLMForConditionalGeneration"},
            bias_dropout_fusion=True, eos_token_id=2, ffn_hidden_size=b["intermediate_size"],
            fp32_residual_connection=False, hidden_dropout=0.0, hidden_size=b["hidden_size"], kv_channels=b["head_dim"],
            layernorm_epsilon=eps, model_type="chatglm", multi_query_attention=True,
            multi_query_group_num=b["num_key_value_heads"], num_attention_heads=b["num_attention_heads"],
            num_layers=b["num_hidden_layers"], original_rope=True, pad_token_id=0, padded_vocab_size=b["vocab_size"],
            post_layer_norm=True, rmsnorm=True, seq_length=b["max_position_embeddings"], tie_word_embeddings=False,
            torch_dtype="bfloat16", transformers_version="4.30.2", use_cache=True)
        if ratio is not None:
            config.update(rope_ratio=ratio, num_hidden_layers=b["num_hidden_layers"])
        add(name, "chatglm", GlmForCausalLM, BF16, [40, 40], b, config,
            [dict(rms_norm_eps=0.01 if ratio is None else 1e-5),
             dict(rope_parameters=rope("default", 10000.0 if ratio else 500000.0, partial_rotary_factor=0.5)),
             dict(rope_parameters=rope("default", 10000.0 * (ratio or 1), partial_rotary_factor=1.0))])

    # Gemma 2: every second layer within the window; both caps low enough to matter.
    gemma = dict(hidden_activation="gelu_pytorch_tanh", head_dim=16, query_pre_attn_scalar=24, sliding_window=12,
                 tie_word_embeddings=True)
    caps = dict(attn_logit_softcapping=2.0, final_logit_softcapping=3.0)
    b = llama_build(**gemma, **caps, rms_norm_eps=0.01)
    gemma2 = published(b, "gemma2", "Gemma2ForCausalLM", F32, "4.42.4", attention_bias=False, attention_dropout=0.0,
                       cache_implementation="hybrid", hidden_act="gelu_pytorch_tanh", rope_theta=10000.0, **gemma, **caps)
    del gemma2["tie_word_embeddings"]  # the published files leave it to the default
    add("gemma2", "gemma", Gemma2ForCausalLM, F32, [40, 40], b, gemma2,
        [dict(attn_logit_softcapping=None), dict(final_logit_softcapping=None), dict(sliding_window=13),
         dict(query_pre_attn_scalar=16), dict(layer_types=["full_attention", "sliding_attention"])])

    # Gemma 3: two rotary embeddings, every third layer without a window; the published style.
    def two(kind, **kw):
        return {"full_attention": rope(kind, 1000.0, **kw), "sliding_attention": plain}

    b = llama_build(**gemma, num_hidden_layers=3, sliding_window_pattern=3, rope_parameters=two("linear", factor=8.0))
    gemma3 = published(b, "gemma3_text", "Gemma3ForCausalLM", F32, "4.50.0.dev0", attention_bias=False,
                       attention_dropout=0.0, attn_logit_softcapping=None, final_logit_softcapping=None,
                       rope_local_base_freq=10000.0, rope_theta=1000.0,
                       rope_scaling={"factor": 8.0, "rope_type": "linear"}, sliding_window_pattern=3, **gemma)
    del gemma3["tie_word_embeddings"], gemma3["hidden_act"]
    add("gemma3", "gemma3", Gemma3ForCausalLM, F32, [40, 40], b, gemma3,
        [dict(sliding_window=13), dict(sliding_window_pattern=2), dict(rope_parameters=two("default")),
         dict(rope_parameters=dict(two("linear", factor=8.0), sliding_attention=rope("default", 1000.0))),
         dict(query_pre_attn_scalar=16)])
    # The same in the present style.
    b = llama_build(**gemma, hidden_size=64, final_logit_softcapping=3.0, rms_norm_eps=0.01,
                    layer_types=["full_attention", "sliding_attention"], rope_parameters=two("linear", factor=4.0))
    add("gemma3-types", "gemma3", Gemma3ForCausalLM, BF16, [40, 40], b, None, [dict(final_logit_softcapping=None)])

    starcoder2 = dict(attention_dropout=0.0, embedding_dropout=0.0, hidden_act="gelu_pytorch_tanh", norm_epsilon=0.01,
                      residual_dropout=0.0, sliding_window=12)
    for name, tied, bias, dtype in (("starcoder2", True, True, BF16), ("starcoder2-plain", False, False, F32)):
        b = llama_build(**starcoder2, tie_word_embeddings=tied, use_bias=bias)
        del b["rms_norm_eps"]
        config = published(b, "starcoder2", "Starcoder2ForCausalLM", dtype, "4.37.0.dev0", rope_theta=10000.0,
                           use_bias=bias, **starcoder2)
        if tied:
            del config["tie_word_embeddings"]  # the default, and how the files are published
        add(name, "starcoder2", Starcoder2ForCausalLM, dtype, [40, 40], b, config,
            [dict(sliding_window=None), dict(norm_epsilon=1e-5), dict(hidden_act="silu")])

    # Baichuan2 7B has no class in transformers: Llama with q, k and v apart, and the head's rows of length 1.
    b = llama_build(num_key_value_heads=4)
    config = published(b, "baichuan", "BaichuanForCausalLM", BF16, "4.29.2", _from_model_config=True,
                       auto_map={"AutoConfig": "configuration_baichuan.BaichuanConfig",
                                 "AutoModelForCausalLM": "modeling_baichuan.BaichuanForCausalLM"},
                       model_max_length=128, pad_token_id=0, tokenizer_class="BaichuanTokenizer")
    del config["num_key_value_heads"]
    add("baichuan2", "baichuan2", LlamaForCausalLM, BF16, [40, 40], b, config)
    return out


CONFIG_CLASS = {LlamaForCausalLM: LlamaConfig, MistralForCausalLM: MistralConfig, Qwen2ForCausalLM: Qwen2Config,
                Qwen3ForCausalLM: Qwen3Config, Phi3ForCausalLM: Phi3Config, GraniteForCausalLM: GraniteConfig,
                Olmo2ForCausalLM: Olmo2Config, GlmForCausalLM: GlmConfig, Glm4ForCausalLM: Glm4Config,
                Gemma2ForCausalLM: Gemma2Config, Gemma3ForCausalLM: Gemma3TextConfig,
                Starcoder2ForCausalLM: Starcoder2Config}


def make_config(case, changed=None):
    build = json.loads(json.dumps({**case["build"], **(changed or {})}))
    return CONFIG_CLASS[case["model"]](**build)


# ---------------------------------------------------------------------------------------------------------
# Weights


def fill(model, gen):
    """Random weights: scores with a spread of about 3, sublayer outputs the size of the residual, logits near 2."""
    cfg = model.config
    h = cfg.hidden_size
    gemma = cfg.model_type.startswith("gemma")
    one = 1.0 if gemma else 0.0  # stored norm weights are distances from it
    # Gemma multiplies embeddings by the root of h: with larger ones a tied head would only repeat the last token.
    tied = 0.8 if gemma else 2.0

    def randn(shape, std):
        return torch.randn(shape, generator=gen, dtype=F32) * std

    for name, p in sorted(model.named_parameters()):
        leaf = name.split(".")[-2]
        shape = tuple(p.shape)
        if name.endswith(".bias"):
            w = randn(shape, 0.6 if leaf in ("q_proj", "k_proj") else 0.3)
        elif leaf in ("q_norm", "k_norm"):
            w = (1.5 + randn(shape, 0.3)).clamp(0.5, 2.5) - one
        elif leaf == "norm" or leaf.endswith("layernorm"):
            w = (1.0 + randn(shape, 0.3)).clamp(0.3, 1.7) * (2.0 if gemma and leaf == "norm" else 1.0) - one
        elif leaf in ("q_proj", "k_proj"):
            w = randn(shape, 1.8 / math.sqrt(h))
        elif leaf == "qkv_proj":
            w = randn(shape, 1.8 / math.sqrt(h))
            kv = cfg.num_key_value_heads * (h // cfg.num_attention_heads)
            w[-kv:] /= 1.8
        elif leaf == "embed_tokens":
            w = randn(shape, tied / math.sqrt(h) if cfg.tie_word_embeddings else 1.0)
        elif leaf == "lm_head":
            w = randn(shape, 2.0 / math.sqrt(h))
        elif leaf in ("gate_proj", "gate_up_proj", "down_proj", "c_fc", "c_proj"):
            w = randn(shape, 1.5 / math.sqrt(shape[1]))
        elif leaf in ("up_proj", "v_proj", "o_proj"):
            w = randn(shape, 1.0 / math.sqrt(shape[1]))
        else:
            raise AssertionError(f"no rule for {name}")
        p.data.copy_(w)


def published_names(family, layers, build, tied):
    """The tensor names of the published checkpoints."""
    names = set()
    attn_bias, mlp_bias = build.get("attention_bias"), build.get("mlp_bias")
    for i in range(layers):
        p = f"model.layers.{i}."
        if family == "internlm2":
            tails = ["attention.wqkv", "attention.wo", "feed_forward.w1", "feed_forward.w2", "feed_forward.w3",
                     "attention_norm", "ffn_norm"]
            biased = []
        else:
            tails = ["input_layernorm", "post_attention_layernorm", "self_attn.o_proj", "mlp.down_proj"]
            qkv = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"]
            if family == "starcoder2":
                tails = tails[:-1] + qkv + ["mlp.c_fc", "mlp.c_proj"]
                norms = ["input_layernorm", "post_attention_layernorm"]
                biased = [t for t in tails if build["use_bias"] or t in norms]
                names |= {f"{p}{t}.weight" for t in tails} | {f"{p}{t}.bias" for t in biased}
                continue
            tails += {"phi3": ["self_attn.qkv_proj"], "baichuan2": ["self_attn.W_pack"]}.get(family, qkv)
            tails += ["mlp.gate_up_proj"] if family in ("phi3", "glm", "glm4") else ["mlp.gate_proj", "mlp.up_proj"]
            tails += ["self_attn.q_norm", "self_attn.k_norm"] if family in ("qwen3", "olmo2", "gemma3") else []
            tails += ["post_feedforward_layernorm"] if family in ("olmo2", "gemma", "gemma3") else []
            tails += ["pre_feedforward_layernorm"] if family in ("gemma", "gemma3") else []
            tails += ["post_self_attn_layernorm", "post_mlp_layernorm"] if family == "glm4" else []
            if family == "olmo2":
                tails.remove("input_layernorm")
            biased = qkv if family == "qwen2" else []
            o = [] if family in ("glm", "glm4") else ["self_attn.o_proj"]
            biased = biased + (qkv + o if attn_bias else [])
            biased = biased + (["mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"] if mlp_bias else [])
        names |= {f"{p}{t}.weight" for t in tails} | {f"{p}{t}.bias" for t in biased}
    if family == "chatglm":
        linears = ["self_attention.query_key_value", "self_attention.dense", "mlp.dense_h_to_4h", "mlp.dense_4h_to_h"]
        names = {f"transformer.encoder.layers.{i}.{t}.weight" for i in range(layers)
                 for t in linears + ["input_layernorm", "post_attention_layernorm"]}
        names |= {f"transformer.encoder.layers.{i}.{linears[0]}.bias" for i in range(layers)}
        return names | {"transformer.embedding.word_embeddings.weight", "transformer.encoder.final_layernorm.weight",
                        "transformer.output_layer.weight", "transformer.rotary_pos_emb.inv_freq"}
    if family == "internlm2":
        return names | {"model.tok_embeddings.weight", "model.norm.weight", "output.weight"}
    names |= {"model.embed_tokens.weight", "model.norm.weight"}
    names |= {"model.norm.bias"} if family == "starcoder2" else set()
    return names if tied else names | {"lm_head.weight"}


# ---------------------------------------------------------------------------------------------------------
# InternLM2: its own tensor layout, and a plain-torch forward as a second opinion

INTERNLM2_NAMES = {
    "model.embed_tokens.weight": "model.tok_embeddings.weight", "lm_head.weight": "output.weight",
    "self_attn.o_proj": "attention.wo", "mlp.gate_proj": "feed_forward.w1", "mlp.up_proj": "feed_forward.w3",
    "mlp.down_proj": "feed_forward.w2", "input_layernorm": "attention_norm", "post_attention_layernorm": "ffn_norm",
}


def to_internlm2(tensors, heads, kv_heads):
    out = {}
    for name, t in tensors.items():
        if ".self_attn.k_proj." in name or ".self_attn.v_proj." in name:
            continue
        if ".self_attn.q_proj." in name:
            rep = heads // kv_heads
            d = t.shape[0] // heads
            q = t.reshape(kv_heads, rep, d, -1)
            k, v = (tensors[name.replace("q_proj", x)].reshape(kv_heads, 1, d, -1) for x in ("k_proj", "v_proj"))
            # For each KV head: its query heads, then its key, then its value.
            out[name.replace("self_attn.q_proj", "attention.wqkv")] = \
                torch.cat([q, k, v], dim=1).reshape(-1, t.shape[1]).contiguous()
            continue
        for a, b in INTERNLM2_NAMES.items():
            name = name.replace(a, b)
        out[name] = t.contiguous()
    return out


def from_internlm2(tensors, heads, kv_heads):
    out = {}
    for name, t in tensors.items():
        if ".attention.wqkv." in name:
            rep = heads // kv_heads
            g = t.reshape(kv_heads, rep + 2, -1, t.shape[1])
            for x, part in (("q_proj", g[:, :rep]), ("k_proj", g[:, rep]), ("v_proj", g[:, rep + 1])):
                out[name.replace("attention.wqkv", f"self_attn.{x}")] = part.reshape(-1, t.shape[1]).contiguous()
            continue
        for a, b in INTERNLM2_NAMES.items():
            name = name.replace(b, a)
        out[name] = t.contiguous()
    return out


def internlm2_forward(cfg, w, ids):
    """The published InternLM2 forward, for one window of ids [tokens]; all in f32."""
    t, heads, kv = ids.shape[0], cfg["num_attention_heads"], cfg["num_key_value_heads"]
    d, rep, eps = cfg["hidden_size"] // heads, heads // kv, cfg["rms_norm_eps"]
    base, limit = float(cfg["rope_theta"]), cfg["max_position_embeddings"]
    scaling = cfg["rope_scaling"]
    if scaling is not None and t > limit:
        assert scaling["type"] == "dynamic"
        s = scaling["factor"]
        base *= (s * t / limit - (s - 1)) ** (d / (d - 2))
    inv_freq = 1.0 / base ** (torch.arange(0, d, 2, dtype=F32) / d)
    angle = torch.arange(t, dtype=F32)[:, None] * inv_freq
    cos, sin = angle.cos()[:, None], angle.sin()[:, None]

    def rotate(x):
        a, b = x[..., : d // 2], x[..., d // 2:]
        return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)

    def norm(x, weight):
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps) * weight

    x = w["model.tok_embeddings.weight"][ids]
    causal = torch.ones(t, t, dtype=torch.bool).tril()
    for i in range(cfg["num_hidden_layers"]):
        p = f"model.layers.{i}."
        y = norm(x, w[p + "attention_norm.weight"])
        qkv = (y @ w[p + "attention.wqkv.weight"].T).view(t, kv, rep + 2, d)
        q, k, v = rotate(qkv[:, :, :rep].reshape(t, heads, d)), rotate(qkv[:, :, rep]), qkv[:, :, rep + 1]
        k, v = k.repeat_interleave(rep, dim=1), v.repeat_interleave(rep, dim=1)
        score = torch.einsum("qhd,khd->hqk", q, k) / math.sqrt(d)
        prob = score.masked_fill(~causal, float("-inf")).softmax(-1)
        x = x + torch.einsum("hqk,khd->qhd", prob, v).reshape(t, -1) @ w[p + "attention.wo.weight"].T
        y = norm(x, w[p + "ffn_norm.weight"])
        gate = F.silu(y @ w[p + "feed_forward.w1.weight"].T)
        x = x + (gate * (y @ w[p + "feed_forward.w3.weight"].T)) @ w[p + "feed_forward.w2.weight"].T
    return norm(x, w["model.norm.weight"]) @ w["output.weight"].T


# ---------------------------------------------------------------------------------------------------------
# Baichuan2: q, k and v in one matrix, a head whose rows are normalised before use


def to_baichuan2(tensors):
    out = {k: v for k, v in tensors.items() if not any(f".{x}_proj." in k for x in "qkv")}
    for name in tensors:
        if ".self_attn.q_proj." in name:
            parts = [tensors[name.replace("q_proj", f"{x}_proj")] for x in "qkv"]
            out[name.replace("q_proj", "W_pack")] = torch.cat(parts).contiguous()
    return out


def from_baichuan2(tensors):
    out = {}
    for name, t in tensors.items():
        if ".W_pack." in name:
            for x, part in zip("qkv", t.chunk(3)):
                out[name.replace("W_pack", f"{x}_proj")] = part.contiguous()
        elif name == "lm_head.weight":
            out[name] = F.normalize(t.float())
        else:
            out[name] = t
    return out


def baichuan2_forward(cfg, w, ids):
    """The forward published with Baichuan2-7B, for one window of ids [tokens]; all in f32."""
    t, heads, eps = ids.shape[0], cfg["num_attention_heads"], cfg["rms_norm_eps"]
    d = cfg["hidden_size"] // heads
    angle = torch.arange(t, dtype=F32)[:, None] / 10000.0 ** (torch.arange(0, d, 2, dtype=F32) / d)
    cos, sin = (torch.cat([f, f], dim=-1)[:, None] for f in (angle.cos(), angle.sin()))

    def rotate(x):
        return x * cos + torch.cat([-x[..., d // 2:], x[..., : d // 2]], dim=-1) * sin

    def norm(x, weight):
        return weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps))

    x = w["model.embed_tokens.weight"][ids]
    for i in range(cfg["num_hidden_layers"]):
        p = f"model.layers.{i}."
        y = norm(x, w[p + "input_layernorm.weight"]) @ w[p + "self_attn.W_pack.weight"].T
        q, k, v = y.view(t, 3, heads, d).unbind(1)
        heads_out = F.scaled_dot_product_attention(rotate(q).transpose(0, 1), rotate(k).transpose(0, 1),
                                                   v.transpose(0, 1), is_causal=True)
        x = x + heads_out.transpose(0, 1).reshape(t, -1) @ w[p + "self_attn.o_proj.weight"].T
        y = norm(x, w[p + "post_attention_layernorm.weight"])
        gate = F.silu(y @ w[p + "mlp.gate_proj.weight"].T)
        x = x + (gate * (y @ w[p + "mlp.up_proj.weight"].T)) @ w[p + "mlp.down_proj.weight"].T
    return norm(x, w["model.norm.weight"]) @ F.normalize(w["lm_head.weight"]).T


# ---------------------------------------------------------------------------------------------------------
# ChatGLM3 and GLM-4 9B as first published: other names, q, k and v in one matrix, and a buffer among the tensors

CHATGLM_NAMES = {
    "model.embed_tokens": "transformer.embedding.word_embeddings", "lm_head": "transformer.output_layer",
    "model.norm": "transformer.encoder.final_layernorm", "model.layers": "transformer.encoder.layers",
    "self_attn.o_proj": "self_attention.dense", "mlp.gate_up_proj": "mlp.dense_h_to_4h",
    "mlp.down_proj": "mlp.dense_4h_to_h",
}
INV_FREQ = "transformer.rotary_pos_emb.inv_freq"


def to_chatglm(tensors, config):
    out = {}
    for name, t in tensors.items():
        if ".k_proj." in name or ".v_proj." in name:
            continue
        if ".q_proj." in name:
            t = torch.cat([tensors[name.replace("q_proj", f"{x}_proj")] for x in "qkv"])
            name = name.replace("self_attn.q_proj", "self_attention.query_key_value")
        for a, b in CHATGLM_NAMES.items():
            name = name.replace(a, b)
        out[name] = t.contiguous()
    n = config["kv_channels"] // 2
    out[INV_FREQ] = (1.0 / 10000.0 ** (torch.arange(0, n, 2, dtype=F32) / n)).to(t.dtype)
    return out


def from_chatglm(tensors, build):
    out = {}
    rows = [build["head_dim"] * build[k] for k in ("num_attention_heads", "num_key_value_heads", "num_key_value_heads")]
    for name, t in tensors.items():
        if name == INV_FREQ:
            continue
        for a, b in CHATGLM_NAMES.items():
            name = name.replace(b, a)
        if ".query_key_value." in name:
            for x, part in zip("qkv", t.split(rows)):
                out[name.replace("self_attention.query_key_value", f"self_attn.{x}_proj")] = part.contiguous()
        else:
            out[name] = t
    return out


def chatglm_forward(cfg, w, ids):
    """The forward published with ChatGLM3 and GLM-4 9B, for one window of ids [tokens]; all in f32."""
    t, heads, kv, d = ids.shape[0], cfg["num_attention_heads"], cfg["multi_query_group_num"], cfg["kv_channels"]
    n, eps, m = d // 2, cfg["layernorm_epsilon"], cfg["ffn_hidden_size"]
    base = 10000.0 * cfg.get("rope_ratio", 1)
    angle = torch.outer(torch.arange(t, dtype=F32), 1.0 / base ** (torch.arange(0, n, 2, dtype=F32) / n))
    cos, sin = angle.cos()[:, None], angle.sin()[:, None]

    def rotate(x):
        a, b = x[..., 0:n:2], x[..., 1:n:2]
        return torch.cat([torch.stack([a * cos - b * sin, b * cos + a * sin], dim=-1).flatten(-2), x[..., n:]], dim=-1)

    def norm(x, name):
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps) * w[name + ".weight"]

    x = w["transformer.embedding.word_embeddings.weight"][ids]
    for i in range(cfg["num_layers"]):
        p = f"transformer.encoder.layers.{i}."
        qkv = norm(x, p + "input_layernorm") @ w[p + "self_attention.query_key_value.weight"].T
        qkv = qkv + w[p + "self_attention.query_key_value.bias"]
        q, k, v = (part.view(t, -1, d) for part in qkv.split([heads * d, kv * d, kv * d], dim=-1))
        q, k, v = rotate(q), rotate(k).repeat_interleave(heads // kv, 1), v.repeat_interleave(heads // kv, 1)
        out = F.scaled_dot_product_attention(q.transpose(0, 1), k.transpose(0, 1), v.transpose(0, 1), is_causal=True)
        x = x + out.transpose(0, 1).reshape(t, -1) @ w[p + "self_attention.dense.weight"].T
        y = norm(x, p + "post_attention_layernorm") @ w[p + "mlp.dense_h_to_4h.weight"].T
        x = x + (F.silu(y[:, :m]) * y[:, m:]) @ w[p + "mlp.dense_4h_to_h.weight"].T
    return norm(x, "transformer.encoder.final_layernorm") @ w["transformer.output_layer.weight"].T


# ---------------------------------------------------------------------------------------------------------
# Reference logits


def fresh_model(case, tensors, changed=None):
    """A new f32 model of the case's class holding `tensors` (class names), eager attention."""
    config = make_config(case, changed)
    config._attn_implementation = "eager"
    model = case["model"](config).float().eval()
    state = {k: v.float() for k, v in tensors.items()}
    if config.tie_word_embeddings:
        state["lm_head.weight"] = state["model.embed_tokens.weight"]
    model.load_state_dict(state, strict=True)
    assert model.config._attn_implementation == "eager"
    return model


@torch.no_grad()
def run(model, ids):
    return model(input_ids=ids[None], use_cache=False).logits[0].float()


def max_diff(a, b):
    return max((x - y).abs().max().item() for x, y in zip(a, b))


def class_tensors(case, folder):
    tensors = load_file(folder / "model.safetensors")
    if case["family"] == "internlm2":
        tensors = from_internlm2(tensors, case["build"]["num_attention_heads"], case["build"]["num_key_value_heads"])
    if case["family"] == "baichuan2":
        tensors = from_baichuan2(tensors)
    if case["family"] == "chatglm":
        tensors = from_chatglm(tensors, case["build"])
    return tensors


def from_disk(folder, ids):
    """What transformers makes of the folder itself."""
    model, info = AutoModelForCausalLM.from_pretrained(folder, dtype=F32, attn_implementation="eager",
                                                       output_loading_info=True)
    assert not any(info[k] for k in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    return run(model.eval(), ids)


def spread(case, tensors, ids):
    """Mean largest attention weight of the queries past the first eight (1 would be a hard maximum)."""
    model = fresh_model(case, tensors)
    with torch.no_grad():
        attn = model(input_ids=ids[None], use_cache=False, output_attentions=True).attentions
    return torch.stack([a[0, :, 8:].amax(-1).mean() for a in attn]).mean().item()


def check_sensitive(case, tensors, windows, logits):
    """Every tensor, and every option named in `differs`, must show in the logits."""
    least = (float("inf"), None)
    for name, t in tensors.items():
        if name.endswith("norm.weight"):
            wrong = torch.zeros_like(t) if case["family"].startswith("gemma") else torch.ones_like(t)
        elif name.endswith(".bias"):
            wrong = torch.zeros_like(t)
        else:
            wrong = t.roll(1, 0 if t.shape[0] > 1 else 1)  # out of place
        d = max_diff(logits[:1], [run(fresh_model(case, {**tensors, name: wrong}), windows[0])])
        least = min(least, (d, name))
    assert least[0] > 0.05, least
    weakest = float("inf")
    for changed in case["differs"]:
        d = max_diff(logits, [run(fresh_model(case, tensors, changed), w) for w in windows])
        assert d > 0.01, (case["name"], changed, d)
        weakest = min(weakest, d)
    return least, weakest


def generate(case, out):
    name, dtype = case["name"], case["dtype"]
    seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "little")
    gen = torch.Generator().manual_seed(seed)
    folder = out / name
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)

    config = make_config(case)
    model = case["model"](config)
    fill(model, gen)
    model = model.to(dtype)
    windows = [torch.randint(0, config.vocab_size, (n,), generator=gen) for n in case["windows"]]

    with tempfile.TemporaryDirectory() as tmp:
        model.save_pretrained(tmp)
        for file in ("config.json", "model.safetensors"):
            shutil.copyfile(Path(tmp) / file, folder / file)
    in_transformers = True
    if case["family"] == "internlm2":
        tensors = load_file(folder / "model.safetensors")
        tensors = to_internlm2(tensors, config.num_attention_heads, config.num_key_value_heads)
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        in_transformers = False
    elif case["family"] == "baichuan2":
        save_file(to_baichuan2(load_file(folder / "model.safetensors")), folder / "model.safetensors",
                  metadata={"format": "pt"})
        in_transformers = False
    elif case["family"] == "chatglm":
        save_file(to_chatglm(load_file(folder / "model.safetensors"), case["config"]), folder / "model.safetensors",
                  metadata={"format": "pt"})
        in_transformers = False
    elif case["config"] and case["config"]["model_type"] == "internlm3":
        in_transformers = False

    # Names and types on disk.
    with safe_open(folder / "model.safetensors", "pt") as f:
        names = set(f.keys())
        assert all(f.get_tensor(k).dtype == dtype for k in names)
    expect = published_names(case["family"], config.num_hidden_layers, case["build"], config.tie_word_embeddings)
    assert names == expect, names ^ expect

    # The reference: the stored weights, back in f32.
    tensors = class_tensors(case, folder)
    logits = [run(fresh_model(case, tensors), w) for w in windows]
    for w, l in zip(windows, logits):
        if in_transformers:
            assert torch.equal(from_disk(folder, w), l), "config as saved"
    if case["config"] is not None:
        (folder / "config.json").write_text(json.dumps(dict(sorted(case["config"].items())), indent=2) + "\n")
        for w, l in zip(windows, logits):
            if in_transformers:
                assert torch.equal(from_disk(folder, w), l), "config as published"
    second = None
    if case["family"] == "internlm2":
        raw = {k: v.float() for k, v in load_file(folder / "model.safetensors").items()}
        second = max_diff(logits, [internlm2_forward(case["config"], raw, w) for w in windows])
        assert second < 1e-3, second
    if case["family"] == "baichuan2":
        raw = {k: v.float() for k, v in load_file(folder / "model.safetensors").items()}
        second = max_diff(logits, [baichuan2_forward(case["config"], raw, w) for w in windows])
        assert second < 1e-3, second

    if case["family"] == "chatglm":
        raw = {k: v.float() for k, v in load_file(folder / "model.safetensors").items()}
        second = max_diff(logits, [chatglm_forward(case["config"], raw, w) for w in windows])
        assert second < 1e-3, second

    least, weakest = check_sensitive(case, tensors, windows, logits)
    exact = [run(fresh_model(case, tensors).double(), w) for w in windows]
    stds = [l.std().item() for l in logits]
    assert all(0.8 < s < 4 for s in stds), stds

    if len({len(w) for w in windows}) == 1:
        expected = {"input_ids": torch.stack(windows), "logits": torch.stack(logits)}
    else:
        expected = {}
        for i, (w, l) in enumerate(zip(windows, logits)):
            expected[f"input_ids.{i}"], expected[f"logits.{i}"] = w[None], l[None]
    save_file({k: v.contiguous() for k, v in expected.items()}, folder / "expected.safetensors")

    files = sorted(p.name for p in folder.iterdir())
    assert files == ["config.json", "expected.safetensors", "model.safetensors"], files
    size = sum(p.stat().st_size for p in folder.iterdir())
    assert size <= MAX_CASE_BYTES, size
    top, noise = spread(case, tensors, windows[-1]), max_diff(logits, exact)
    line = [f"{name:20s} {size / 1024:6.1f} KiB {DTYPE_NAME[dtype]:8s}", f"windows {case['windows']}",
            f"logits std {min(stds):.2f}..{max(stds):.2f}", f"top attention {top:.2f}", f"f32 vs f64 {noise:.1e}",
            f"least tensor {least[0]:.2f} ({least[1]})"]
    line += [f"least option {weakest:.2f}"] if case["differs"] else []
    line += [f"plain-torch forward {second:.1e}"] if second is not None else []
    print("  ".join(line))
    return size


def main():
    if len(sys.argv) < 2:
        sys.exit(__doc__)
    out, only = Path(sys.argv[1]), set(sys.argv[2:])
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    torch.set_num_threads(1)
    print(f"torch {torch.__version__}, transformers {transformers.__version__}")
    chosen = [c for c in cases() if not only or c["name"] in only]
    total = sum(generate(c, out) for c in chosen)
    print(f"{len(chosen)} cases, {total / 1024:.0f} KiB")


if __name__ == "__main__":
    main()
