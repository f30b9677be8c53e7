#!/usr/bin/env bash
# Everything that needs a GPU, in one command on a machine with the driver, nvcc (CUDA 13) and Rust: the device tests (each kernel against
# the reference, and cublasLt), the bare engine at LLaMA-7B's sizes with random weights, every op at those sizes, then where the memory of a
# model goes and `midpo bench --url` against a server of it. Results in target/gpu/.
#
#   benches/gpu.sh [MODEL_DIR_OR_GGUF]      without a model, the server's is the embedded demo, which says nothing about speed
set -euo pipefail
cd "$(dirname "$0")/.."
model=${1:-}
out=target/gpu
mkdir -p "$out"

nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv | tee "$out/device.csv"
cargo test --locked --release --features cuda --test it cuda -- --nocapture 2>&1 | tee "$out/tests.txt"
if grep -q "skipped on a GPU" "$out/tests.txt"; then
    echo "the tests found no GPU: nothing below would mean anything" >&2
    exit 1
fi

cargo build --locked --release --features cuda
target/release/midpo bench --engine --device cuda --shape llama-7b --step-rows 2048 --batch 1,8,32,128 --prefill 512,2048,8192 \
    --context 4096 --json "$out/llama-7b.json" | tee "$out/llama-7b.md"
cargo bench --locked --features cuda --bench kernels -- --device cuda --json "$PWD/$out/kernels.json" | tee "$out/kernels.txt"
target/release/midpo serve --check --device cuda ${model:+--model "$model"} | tee "$out/memory.txt"
port=$((20000 + RANDOM % 20000))
target/release/midpo serve --device cuda --port "$port" ${model:+--model "$model"} > "$out/server.txt" 2>&1 &
server=$!
trap 'kill "$server" 2> /dev/null || true' EXIT
until target/release/midpo health --url "http://127.0.0.1:$port" > /dev/null 2>&1; do
    kill -0 "$server" || { cat "$out/server.txt" >&2; exit 1; }
    sleep 1
done
target/release/midpo bench --url "http://127.0.0.1:$port" --concurrency 1,8,32,128 --json "$out/serve.json"
echo "results: $out"
