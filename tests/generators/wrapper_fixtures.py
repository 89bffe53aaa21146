#!/usr/bin/env python3
"""Tiny random vision-language checkpoints, with the logits transformers computes for text alone.

    python tests/generators/wrapper_fixtures.py tests/fixtures/wrappers [case ...]

Each case is a folder as decoder_fixtures.py makes them, under the names and with the config.json that such models are
published with, vision tower and projector included. Qwen3-VL-MoE's experts are stored as published, all of a layer in one
tensor `[experts, in, out]`; no router is near a tie. InternVLChatModel is not in transformers: its reference is Qwen2 with
the same weights, its vision tower is there by name only.

Written for torch 2.10 (CPU), transformers 5.17, safetensors 0.8.
"""

import hashlib
import json
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import (AutoModelForImageTextToText, CLIPVisionConfig, Gemma3Config, Gemma3ForConditionalGeneration,
                          InternVLConfig, InternVLForConditionalGeneration, LlamaConfig, LlavaConfig,
                          LlavaForConditionalGeneration, Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration, Qwen2Config,
                          Qwen2ForCausalLM, Qwen2VLConfig, Qwen2VLForConditionalGeneration, Qwen3VLConfig,
                          Qwen3VLForConditionalGeneration, Qwen3VLMoeConfig, Qwen3VLMoeForConditionalGeneration)

sys.path.insert(0, str(Path(__file__).parent))
import decoder_fixtures  # noqa: E402

# Tokens below this are text; those above stand for images.
TEXT_TOKENS = 56
TEXT = dict(vocab_size=64, hidden_size=48, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, max_position_embeddings=128, bos_token_id=1, eos_token_id=2)
IMAGES = dict(image_token_id=60, video_token_id=61, vision_start_token_id=62, vision_end_token_id=63)
VISION = dict(hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, image_size=16, patch_size=8)
QWEN_VISION = dict(depth=1, hidden_size=32, intermediate_size=32, num_heads=2, out_hidden_size=48, patch_size=4)


def qwen2_5_vl():
    rope = {"rope_type": "default", "rope_theta": 1000000.0, "mrope_section": [2, 2, 2]}
    config = Qwen2_5_VLConfig(text_config=dict(TEXT, rope_parameters=rope), **IMAGES,
                              vision_config=dict(QWEN_VISION, fullatt_block_indexes=[0], window_size=16))
    return Qwen2_5_VLForConditionalGeneration(config)


def qwen2_vl():
    rope = {"rope_type": "default", "rope_theta": 1000000.0, "mrope_section": [2, 2, 2]}
    vision = dict(depth=1, embed_dim=32, hidden_size=48, mlp_ratio=1, num_heads=2, patch_size=4)
    config = Qwen2VLConfig(text_config=dict(TEXT, rope_parameters=rope), vision_config=vision, **IMAGES)
    return Qwen2VLForConditionalGeneration(config)


def flat(config):
    """How Qwen2-VL's and Qwen2.5-VL's config.json is published: the decoder's keys at the top, `mrope` as the type."""
    text = config.pop("text_config")
    rope = text.pop("rope_parameters")
    for key in ("layer_types", "model_type", "dtype"):
        text.pop(key, None)
    text.update(rope_theta=rope["rope_theta"], torch_dtype=config.pop("dtype"),
                rope_scaling={"type": "mrope", "mrope_section": rope["mrope_section"]})
    return {**text, **config}


def qwen3_vl():
    rope = {"rope_type": "default", "rope_theta": 5000000.0, "mrope_section": [4, 2, 2], "mrope_interleaved": True}
    config = Qwen3VLConfig(text_config=dict(TEXT, head_dim=16, rope_parameters=rope), **IMAGES,
                           vision_config=dict(QWEN_VISION, deepstack_visual_indexes=[0], num_position_embeddings=16))
    return Qwen3VLForConditionalGeneration(config)


def qwen3_vl_moe():
    rope = {"rope_type": "default", "rope_theta": 5000000.0, "mrope_section": [4, 2, 2], "mrope_interleaved": True}
    # transformers tells the published order from its own by shape: no matrix is square.
    text = dict(TEXT, head_dim=16, num_experts=5, num_experts_per_tok=2, moe_intermediate_size=16, rope_parameters=rope)
    vision = dict(QWEN_VISION, deepstack_visual_indexes=[0], num_position_embeddings=16)
    return Qwen3VLMoeForConditionalGeneration(Qwen3VLMoeConfig(text_config=text, vision_config=vision, **IMAGES))


def gemma3():
    # 64: its root is the same number in every type, and the reference runs in f32.
    config = Gemma3Config(text_config=dict(TEXT, hidden_size=64, head_dim=16, query_pre_attn_scalar=16, sliding_window=12,
                                           sliding_window_pattern=2),
                          vision_config=dict(VISION, model_type="siglip_vision_model"), mm_tokens_per_image=4,
                          image_token_index=63, boi_token_index=61, eoi_token_index=62)
    return Gemma3ForConditionalGeneration(config)


def llava():
    config = LlavaConfig(text_config=LlamaConfig(**TEXT), vision_config=CLIPVisionConfig(**VISION, projection_dim=16),
                         image_token_index=63, image_seq_length=4)
    return LlavaForConditionalGeneration(config)


def internvl():
    return Qwen2ForCausalLM(Qwen2Config(**TEXT, use_sliding_window=False))


def internvl_hf():
    text = dict(TEXT, model_type="qwen2", use_sliding_window=False, tie_word_embeddings=False)
    config = InternVLConfig(text_config=text, vision_config=VISION, image_token_id=63, image_seq_length=1,
                            tie_word_embeddings=False)
    return InternVLForConditionalGeneration(config)


CASES = {"qwen2-vl": (qwen2_vl, flat), "qwen2_5-vl": (qwen2_5_vl, flat), "qwen2_5-vl-sections": (qwen2_5_vl, None),
         "qwen3-vl": (qwen3_vl, None), "qwen3-vl-moe": (qwen3_vl_moe, None), "internvl-hf": (internvl_hf, None),
         "gemma3-vision": (gemma3, None), "llava": (llava, None), "internvl": (internvl, None)}


def is_text(name):
    return "language_model" in name or "lm_head" in name


def fill(model, gen):
    """The decoder as in decoder_fixtures.py, everything else small."""
    text_config = getattr(model.config, "text_config", model.config)
    named = dict(model.named_parameters())
    tied = "lm_head.weight" not in named
    config = SimpleNamespace(**{**text_config.to_dict(), "tie_word_embeddings": tied})
    text = {k: p for k, p in named.items() if is_text(k) or text_config is model.config}
    mixtures = {k: text.pop(k) for k in list(text) if ".experts." in k or k.endswith(".mlp.gate.weight")}
    decoder_fixtures.fill(SimpleNamespace(config=config, named_parameters=text.items), gen)
    for name, p in sorted(mixtures.items()):
        p.data.copy_(torch.randn(p.shape, generator=gen) * (2.0 if name.endswith("gate.weight") else 1.5) * p.shape[-1] ** -0.5)
    for name, p in sorted(named.items()):
        if name not in text and name not in mixtures:
            p.data.copy_(torch.randn(p.shape, generator=gen) * 0.1)


def as_published(folder):
    """transformers 5 saves experts as `[experts, out, in]`; published ones are `[experts, in, out]`."""
    tensors = load_file(folder / "model.safetensors")
    experts = json.loads((folder / "config.json").read_text())["text_config"]
    wide, narrow = experts["hidden_size"], experts["moe_intermediate_size"]
    for name, shape in [("gate_up_proj", (wide, 2 * narrow)), ("down_proj", (narrow, wide))]:
        for key in [k for k in tensors if k.endswith(f".experts.{name}")]:
            assert shape[0] != shape[1]
            if tuple(tensors[key].shape[1:]) != shape:
                tensors[key] = tensors[key].transpose(1, 2).contiguous()
            assert tuple(tensors[key].shape[1:]) == shape
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def margin(model, windows):
    """The closest decision of any router, in logits between the last chosen expert and the first that is not."""
    closest = []

    def hook(router, args, outputs):
        ordered = outputs[0].sort(-1, descending=True).values
        closest.append((ordered[:, router.top_k - 1] - ordered[:, router.top_k]).min().item())

    handles = [m.register_forward_hook(hook) for m in model.modules() if type(m).__name__.endswith("TopKRouter")]
    logits_of(model, windows)
    for handle in handles:
        handle.remove()
    return min(closest, default=float("inf"))


def logits_of(model, windows):
    return torch.cat([model(input_ids=w[None], use_cache=False).logits for w in windows])


def around_internvl(folder, gen):
    """Puts the decoder on disk inside an InternVLChatModel."""
    tensors = {f"language_model.{k}": t for k, t in load_file(folder / "model.safetensors").items()}
    p = "vision_model.encoder.layers.0."
    shapes = {p + "attn.qkv.weight": (96, 32), p + "attn.qkv.bias": (96,), p + "attn.proj.weight": (32, 32),
              p + "mlp.fc1.weight": (32, 32), p + "mlp.fc2.weight": (32, 32), p + "norm1.weight": (32,),
              "vision_model.embeddings.patch_embedding.weight": (32, 3, 8, 8), "mlp1.1.weight": (48, 128),
              "mlp1.3.weight": (48, 48)}
    tensors.update({k: (torch.randn(s, generator=gen) * 0.1).bfloat16() for k, s in shapes.items()})
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    text = json.loads((folder / "config.json").read_text())
    config = dict(architectures=["InternVLChatModel"], model_type="internvl_chat", downsample_ratio=0.5,
                  force_image_size=16, llm_config=text, select_layer=-1, template="internvl2_5",
                  tie_word_embeddings=False, torch_dtype="bfloat16",
                  vision_config=dict(architectures=["InternVisionModel"], hidden_size=32, image_size=16,
                                     intermediate_size=32, model_type="intern_vit_6b", num_attention_heads=2,
                                     num_hidden_layers=1, patch_size=8))
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")


@torch.no_grad()
def main():
    if len(sys.argv) < 2:
        sys.exit(__doc__)
    out, only = Path(sys.argv[1]), set(sys.argv[2:])
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    torch.set_num_threads(1)
    for name, (build, change) in CASES.items():
        if only and name not in only:
            continue
        gen = torch.Generator().manual_seed(int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "little"))
        folder = out / name
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        model = build()
        fill(model, gen)
        model.bfloat16().save_pretrained(folder)
        for file in folder.iterdir():
            if file.name not in ("config.json", "model.safetensors"):
                file.unlink()
        if change is not None:
            config = json.loads((folder / "config.json").read_text())
            (folder / "config.json").write_text(json.dumps(change(config), indent=2) + "\n")
        if name == "qwen3-vl-moe":
            as_published(folder)
        # What transformers makes of the folder, in f32.
        loader = Qwen2ForCausalLM if name == "internvl" else AutoModelForImageTextToText
        model, info = loader.from_pretrained(folder, dtype=torch.float32, output_loading_info=True,
                                             attn_implementation="eager")
        assert not any(info[k] for k in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
        windows = torch.randint(0, TEXT_TOKENS, (2, 32), generator=gen)
        while margin(model.eval(), windows) < 1e-3:
            windows = torch.randint(0, TEXT_TOKENS, (2, 32), generator=gen)
        logits = logits_of(model, windows)
        if name == "internvl":
            around_internvl(folder, gen)
        save_file({"input_ids": windows, "logits": logits.contiguous()}, folder / "expected.safetensors")
        size = sum(p.stat().st_size for p in folder.iterdir())
        print(f"{name:20s} {size / 1024:6.1f} KiB, logits std {logits.std():.2f}, {len(load_file(folder / 'model.safetensors'))} tensors")


if __name__ == "__main__":
    main()
