#!/usr/bin/env bash
# Everything there is to check on a machine with an NVIDIA GPU, in one command:
#
#   1. the test suite, with the tests that run on every device there is,
#   2. figures of the bundled model on the GPU beside those on the CPU,
#   3. runs on a synthetic checkpoint of a 7B Llama's shape: seconds, memory of host and device, tokens per second, and
#      the time that the work and the bytes alone would take.
#
#   scripts/gpu_check.sh [DIR]        DIR: where results go [target/gpu_check]
#
# Without nvcc on the PATH, scripts/cuda_build.sh brings the compiler (see there what is needed at run time). Variables:
# LAYERS      blocks of the synthetic checkpoint                                  [32]
# SAMPLES     calibration windows of 2048 tokens                                  [128]
# DEVICE      the GPU                                                             [cuda]
# GPU_TFLOPS  f32 peak of the GPU, for the floor                                  [60]
# LINK_GBPS   bytes between host and device, for the floor                        [25]
# SKIP_TESTS  1 leaves out step 1
# MEASURE_CPU 1 runs the step 3 of a plain auto_awq on the CPU too, for comparison
set -euo pipefail
cd "$(dirname "$0")/.."
out=$(realpath -m "${1:-target/gpu_check}")
device=${DEVICE:-cuda}
mkdir -p "$out"

if command -v nvcc >/dev/null; then
    target=${CARGO_TARGET_DIR:-target}
    with_cuda() { cargo "$@" --locked --features lite/cuda; }
else
    target=${CARGO_TARGET_DIR:-${CUDA_DIR:-target/cuda}/build}
    export CARGO_TARGET_DIR=$target
    with_cuda() { scripts/cuda_build.sh "$@"; }
fi

# One line of JSON out of a file of events: field EVENT PATH...
field() {
    python3 -c 'import json, sys
found = None
for line in open(sys.argv[1]):
    value = json.loads(line)
    if value.get("event") == sys.argv[2]:
        for key in sys.argv[3:]:
            value = value[key]
        found = value
print(found)' "$@"
}

# Fails unless two numbers agree: agree WHAT A B RELATIVE ABSOLUTE
agree() {
    python3 -c 'import sys
what, a, b, relative, absolute = sys.argv[1], *map(float, sys.argv[2:])
fits = abs(a - b) <= max(relative * abs(b), absolute)
print(f"  {what}: gpu {a:.8g}, cpu {b:.8g}, apart {abs(a - b):.3g}, allowed {max(relative * abs(b), absolute):.3g}: " + ("ok" if fits else "FAILED"))
sys.exit(not fits)' "$@" || failed=1
}
failed=0

echo "== 0. build"
with_cuda build --release -p lite
with_cuda build --release -p lite --example synthetic
lite=$(realpath "$target/release/lite")
synthetic=$(realpath "$target/release/examples/synthetic")
"$lite" env
"$lite" env --format json >"$out/env.json"
[ "$(python3 -c 'import json, sys; print(len(json.load(open(sys.argv[1]))["cuda"]["devices"]))' "$out/env.json")" -gt 0 ] ||
    { echo "no GPU that works was found: see the lines above"; exit 5; }

if [ "${SKIP_TESTS:-0}" != 1 ]; then
    echo "== 1. tests"
    with_cuda test --workspace >"$out/tests.log" 2>&1 || failed=1
    grep -E "^test result|FAILED|panicked|^error" "$out/tests.log" || true
fi

echo "== 2. the bundled model: GPU beside CPU"
model=tests/fixtures/novels-llama-6m
text=(--dataset builtin --seqlen 512 --windows 32 --canary 0)
calib=(--calib-dataset builtin --calib-samples 32 --calib-seqlen 512 --format json)
"$lite" auto_awq "$model" --device cpu --work-dir "$out/awq-cpu" --overwrite "${calib[@]}" >"$out/awq-cpu.jsonl"
for on in cpu "$device"; do
    name=${on//:/-}
    "$lite" eval "$out/awq-cpu" --against "$model" --device "$on" "${text[@]}" --format json >"$out/eval-$name.jsonl"
    "$lite" verify "$out/awq-cpu" --against "$model" --device "$on" --format json >"$out/verify-$name.jsonl" || failed=1
done
gpu=$out/eval-${device//:/-}.jsonl
# One checkpoint run in two orders of summation: 1e-4 of each figure, the bound that the tests hold the composed
# operations to on the CPU.
for path in "perplexity value" "perplexity_original value" "kl mean"; do
    # shellcheck disable=SC2086
    agree "eval, $path" "$(field "$gpu" eval comparison $path)" "$(field "$out/eval-cpu.jsonl" eval comparison $path)" 1e-4 1e-7
done
# Quantizing on the GPU may choose another code where two are equally good: the results are two samples of one quality.
for verb in auto_awq auto_gptq; do
    for on in cpu "$device"; do
        name=$verb-${on//:/-}
        "$lite" $verb "$model" --device "$on" --work-dir "$out/$name" --overwrite "${calib[@]}" >"$out/$name.jsonl"
        "$lite" eval "$out/$name" --against "$model" --device cpu "${text[@]}" --format json >"$out/$name-eval.jsonl"
    done
    agree "$verb, kl mean" "$(field "$out/$verb-${device//:/-}-eval.jsonl" eval comparison kl mean)" \
        "$(field "$out/$verb-cpu-eval.jsonl" eval comparison kl mean)" 0.05 0
done

echo "== 3. a synthetic checkpoint of a 7B Llama's shape, ${LAYERS:-32} blocks"
"$synthetic" "$out/synthetic" --layers "${LAYERS:-32}"
measure() { # NAME DEVICE VERB FLAGS...
    local name=$1 on=$2 verb=$3
    shift 3
    # The device's memory in use, twice a second; the largest is kept.
    (while sleep 0.5; do nvidia-smi --query-gpu=memory.used --format=csv,noheader,nounits | sort -n | tail -1; done) >"$out/$name.mib" &
    local watcher=$!
    "$lite" "$verb" "$out/synthetic" --device "$on" --work-dir "$out/$name" --overwrite --format json --calib-dataset builtin \
        --calib-samples "${SAMPLES:-128}" --calib-seqlen 2048 --eval-samples 4 "$@" >"$out/$name.jsonl" || failed=1
    kill $watcher 2>/dev/null || true
    wait $watcher 2>/dev/null || true
    python3 - "$out/$name" "${GPU_TFLOPS:-60}" "${LINK_GBPS:-25}" <<'PY'
import json, sys

name, tflops, link = sys.argv[1], float(sys.argv[2]), float(sys.argv[3])
events = [json.loads(line) for line in open(name + ".jsonl")]
of = lambda kind: next((e for e in reversed(events) if e.get("event") == kind), None)
plan, summary = of("plan"), of("summary")
if plan is None or summary is None:
    sys.exit(f"  {name}: no result")
device = max((int(line) for line in open(name + ".mib") if line.strip()), default=0)
config = json.load(open(name.rsplit("/", 1)[0] + "/synthetic/config.json"))
tokens = plan["windows"] * plan["seqlen"]
seconds = summary["seconds"]
# What has to move: the weights once to the device in f32, the hidden states of all windows there and back for each
# block, Gram matrices back.
hidden, inner, layers = config["hidden_size"], config["intermediate_size"], config["num_hidden_layers"]
weights = plan["source_bytes"] * 2
states = layers * 2 * 2 * tokens * hidden * 4
grams = layers * (3 * hidden**2 + inner**2) * 4
print(f"  {name.rsplit('/', 1)[1]}: {seconds:.1f} s, {tokens / seconds:.0f} calibration tokens/s through all blocks")
print(f"    peak memory: host {summary['peak_resident_bytes'] / 2**20:.0f} MiB (planned {plan['memory']['peak'] / 2**20:.0f}), device {device} MiB")
print(f"    floor: {plan['flops'] / 1e12:.0f} Tflop in all, {plan['flops'] / tflops / 1e12:.1f} s at {tflops:g} Tflop/s; "
      f"{(weights + states + grams) / 1e9:.0f} GB, {(weights + states + grams) / link / 1e9:.1f} s at {link:g} GB/s")
PY
}
measure synthetic-awq "$device" auto_awq
measure synthetic-gptq "$device" auto_gptq
if [ "${MEASURE_CPU:-0}" = 1 ]; then measure synthetic-awq-cpu cpu auto_awq; fi

if [ "$failed" -ne 0 ]; then
    echo "== something FAILED, see above"
    exit 1
fi
echo "== all agreed"
