"""Writes tests/fixtures/eval/{golden,tasks}.json: perplexity, divergence statistics and task log-likelihoods of the bundled
model by transformers, numpy and lm-evaluation-harness's formulas, none of the project's code.

The "quantized" model is the bundled one with every `*_proj.weight` rounded per row to 4 bits, symmetric:
`s = max|w| / 7`, `w' = round_half_even(w / s) · s` in float32.

usage: HF_HUB_OFFLINE=1 python eval_golden.py [REPOSITORY]
With LM_EVAL=<folder of an unpacked lm_eval 0.4.13 wheel>, the prompt functions are compared with its own.
"""

import importlib.util
import json
import math
import os
import re
import sys
from pathlib import Path

import numpy as np
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

root = Path(sys.argv[1] if len(sys.argv) > 1 else Path(__file__).parents[2])
model_dir = root / "tests/fixtures/novels-llama-6m"
out = root / "tests/fixtures/eval"
tok = AutoTokenizer.from_pretrained(model_dir)


def model(rounded=False):
    m = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32).eval()
    if rounded:
        with torch.no_grad():
            for name, p in m.named_parameters():
                if name.endswith("_proj.weight"):
                    s = p.abs().amax(1, keepdim=True) / 7
                    p.copy_(torch.round(p / s) * s)
    return m


plain, coarse = model(), model(True)

# ---- perplexity and divergence -------------------------------------------------------------------------------------
TEXT = (root / "LICENSE").read_text()
SEQLEN, WINDOWS = 64, 12
ids = tok(TEXT)["input_ids"]
windows = [ids[i * SEQLEN : (i + 1) * SEQLEN] for i in range(WINDOWS)]
assert all(len(w) == SEQLEN for w in windows)


def log_probs(m):
    with torch.no_grad():
        return m(torch.tensor(windows)).logits.double().log_softmax(-1).numpy()


lp, lq = log_probs(plain), log_probs(coarse)
target = np.array(windows)[:, 1:, None]
nll = lambda l: -np.take_along_axis(l[:, :-1], target, 2).ravel()
n0, n1 = nll(lp), nll(lq)
kl = (np.exp(lp) * (lp - lq)).sum(-1).ravel()
top = (lp.argmax(-1) == lq.argmax(-1)).ravel().astype(float)
sem = lambda x: x.std() / math.sqrt(len(x) - 1)  # llama.cpp's mean_and_uncertainty
dp = np.exp(-n1) - np.exp(-n0)
rms = math.sqrt((dp**2).mean())
ratio = math.exp((n1 - n0).mean())
golden = {
    "windows": windows,
    "predictions": len(n0),
    "perplexity_original": math.exp(n0.mean()),
    "perplexity_original_standard_error": math.exp(n0.mean()) * sem(n0),
    "perplexity_quantized": math.exp(n1.mean()),
    "perplexity_quantized_standard_error": math.exp(n1.mean()) * sem(n1),
    "perplexity_ratio": ratio,
    "perplexity_ratio_standard_error": ratio * sem(n1 - n0),
    "kl_mean": kl.mean(),
    "kl_standard_error": sem(kl),
    "kl_median": np.quantile(kl, 0.5),
    "kl_p90": np.quantile(kl, 0.9),
    "kl_p99": np.quantile(kl, 0.99),
    "kl_p999": np.quantile(kl, 0.999),
    "kl_max": kl.max(),
    "top1": top.mean(),
    "top1_standard_error": math.sqrt(top.mean() * (1 - top.mean()) / (len(top) - 1)),
    "delta_p_mean": dp.mean(),
    "delta_p_mean_standard_error": sem(dp),
    "delta_p_rms": rms,
    "delta_p_rms_standard_error": 0.5 * sem(dp**2) / rms,
}
(out / "golden.json").write_text(json.dumps(golden) + "\n")


# ---- tasks: lm_eval/tasks/*, lm_eval/api/task.py, lm_eval/api/model.py ----------------------------------------------
def preprocess(text):
    text = text.strip()
    text = text.replace(" [title]", ". ")
    text = re.sub("\\[.*?\\]", "", text)
    return text.replace("  ", " ")


def multiple_choice(context, choices, gold):
    return {"requests": [(context, f" {c}") for c in choices], "choices": choices, "gold": gold}


def hellaswag(d):
    ctx = d["ctx_a"] + " " + d["ctx_b"].capitalize()
    query = preprocess(d["activity_label"] + ": " + ctx)
    return multiple_choice(query, [preprocess(e) for e in d["endings"]], int(d["label"]))


def mmlu(d):
    c, subject = d["choices"], d["subject"].replace("_", " ")
    question = f"{d['question'].strip()}\nA. {c[0]}\nB. {c[1]}\nC. {c[2]}\nD. {c[3]}\nAnswer:"
    head = f"The following are multiple choice questions (with answers) about {subject}.\n\n"
    return multiple_choice(head + question, ["A", "B", "C", "D"], d["answer"])


def arc(d):
    c = d["choices"]
    return multiple_choice(f"Question: {d['question']}\nAnswer:", c["text"], c["label"].index(d["answerKey"]))


def winogrande(d):
    idx = d["sentence"].index("_")
    contexts = [d["sentence"][:idx] + opt for opt in (d["option1"], d["option2"])]
    target = d["sentence"][idx + 1 :].strip()
    return {"requests": [(c, f" {target}") for c in contexts], "choices": contexts, "gold": int(d["answer"]) - 1}


def piqa(d):
    return multiple_choice(f"Question: {d['goal']}\nAnswer:", [d["sol1"], d["sol2"]], d["label"])


TASKS = {"hellaswag": hellaswag, "mmlu": mmlu, "arc_challenge": arc, "arc_easy": arc, "winogrande": winogrande, "piqa": piqa}


def encode_pair(context, continuation):
    n_spaces = len(context) - len(context.rstrip())
    if n_spaces > 0:
        continuation = context[-n_spaces:] + continuation
        context = context[:-n_spaces]
    whole, context = tok.encode(context + continuation), tok.encode(context)
    return context, whole[len(context) :]


def log_likelihood(m, context, continuation):
    c, t = encode_pair(context, continuation)
    x = (c + t)[-(m.config.max_position_embeddings + 1) :][:-1]
    with torch.no_grad():
        l = m(torch.tensor([x])).logits[0, -len(t) :].float().log_softmax(-1)
    return l.gather(-1, torch.tensor(t)[:, None]).double().sum().item()


def score(m, name):
    docs = [json.loads(line) for line in (out / f"tasks/{name}.jsonl").read_text().splitlines()]
    items, acc, acc_norm = [], [], []
    for item in map(TASKS[name], docs):
        lls = np.array([log_likelihood(m, *r) for r in item["requests"]])
        lengths = np.array([float(len(c)) for c in item["choices"]])
        acc.append(float(lls.argmax() == item["gold"]))
        acc_norm.append(float((lls / lengths).argmax() == item["gold"]))
        items.append({"requests": item["requests"], "log_likelihoods": lls.tolist(), "gold": item["gold"]})
    stderr = np.std(acc, ddof=1) / math.sqrt(len(acc))  # lm_eval.api.metrics.mean_stderr
    return {"acc": np.mean(acc), "acc_stderr": stderr, "acc_norm": np.mean(acc_norm), "items": items}


(out / "tasks.json").write_text(json.dumps({name: score(plain, name) for name in TASKS}, indent=1) + "\n")

# ---- the harness's own functions, where they are at hand ------------------------------------------------------------
if "LM_EVAL" in os.environ:
    import types

    sys.modules.setdefault("datasets", types.SimpleNamespace(Dataset=object))
    base = Path(os.environ["LM_EVAL"]) / "lm_eval/tasks"

    def load(path):
        spec = importlib.util.spec_from_file_location(path.stem, path)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module

    rows = lambda name: [json.loads(l) for l in (out / f"tasks/{name}.jsonl").read_text().splitlines()]
    utils = load(base / "hellaswag/utils.py")
    mapped = utils.process_docs(types.SimpleNamespace(map=lambda f: [f(d) for d in rows("hellaswag")]))
    for theirs, ours in zip(mapped, map(hellaswag, rows("hellaswag"))):
        assert theirs["query"] == ours["requests"][0][0] and theirs["choices"] == ours["choices"] and theirs["gold"] == ours["gold"]
    wino = load(base / "winogrande/preprocess_winogrande.py")
    for doc in rows("winogrande"):
        ours = winogrande(doc)
        assert wino.doc_to_choice(doc) == [c for c, _ in ours["requests"]] and " " + wino.doc_to_target(doc) == ours["requests"][0][1]
        assert wino.doc_to_text(doc) == ours["gold"]
    import jinja2, yaml

    def template(path, key, doc):
        loader = type("L", (yaml.SafeLoader,), {})
        loader.add_constructor("!function", lambda l, n: None)
        text = yaml.load((base / path).read_text(), loader)[key]
        env = jinja2.Environment(undefined=jinja2.StrictUndefined, keep_trailing_newline=True)
        return env.from_string(text).render(**doc)

    for name, path in [("piqa", "piqa/piqa.yaml"), ("arc_easy", "arc/arc_easy.yaml"), ("mmlu", "mmlu/default/_default_template_yaml")]:
        for doc in rows(name):
            assert TASKS[name](doc)["requests"][0][0].endswith(template(path, "doc_to_text", doc)), (name, doc)
    print("prompts equal lm-evaluation-harness's")
