#!/usr/bin/env python3
"""Greedy continuations by transformers, of every family fixture and of the bundled model.

    python tests/generators/greedy_tokens.py tests/fixtures [case ...]

Writes generate/greedy.json: per case the prompt's ids, 64 greedy tokens (f32, eager attention, with transformers' own
KV cache but for LongRoPE, no end token), and the smallest distance between the best and the second logit on the way. Prompts are drawn
until that distance is at least 1e-3, so that the last bits of a logit decide nothing, and four tokens differ. InternLM2, InternLM3 and
Baichuan2 run as Llama, ChatGLM as Glm with the same weights, as in decoder_fixtures.py. With names of cases the others stay as they are.

Written for torch 2.10 (CPU), transformers 5.17.
"""

import hashlib
import json
import sys
from pathlib import Path

import torch
import transformers
from safetensors.torch import load_file
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM

sys.path.insert(0, str(Path(__file__).parent))
import decoder_fixtures  # noqa: E402

DENSE_MODEL = decoder_fixtures.fresh_model
import moe_fixtures  # noqa: E402

NEW, MARGIN = 64, 1e-3
TEXT = "It was a bright morning, and the old man"


@torch.no_grad()
def greedy(model, prompt, use_cache=True):
    """64 tokens and the smallest margin between the two best logits."""
    model.generation_config.eos_token_id = None
    out = model.generate(torch.tensor([prompt]), do_sample=False, max_new_tokens=NEW, min_new_tokens=NEW, use_cache=use_cache,
                         output_logits=True, return_dict_in_generate=True, pad_token_id=0)
    top = torch.stack(out.logits)[:, 0].float().topk(2).values
    return out.sequences[0, len(prompt):].tolist(), (top[:, 0] - top[:, 1]).min().item()


def main():
    if len(sys.argv) < 2:
        sys.exit(__doc__)
    fixtures = Path(sys.argv[1])
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    wanted = sys.argv[2:]
    found = json.loads((fixtures / "generate" / "greedy.json").read_text()) if wanted else {}
    # Generation knows no latent attention.
    experts = [case for case in moe_fixtures.cases() if "kv_lora_rank" not in case["build"]]
    for case in decoder_fixtures.cases() + experts:
        name = case["name"]
        if wanted and name not in wanted:
            continue
        folder = fixtures / "families" / name
        if case in experts:
            tensors, fresh = load_file(folder / "model.safetensors"), moe_fixtures.fresh_model
        else:
            tensors, fresh = decoder_fixtures.class_tensors(case, folder), DENSE_MODEL
        seed = int.from_bytes(hashlib.sha256(f"greedy {name}".encode()).digest()[:4], "little")
        gen = torch.Generator().manual_seed(seed)
        for _ in range(200):
            prompt = torch.randint(3, case["build"]["vocab_size"], (20,), generator=gen).tolist()
            # A fresh model: dynamic rope keeps state between calls.
            # LongRoPE changes its frequencies on the way. Phi-3 then drops its cache, to compute it again; transformers
            # 5.17 goes on with the last token alone.
            cached = case["build"]["rope_parameters"].get("rope_type") != "longrope"
            tokens, margin = greedy(fresh(case, tensors), prompt, cached)
            # Gemma's embeddings are tied and large: random weights repeat the last token of any prompt.
            if margin >= MARGIN and (len(set(tokens)) >= 4 or name.startswith("gemma")):
                break
        else:
            sys.exit(f"{name}: no prompt with a clear margin")
        found[name] = dict(prompt=prompt, tokens=tokens, margin=margin)
        print(f"{name:20} margin {margin:.1e}, {len(set(tokens))} different tokens", flush=True)

    folder = fixtures / "novels-llama-6m"
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    prompt = tokenizer.encode(TEXT).ids
    tokens, margin = greedy(model, prompt)
    assert margin >= MARGIN, margin
    text = tokenizer.decode(tokens)
    found["novels-llama-6m"] = dict(prompt=prompt, tokens=tokens, margin=margin, prompt_text=TEXT, text=text)
    print(f"novels-llama-6m      margin {margin:.1e}: {text!r}")

    out = fixtures / "generate"
    out.mkdir(exist_ok=True)
    lines = [f"  {json.dumps(name)}: {json.dumps(case)}" for name, case in sorted(found.items())]
    (out / "greedy.json").write_text("{\n" + ",\n".join(lines) + "\n}\n")


if __name__ == "__main__":
    main()
