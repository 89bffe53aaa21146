#!/usr/bin/env python3
"""Static stand-ins for NVIDIA's libraries, so that one binary links without CUDA and starts without it.

    cuda_shims.py CUDARC_DIR OUT_DIR

For every function that cudarc declares (`src/<library>/sys/mod.rs`) an archive `lib<name>.a` gets a symbol that jumps
through a table. The table's entries point at a resolver first: at the first call into a library it is looked for by
its soname, and every entry becomes the real function, or, where there is none, one that answers with the library's own
"not available". Nothing is loaded before that first call. x86-64 Linux (System V calling convention) only.
"""

import pathlib
import re
import subprocess
import sys

# name of the archive, folder in cudarc, symbols, status when it is not there, sonames in order of preference
LIBRARIES = [
    ("cuda", "driver", r"cu[A-Z]\w*", 100, ["libcuda.so.1", "libcuda.so"]),
    ("cublas", "cublas", r"cublas(?!Lt)[A-Z]\w*", 1, ["libcublas.so.13", "libcublas.so.12", "libcublas.so"]),
    ("cublasLt", "cublaslt", r"cublasLt\w*", 1, ["libcublasLt.so.13", "libcublasLt.so.12", "libcublasLt.so"]),
    ("curand", "curand", r"curand[A-Z]\w*", 203, ["libcurand.so.10", "libcurand.so"]),
    ("nvrtc", "nvrtc", r"nvrtc[A-Z]\w*", 1, ["libnvrtc.so.13", "libnvrtc.so.12", "libnvrtc.so"]),
]

# The resolver keeps every register that can hold an argument; r11 brings the index of the function.
SOURCE = """
#include <dlfcn.h>
#include <pthread.h>
#include <stddef.h>

#define COUNT {count}
__attribute__((visibility("hidden"))) void shim_{lib}_resolve(void);
__attribute__((visibility("hidden"))) void *shim_{lib}_slot[COUNT] = {{
    [0 ... COUNT - 1] = (void *)shim_{lib}_resolve,
}};
static const char *const names[COUNT] = {{ {names} }};
static long unavailable(void) {{ return {status}; }}
static pthread_once_t once = PTHREAD_ONCE_INIT;

static void load(void) {{
    static const char *const sonames[] = {{ {sonames} }};
    void *library = NULL;
    for (size_t i = 0; !library && i < sizeof sonames / sizeof *sonames; i++)
        library = dlopen(sonames[i], RTLD_NOW | RTLD_GLOBAL);
    for (size_t i = 0; i < COUNT; i++) {{
        void *found = library ? dlsym(library, names[i]) : NULL;
        __atomic_store_n(&shim_{lib}_slot[i], found ? found : (void *)unavailable, __ATOMIC_RELEASE);
    }}
}}

__attribute__((visibility("hidden"))) void shim_{lib}_load(void) {{ pthread_once(&once, load); }}

__asm__(
    ".text\\n.hidden shim_{lib}_resolve\\n.type shim_{lib}_resolve,@function\\nshim_{lib}_resolve:\\n"
    "\\tpushq %rbp\\n\\tmovq %rsp, %rbp\\n"
    "\\tpushq %rdi\\n\\tpushq %rsi\\n\\tpushq %rdx\\n\\tpushq %rcx\\n\\tpushq %r8\\n\\tpushq %r9\\n\\tpushq %rax\\n\\tpushq %r11\\n"
    "\\tsubq $128, %rsp\\n"
    "\\tmovups %xmm0, (%rsp)\\n\\tmovups %xmm1, 16(%rsp)\\n\\tmovups %xmm2, 32(%rsp)\\n\\tmovups %xmm3, 48(%rsp)\\n"
    "\\tmovups %xmm4, 64(%rsp)\\n\\tmovups %xmm5, 80(%rsp)\\n\\tmovups %xmm6, 96(%rsp)\\n\\tmovups %xmm7, 112(%rsp)\\n"
    "\\tcall shim_{lib}_load\\n"
    "\\tmovups (%rsp), %xmm0\\n\\tmovups 16(%rsp), %xmm1\\n\\tmovups 32(%rsp), %xmm2\\n\\tmovups 48(%rsp), %xmm3\\n"
    "\\tmovups 64(%rsp), %xmm4\\n\\tmovups 80(%rsp), %xmm5\\n\\tmovups 96(%rsp), %xmm6\\n\\tmovups 112(%rsp), %xmm7\\n"
    "\\taddq $128, %rsp\\n"
    "\\tpopq %r11\\n\\tpopq %rax\\n\\tpopq %r9\\n\\tpopq %r8\\n\\tpopq %rcx\\n\\tpopq %rdx\\n\\tpopq %rsi\\n\\tpopq %rdi\\n\\tpopq %rbp\\n"
    "\\tleaq shim_{lib}_slot(%rip), %r10\\n\\tjmp *(%r10,%r11,8)\\n");
"""

ENTRY = """__asm__(".globl {name}\\n.type {name},@function\\n{name}:\\n\\tmovl ${i}, %r11d\\n\\tjmp *shim_{lib}_slot+{at}(%rip)\\n");
"""


def main() -> None:
    cudarc, out = map(pathlib.Path, sys.argv[1:3])
    out.mkdir(parents=True, exist_ok=True)
    for lib, folder, pattern, status, sonames in LIBRARIES:
        text = (cudarc / "src" / folder / "sys" / "mod.rs").read_text()
        names = sorted(set(re.findall(rf"\bfn ({pattern})\(", text)))
        assert names, f"cudarc declares no functions of {lib}"
        quoted = lambda words: ", ".join(f'"{word}"' for word in words)
        source = SOURCE.format(lib=lib, count=len(names), names=quoted(names), status=status, sonames=quoted(sonames))
        source += "".join(ENTRY.format(name=n, i=i, at=8 * i, lib=lib) for i, n in enumerate(names))
        path = out / f"shim_{lib}.c"
        path.write_text(source)
        subprocess.run(["gcc", "-O2", "-fPIC", "-c", path, "-o", path.with_suffix(".o")], check=True)
        archive = out / f"lib{lib}.a"
        archive.unlink(missing_ok=True)
        subprocess.run(["ar", "rcs", archive, path.with_suffix(".o")], check=True)
        print(f"{archive}: {len(names)} functions", file=sys.stderr)


if __name__ == "__main__":
    main()
