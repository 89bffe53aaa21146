#!/usr/bin/env python3
"""What transformers' logits processors make of logits, and the probabilities it then samples from.

    python tests/generators/sampling_golden.py tests/fixtures/generate/sampling.json

Per case: `logits` (f32), `seen` (token ids so far), the settings, and `probabilities` after repetition penalty,
temperature, top-k and top-p in the order in which transformers' `generate` applies them.

Written for torch 2.10, transformers 5.17.
"""

import json
import sys
from pathlib import Path

import torch
from transformers import (LogitsProcessorList, RepetitionPenaltyLogitsProcessor, TemperatureLogitsWarper,
                          TopKLogitsWarper, TopPLogitsWarper)


def case(logits, seen, temperature=1.0, top_k=0, top_p=1.0, repetition_penalty=1.0):
    chain = LogitsProcessorList()
    # The order of GenerationMixin._get_logits_processor.
    if repetition_penalty != 1.0:
        chain.append(RepetitionPenaltyLogitsProcessor(repetition_penalty))
    if temperature != 1.0:
        chain.append(TemperatureLogitsWarper(temperature))
    if top_k:
        chain.append(TopKLogitsWarper(top_k))
    if top_p < 1.0:
        chain.append(TopPLogitsWarper(top_p))
    x = torch.tensor([logits], dtype=torch.float32)
    probabilities = chain(torch.tensor([seen]), x.clone()).softmax(-1)[0]
    return dict(logits=x[0].tolist(), seen=seen, temperature=temperature, top_k=top_k, top_p=top_p,
                repetition_penalty=repetition_penalty, probabilities=probabilities.tolist())


def main():
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    gen = torch.Generator().manual_seed(0)
    ladder = [3.0, 2.0, 1.0, 0.5, 0.0, -1.0, -2.0, -4.0]
    cases = [
        case(ladder, [0]),
        case(ladder, [0, 7, 7], repetition_penalty=1.5),
        case(ladder, [0], temperature=0.5),
        case(ladder, [0], top_k=3),
        case(ladder, [0], top_k=100),
        case([1.0, 2.0, 2.0, 2.0, 0.0], [0], top_k=2),  # ties with the k-th are kept
        case(ladder, [0], top_p=0.9),
        case(ladder, [0], top_p=0.01),  # one token always stays
        case(ladder, [0, 1], temperature=2.0, top_k=5, top_p=0.8, repetition_penalty=1.3),
    ]
    for i in range(12):
        logits = (torch.randn(40, generator=gen) * 3).tolist()
        seen = torch.randint(0, 40, (15,), generator=gen).tolist()
        pick = lambda *values: values[int(torch.randint(0, len(values), (1,), generator=gen))]  # noqa: E731
        cases.append(case(logits, seen, pick(0.3, 0.7, 1.0, 1.6), pick(0, 1, 5, 20), pick(0.2, 0.5, 0.9, 0.95, 1.0),
                          pick(0.8, 1.0, 1.1, 1.5)))
    Path(sys.argv[1]).write_text("[\n" + ",\n".join(f"  {json.dumps(c)}" for c in cases) + "\n]\n")


if __name__ == "__main__":
    main()
