#!/bin/bash
# Everything a real accelerator must show, in parts of at most nine minutes each.
#
#   [WHEELS=FOLDER] [PYTHON=python3] benchmarks/gpu.sh correctness|probe|grid|peers|generation [OUT]
#
# Runs from a checkout; nothing is downloaded. PYTHON must have torch >= 2.11, transformers >= 5, pytest and what the
# project needs beside them (psutil, pydantic, pyyaml, rich); generation needs accelerate, too. What it lacks can come from WHEELS, a folder of wheels, for
# pydantic those of pydantic, pydantic_core, annotated_types and typing_inspection; DeepSpeed's, with hjson's, are seen by
# its own runs alone. Raw results go to OUT (default: benchmarks/results/NAME OF THE DEVICE). The exit status is that of
# what was run.
set -uo pipefail
part=${1:?correctness, probe, grid, peers or generation}
[ $# -lt 2 ] || out=$(realpath -m "$2")
[ -z "${WHEELS:-}" ] || WHEELS=$(realpath "$WHEELS") || exit 2
cd "$(dirname "$0")/.." || exit 2
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1
python=${PYTHON:-python3}

# Where the wheels are unpacked: $1 names the folder, the others are wheels.
unpack() {
  local folder=$1
  shift
  [ $# -eq 0 ] || "$python" -m pip install --quiet --no-index --no-deps --no-compile --target "$folder" "$@"
}

if [ -n "${WHEELS:-}" ]; then
  unpacked=$(mktemp -d)
  trap 'rm -rf "$unpacked"' EXIT
  ours=() peers=()
  for wheel in "$WHEELS"/*.whl; do
    case ${wheel##*/} in deepspeed-* | hjson-*) peers+=("$wheel") ;; *) ours+=("$wheel") ;; esac
  done
  unpack "$unpacked/ours" "${ours[@]}" && unpack "$unpacked/peers" "${peers[@]}" || exit
  PYTHONPATH=$PYTHONPATH:$unpacked/ours
  export PEERS_PATH=$unpacked/peers # transformers imports DeepSpeed wherever it finds it
fi
device=$("$python" -c 'import torch; print(torch.cuda.get_device_name().replace(" ", "-"))') || exit
out=${out:-benchmarks/results/$device}
mkdir -p "$out" || exit
status=0

# Runs a command for at most $1 seconds; what it prints goes to the file $2 as well, messages too unless that is JSON.
keep() {
  local limit_s=$1 file=$out/$2
  shift 2
  case $file in
  *.json) timeout "$limit_s" "$@" | tee "$file" || status=$? ;;
  *) timeout "$limit_s" "$@" 2>&1 | tee "$file" || status=$? ;;
  esac
}

case $part in
correctness) keep 530 correctness.txt "$python" -m pytest -q -p no:cacheprovider -m gpu tests/test_accelerator.py ;;
probe)
  keep 120 probe.json "$python" -m zero probe --json --again
  keep 400 cpu_adamw.txt "$python" benchmarks/cpu_adamw.py --rounds 3 --threads 1 4 "$(nproc)" --out "$out/cpu_adamw"
  ;;
grid) keep 530 grid.txt "$python" benchmarks/gpu_grid.py --out "$out" --systems ours ;;
peers) keep 530 peers.txt "$python" benchmarks/gpu_grid.py --out "$out" --systems fsdp2 deepspeed resident ;;
generation)
  keep 220 generation-1.3b.txt "$python" benchmarks/generation.py --device cuda --out "$out/generation-1.3b" \
    --shapes opt-1.3b --seconds 210
  keep 310 generation-6.7b.txt "$python" benchmarks/generation.py --device cuda --out "$out/generation-6.7b" \
    --shapes opt-6.7b --rounds 1 --seconds 300
  ;;
*) echo "unknown part $part: correctness, probe, grid, peers or generation" >&2; exit 2 ;;
esac
exit $status
