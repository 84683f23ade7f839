#!/usr/bin/env bash
# Checks and times Kiln on this machine's GPU, within eight minutes, from a binary built before:
#
#   cargo build --release -p kiln-benches --bin gpu-check --features vulkan    # or cuda, cuda-cpp
#   scripts/gpu-check.sh BINARY [vulkan|cuda|wgpu]
#
# BINARY may be stripped and compressed with xz (25 MB). Every part has its own limit, so that one that hangs costs no other.
# Where Python has torch and peft, the same products and the same LoRA step in bf16 follow. CUDA built with `cuda-cpp` needs
# NVRTC and CUDA's headers: LD_LIBRARY_PATH and CUDA_PATH, where they aren't found by themselves.
set -uo pipefail
binary=${1:?path of the program gpu-check, or of it compressed with xz}
device=${2:-vulkan}
here=$(cd "$(dirname "$0")" && pwd)

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
case "$binary" in
    *.xz) python3 -c 'import lzma, shutil, sys; shutil.copyfileobj(lzma.open(sys.argv[1]), open(sys.argv[2], "wb"))' "$binary" "$work/gpu-check" ;;
    *) cp "$binary" "$work/gpu-check" ;;
esac
chmod +x "$work/gpu-check"

part() {
    local limit=$1
    shift
    printf '\n== [%d s] %s\n' "$SECONDS" "$*"
    timeout "$limit" "$work/gpu-check" --device "$device" "$@" || echo "-- ended with status $?"
}
command -v nvidia-smi > /dev/null && nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader
part 60 --part operations
part 60 --part step --batch 1x512
part 90 --part step --batch 2x2048
part 60 --part kernels
part 40 --part decode
part 90 --part step --batch 2x2048 --model qwen-7b --recompute block
if python3 -c 'import torch, peft; assert torch.cuda.is_available()' 2> /dev/null; then
    printf '\n== [%d s] torch and PEFT\n' "$SECONDS"
    timeout 80 python3 "$here/gpu-peft.py"
fi
printf '\n== [%d s] done\n' "$SECONDS"
