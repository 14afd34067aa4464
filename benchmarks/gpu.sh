#!/bin/bash
# Everything a real accelerator must show, in parts of at most nine minutes each.
#
#   benchmarks/gpu.sh correctness|probe|grid|peers [OUT]
#
# Runs from a checkout with torch >= 2.11 and transformers >= 5 there; nothing is downloaded. Raw results go to OUT
# (default: benchmarks/results/NAME OF THE DEVICE). The part "peers" needs FSDP2 (in torch), and DeepSpeed where a
# folder of wheels is named by WHEELS.
set -u
part=${1:?correctness, probe, grid or peers}
cd "$(dirname "$0")/.."
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1
python=${PYTHON:-python3}
device=$($python -c 'import torch; print(torch.cuda.get_device_name().replace(" ", "-"))') || exit 1
out=${2:-benchmarks/results/$device}
mkdir -p "$out"
case $part in
correctness)
  timeout 530 $python -m pytest -q -p no:cacheprovider -m gpu tests/test_accelerator.py 2>&1 | tee "$out/correctness.txt"
  exit "${PIPESTATUS[0]}"
  ;;
probe)
  timeout 120 $python -m zero probe --json --again | tee "$out/probe.json"
  timeout 400 $python benchmarks/cpu_adamw.py --rounds 3 --out "$out/cpu_adamw" 2>&1 | tee "$out/cpu_adamw.txt"
  ;;
grid) timeout 530 $python benchmarks/gpu_grid.py --out "$out" --systems ours 2>&1 | tee "$out/grid.txt" ;;
peers) timeout 530 $python benchmarks/gpu_grid.py --out "$out" --systems fsdp2 deepspeed resident 2>&1 | tee "$out/peers.txt" ;;
*) echo "unknown part $part: correctness, probe, grid or peers" >&2; exit 2 ;;
esac
