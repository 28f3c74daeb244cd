#!/usr/bin/env bash
# Measure everything that needs a GPU: one command, ten to fifteen minutes, no network.
#
#   benchmarks/device.sh [FOLDER]              default: runs/device
#   benchmarks/device.sh --rehearse [FOLDER]   the CPU in the device's place, tiny sizes: shows that it runs
#
# Steps run in order of worth, each with a time limit, and write FOLDER/STEP.log; a step that is done leaves FOLDER/STEP.done
# and is left out by a second call. `openwu bench --report FOLDER` takes the result files. Exit code: 1 where a step failed.
# PYTHON names the interpreter (default: .venv/bin/python, else python3); LIMIT is a factor on all time limits.
set -u
cd "$(dirname "$0")/.."

rehearse=""
if [ "${1:-}" = "--rehearse" ]; then
  rehearse="--rehearse"
  export OPENWU_DEVICE=cpu
  shift
fi
folder=${1:-runs/device}
python=${PYTHON:-$([ -x .venv/bin/python ] && echo .venv/bin/python || echo python3)}
factor=${LIMIT:-1}
if ! [[ $factor =~ ^[1-9][0-9]*$ ]]; then
  echo "device.sh: LIMIT: expected a whole number from 1 on, got $factor" >&2
  exit 2
fi
mkdir -p "$folder"
export HF_HUB_OFFLINE=1 TRANSFORMERS_OFFLINE=1 HF_DATASETS_OFFLINE=1 PYTHONPATH="src:benchmarks${PYTHONPATH:+:$PYTHONPATH}"

if [ -z "$rehearse" ] && ! "$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
  echo "device.sh: expected a CUDA device that torch sees, got none; --rehearse runs everything small on the CPU" >&2
  exit 2
fi

failed=0
# step NAME SECONDS COMMAND...
step() {
  local name=$1 limit=$(($2 * factor)) began=$SECONDS code
  shift 2
  if [ -e "$folder/$name.done" ]; then
    echo "$name: done before"
    return
  fi
  timeout --kill-after=10 "$limit" "$@" >"$folder/$name.log" 2>&1
  code=$?
  if [ $code -eq 0 ]; then
    echo "$((SECONDS - began)) s" >"$folder/$name.done"
    echo "$name: done in $((SECONDS - began)) s"
  else
    failed=1
    [ $code -ge 124 ] && reason="stopped after $limit s" || reason="exit code $code"
    echo "$name: $reason; see $folder/$name.log"
  fi
}

bench() {
  local name=$1 limit=$2
  shift 2
  step "$name" "$limit" "$python" -m openwu bench "$@" $rehearse --output "$folder"
}

step kernels 120 "$python" -m pytest -q -m gpu tests/kernels/test_kernels_device.py -p no:cacheprovider
bench generator-speed 180 G1
bench generator-memory 90 G4
bench experts 90 G2
bench batch 60 G3
bench klein-step 60 G5
bench kontext-step 75 G6
bench qwen-step 90 G7
bench decoder-layer 45 G8
bench embedded-step 60 G9

exit $failed
