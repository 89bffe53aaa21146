#!/usr/bin/env bash
# Builds `lite` with CUDA where there is neither a GPU nor a CUDA toolkit. The compiler and the headers come from PyPI
# (about 250 MB), NVIDIA's libraries are stood in for by archives that look for the real ones at the first call, so the
# binary also starts, and runs on the CPU, on machines without CUDA. x86-64 Linux, gcc, python3 with pip.
#
#   scripts/cuda_build.sh [CARGO ARGUMENTS]      default: build --release -p lite
#
# CUDA_DIR           where the pieces are kept          [target/cuda]
# CUDA_COMPUTE_CAP   oldest GPU the binary runs on      [80: Ampere; newer ones compile the kernels when they load them]
# CARGO_TARGET_DIR   where cargo builds                 [target/cuda/build]
#
# At run time: a driver for CUDA 13 (580 or newer), and libcublas.so.13, libcublasLt.so.13 and libcurand.so.10 where the
# loader finds them; `pip install nvidia-cublas nvidia-curand` has them, LD_LIBRARY_PATH shows the way.
set -euo pipefail
cd "$(dirname "$0")/.."

dir=$(realpath -m "${CUDA_DIR:-target/cuda}")
wheels=(
    nvidia-cuda-nvcc==13.0.88 nvidia-cuda-crt==13.0.88 nvidia-nvvm==13.0.88 nvidia-cuda-runtime==13.0.96
    nvidia-cuda-cccl==13.0.85 nvidia-curand==10.4.0.35 nvidia-cuda-nvrtc==13.0.88
)
mkdir -p "$dir"

if [ ! -x "$dir/wheels/nvidia/cu13/bin/nvcc" ]; then
    python3 -m pip install --quiet --no-deps --target "$dir/wheels" "${wheels[@]}"
fi

# The layout that nvcc and the build scripts look for.
home=$dir/home
mkdir -p "$home"
for part in bin include nvvm lib; do ln -sfn "$dir/wheels/nvidia/cu13/$part" "$home/$part"; done
mkdir -p "$home/lib64/stubs"

cargo fetch --locked
cudarc=$(cargo metadata --locked --format-version 1 --features lite/cuda |
    python3 -c 'import json, os, sys
print(next(os.path.dirname(p["manifest_path"]) for p in json.load(sys.stdin)["packages"] if p["name"] == "cudarc"))')
python3 scripts/cuda_shims.py "$cudarc" "$home/lib64/stubs"
# NVIDIA's own static runtime copes with a missing driver.
ln -sfn "$dir/wheels/nvidia/cu13/lib/libcudart_static.a" "$home/lib64/stubs/libcudart.a"

export CUDA_HOME=$home CUDA_PATH=$home CUDA_ROOT=$home CUDA_TOOLKIT_ROOT_DIR=$home
export PATH=$home/bin:$PATH
export CUDA_COMPUTE_CAP=${CUDA_COMPUTE_CAP:-80}
export CUDAFORGE_THREADS=${CUDAFORGE_THREADS:-$(nproc)}
export CARGO_TARGET_DIR=${CARGO_TARGET_DIR:-$dir/build}

if [ $# -eq 0 ]; then set -- build --release -p lite; fi
cargo "$@" --locked --features lite/cuda
