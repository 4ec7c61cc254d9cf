#!/usr/bin/env bash
# What can only be measured on a GPU, in at most seven minutes on one large one; see gpu.py. Writes gpu.md and
# gpu-*.jsonl beside it. A second run goes on where the first one stopped.
#
#   bash benchmarks/gpu.sh                                 on a GPU, at full sizes
#   DEVICE=cpu OUT=/tmp/gpu bash benchmarks/gpu.sh         tries the script itself, at the smallest sizes
#
# PYTHON is the interpreter, .venv/bin/python by default; `make parity` installs the reference packages there.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python=${PYTHON:-.venv/bin/python}
device=${DEVICE:-cuda}
words=(--device "$device" --out "${OUT:-benchmarks}")
slower=1
if [[ $device == cpu ]]; then
  words+=(--tiny)
  slower=20 # no limit of any use, so that a busy machine tries every part
fi

# A part that runs out of its seconds, or fails, has written what it measured: the others and the page follow.
failed=0
part() {
  local code=0
  timeout $(($1 * slower)) "$python" benchmarks/gpu.py "$2" "${words[@]}" || code=$?
  if [[ $code == 124 ]]; then
    echo "gpu.sh: $2 stopped after $1 s" >&2
  elif [[ $code != 0 ]]; then
    echo "gpu.sh: $2 failed with exit code $code" >&2
    failed=1
  fi
}

part 50 tests
part 160 attacks
part 190 training
"$python" benchmarks/gpu.py page "${words[@]}"
exit $failed
