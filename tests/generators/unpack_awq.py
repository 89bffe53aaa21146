#!/usr/bin/env python3
"""An unpacker of AutoAWQ's `gemm` layout that shares no code with the toolkit.

    unpack_awq.py CKPT_DIR REFERENCE.safetensors

dequantizes every AWQ module of the checkpoint folder and compares it with the tensor `<module>.weight`
of the reference file. Prints the largest absolute difference; exits with 1 if it is above 0, if a module
has no reference, or if the folder holds no AWQ module. Needs numpy only.
"""

import json
import struct
import sys
from pathlib import Path

import numpy as np

# AutoAWQ, awq/utils/packing_utils.py: position of each output channel among the nibbles of a word.
AWQ_REVERSE_ORDER = [0, 4, 1, 5, 2, 6, 3, 7]

DTYPES = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2", "I64": "<i8", "I32": "<i4", "U8": "u1", "I8": "i1"}


def read_safetensors(path):
    """Tensors of one file by name; bfloat16 becomes float32."""
    blob = Path(path).read_bytes()
    (length,) = struct.unpack("<Q", blob[:8])
    header = json.loads(blob[8 : 8 + length])
    tensors = {}
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        start, end = entry["data_offsets"]
        data = np.frombuffer(blob[8 + length + start : 8 + length + end], dtype=DTYPES[entry["dtype"]])
        if entry["dtype"] == "BF16":
            data = (data.astype(np.uint32) << 16).view(np.float32)
        tensors[name] = data.reshape(entry["shape"])
    return tensors


def unpack_words(words):
    """int32 [rows, N/8] to codes [rows, N]."""
    rows, columns = words.shape
    shifts = np.arange(0, 32, 4, dtype=np.uint32)
    nibbles = (words.view(np.uint32)[:, :, None] >> shifts) & np.uint32(15)
    return nibbles[:, :, AWQ_REVERSE_ORDER].reshape(rows, columns * 8).astype(np.int32)


def dequantize(qweight, qzeros, scales):
    """The weight [N, K] in float32: (code - zero) * scale."""
    codes, zeros = unpack_words(qweight), unpack_words(qzeros)
    group = codes.shape[0] // scales.shape[0]
    assert group * scales.shape[0] == codes.shape[0] and zeros.shape == scales.shape, "shapes disagree"
    zeros, scales = (np.repeat(a, group, axis=0) for a in (zeros, scales.astype(np.float32)))
    return ((codes - zeros).astype(np.float32) * scales).T


def main(folder, reference):
    config = json.loads((Path(folder) / "config.json").read_text())["quantization_config"]
    assert (config["quant_method"], config["version"], config["bits"]) == ("awq", "gemm", 4), config
    tensors = {}
    for path in sorted(Path(folder).glob("*.safetensors")):
        tensors.update(read_safetensors(path))
    wanted = read_safetensors(reference)
    modules = [name.removesuffix(".qweight") for name in tensors if name.endswith(".qweight")]
    worst, missing = 0.0, []
    for module in modules:
        packed = [tensors[f"{module}.{suffix}"] for suffix in ("qweight", "qzeros", "scales")]
        if config["group_size"] != -1:
            found = packed[0].shape[0] // packed[2].shape[0]
            assert found == config["group_size"], f"{module}: groups of {found}, config says {config['group_size']}"
        weight = wanted.get(f"{module}.weight")
        if weight is None:
            missing.append(module)
            continue
        got = dequantize(*packed)
        assert got.shape == weight.shape, f"{module}: {got.shape}, reference {weight.shape}"
        difference = float(np.max(np.abs(got - weight.astype(np.float32)), initial=0.0))
        # A NaN anywhere must not pass for 0.
        worst = difference if not difference <= worst else worst
    print(f"{len(modules)} AWQ modules, {len(missing)} without a reference, max abs diff {worst}")
    for module in missing:
        print(f"no `{module}.weight` in {reference}")
    return 0 if modules and not missing and worst == 0.0 else 1


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    sys.exit(main(sys.argv[1], sys.argv[2]))
