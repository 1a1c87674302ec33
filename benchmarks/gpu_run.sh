#!/usr/bin/env bash
# All that a GPU is measured and checked for, in one command of under 8 minutes:
#
#     bash benchmarks/gpu_run.sh             on the machine with the card
#     bash benchmarks/gpu_run.sh --dry-run   small shapes on the CPU, to see that it runs
#
# Needs a python3 (or $PYTHON) with torch, triton, numpy and safetensors. Writes results.json, table.txt and log.txt
# to $OUT (default: gpu-results). The table comes last; the exit code is 1 when a part failed.
set -euo pipefail
OUT="$(realpath -m "${OUT:-gpu-results}")"
export OUT
mkdir -p "$OUT"
exec "${PYTHON:-python3}" "$(dirname "$0")/gpu_run.py" "$@"
