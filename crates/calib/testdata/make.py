#!/usr/bin/env python3
"""Make the files of this folder: a small tokenizer, small datasets, and the windows that
transformers, datasets and CPython's random give for them. A maintainers' tool.

Usage: python make.py        (needs datasets, tokenizers, transformers)
"""

import hashlib
import json
import random
import struct
from pathlib import Path

from datasets import Dataset
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

HERE = Path(__file__).resolve().parent
TEMPLATE = (
    "{{- bos_token }}{% for m in messages %}\n"
    "{% if m.role not in ['system', 'user', 'assistant'] %}{{ raise_exception('unknown role ' + m.role) }}{% endif %}\n"
    "[{{ m.role | upper }}] {{ m.content | trim }}{{ eos_token if m.role == 'assistant' else '\\n' }}\n"
    "{%- endfor %}"
)


def corpus():
    draw = random.Random(7)
    words = "the a river stone light counts over under seven paper engine quiet field ran runs of and to".split()
    documents = []
    for number in range(90):
        size = draw.choice([2, 5, 9, 20, 40, 90])
        text = " ".join(draw.choice(words) for _ in range(size))
        documents.append({
            "text": ["", " ", ""][number % 3] + text + ["", "\n", " é.", " 12"][number % 4],
            "question": text + "?",
            "instruction": "Say " + text,
            "input": "" if number % 2 else "now",
            "output": text[::-1],
            "messages": [
                {"role": "user", "content": " " + text},
                {"role": "assistant", "content": "Yes, " + text},
            ],
        })
    return documents


def make_tokenizer(rows):
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator([row["text"] for row in rows], trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", tokenizer.token_to_id("<s>"))]
    )
    # Both must be ignored by readers.
    tokenizer.enable_truncation(5)
    tokenizer.enable_padding(length=7)
    tokenizer.save(str(HERE / "tokenizer.json"), pretty=False)
    config = {"bos_token": "<s>", "eos_token": {"content": "</s>"}, "chat_template": TEMPLATE}
    (HERE / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", chat_template=TEMPLATE
    )


def blocks(ids, seqlen, samples):
    return [ids[i : i + seqlen] for i in range(0, len(ids) - seqlen + 1, seqlen)][:samples]


def windows(kind, rows, tokenizer, seed, samples, seqlen):
    data = Dataset.from_list(rows)
    if kind == "wikitext2":
        ids = tokenizer("\n\n".join(data["text"])).input_ids
        random.seed(seed)
        starts = [random.randint(0, len(ids) - seqlen) for _ in range(samples)]
        return [ids[s : s + seqlen] for s in starts]
    if kind in ("c4", "openwebtext"):
        web = kind == "openwebtext"
        data = data.shuffle(seed=seed) if web else data
        random.seed(seed)
        out = []
        while len(out) < samples:
            while True:
                row = data[random.randint(0, len(data) - 1)]["text"]
                ids = tokenizer(row, add_special_tokens=not web).input_ids
                ids = ids[:seqlen] if web else ids
                if len(ids) >= seqlen:
                    break
            start = random.randint(0, len(ids) - seqlen)
            out.append(ids[start : start + seqlen])
        return out
    ids = []
    for row in data.shuffle(seed=seed):
        if kind == "pileval":
            one = tokenizer.encode(row["text"].strip())
            ids += one if len(one) <= 512 else []
            continue
        if kind == "gsm8k":
            text = row["question"]
        elif kind == "open-platypus":
            user = row["instruction"] + " " + row["input"]
            turns = [{"role": "user", "content": user}, {"role": "assistant", "content": row["output"]}]
            text = tokenizer.apply_chat_template(turns, tokenize=False)
        else:
            text = tokenizer.apply_chat_template(row["messages"], tokenize=False)
        ids += tokenizer(text, add_special_tokens=False).input_ids[:seqlen]
    return blocks(ids, seqlen, samples)


def digest(windows):
    return hashlib.sha256(b"".join(struct.pack("<I", i) for w in windows for i in w)).hexdigest()


def main():
    rows = corpus()
    (HERE / "rows.jsonl").write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in rows), encoding="utf-8")
    tokenizer = make_tokenizer(rows)
    golden = []
    for kind in ["wikitext2", "c4", "openwebtext", "pileval", "gsm8k", "open-platypus", "neuralmagic_calibration", "ultrachat"]:
        for seed in (0, 42):
            got = windows(kind, rows, tokenizer, seed, 9, 32)
            assert len(got) == 9 and all(len(w) == 32 for w in got), kind
            golden.append({"set": kind, "seed": seed, "digest": digest(got), "first": got[0][:8]})
    lines = ",\n".join(json.dumps(g) for g in golden)
    (HERE / "golden.json").write_text(f"[\n{lines}\n]\n")


if __name__ == "__main__":
    main()
