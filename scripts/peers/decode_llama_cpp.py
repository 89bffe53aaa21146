"""Decode speed of llama.cpp on a Llama of seeded random weights, beside `lite generate` on the same shape.

usage: decode_llama_cpp.py [--type F32|Q8_0|Q4_0 …] [--threads N] [--tokens N] [--layers N] [--hidden N] …
needs: pip install gguf llama-cpp-python

Prints one JSON line for each type: tokens per second, and bytes of weights read per second (all matrices but the
embedding are read once for each token).
"""

import argparse
import json
import tempfile
import time
from pathlib import Path

import gguf
import numpy as np
from llama_cpp import Llama


def write(path, shape, kind):
    """A GGUF file of this shape; returns the bytes of the matrices that decoding a token reads."""
    random = np.random.default_rng(0)
    quant = gguf.GGMLQuantizationType[kind]
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(2048)
    writer.add_embedding_length(shape.hidden)
    writer.add_block_count(shape.layers)
    writer.add_feed_forward_length(shape.intermediate)
    writer.add_head_count(shape.heads)
    writer.add_head_count_kv(shape.kv_heads)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(shape.hidden // shape.heads)
    writer.add_vocab_size(shape.vocab)
    writer.add_tokenizer_model("llama")
    writer.add_token_list([f"<{i}>" for i in range(shape.vocab)])
    writer.add_token_scores([0.0] * shape.vocab)
    writer.add_token_types([gguf.TokenType.NORMAL] * shape.vocab)
    read = 0

    def matrix(name, rows, columns):
        nonlocal read
        values = random.standard_normal((rows, columns), dtype=np.float32) / np.sqrt(columns)
        data = values if kind == "F32" else gguf.quants.quantize(values, quant)
        writer.add_tensor(name, data, raw_dtype=quant)
        read += 0 if name.startswith("token_embd") else data.nbytes

    def norm(name):
        writer.add_tensor(name, np.ones(shape.hidden, dtype=np.float32))

    matrix("token_embd.weight", shape.vocab, shape.hidden)
    matrix("output.weight", shape.vocab, shape.hidden)
    norm("output_norm.weight")
    kv = shape.hidden // shape.heads * shape.kv_heads
    for i in range(shape.layers):
        norm(f"blk.{i}.attn_norm.weight")
        norm(f"blk.{i}.ffn_norm.weight")
        matrix(f"blk.{i}.attn_q.weight", shape.hidden, shape.hidden)
        matrix(f"blk.{i}.attn_k.weight", kv, shape.hidden)
        matrix(f"blk.{i}.attn_v.weight", kv, shape.hidden)
        matrix(f"blk.{i}.attn_output.weight", shape.hidden, shape.hidden)
        matrix(f"blk.{i}.ffn_gate.weight", shape.intermediate, shape.hidden)
        matrix(f"blk.{i}.ffn_up.weight", shape.intermediate, shape.hidden)
        matrix(f"blk.{i}.ffn_down.weight", shape.hidden, shape.intermediate)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return read


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--type", nargs="+", default=["F32", "Q8_0", "Q4_0"])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=64)
    for name, value in [("layers", 8), ("hidden", 2048), ("intermediate", 5632), ("heads", 32), ("kv-heads", 4), ("vocab", 8192)]:
        parser.add_argument(f"--{name}", type=int, default=value)
    args = parser.parse_args()
    for kind in args.type:
        with tempfile.TemporaryDirectory() as folder:
            path = str(Path(folder) / "model.gguf")
            read = write(path, args, kind)
            model = Llama(path, n_ctx=512, n_threads=args.threads, n_threads_batch=args.threads, verbose=False)
            model.eval(list(range(1, 9)))
            best = 0.0
            for _ in range(3):
                start = time.perf_counter()
                for token in range(args.tokens):
                    model.eval([token % args.vocab])
                best = max(best, args.tokens / (time.perf_counter() - start))
            figures = {"type": kind, "threads": args.threads, "tokens_per_second": round(best, 1),
                       "weights_gb_per_second": round(best * read / 1e9, 1), "weight_bytes": read}
            print(json.dumps(figures), flush=True)
            del model


if __name__ == "__main__":
    main()
