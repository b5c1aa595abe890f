#!/usr/bin/env bash
# Drive the real commands on a machine with a GPU: forget, kill -9, --resume, merge, eval; say what was equal.
#
#     benchmarks/gpu_end_to_end.sh [MODEL_FOLDER]        default: the sandbox
#
# A model folder of 7B takes 30 GB of disk beside it. Everything is written below a temporary folder.
set -uo pipefail
cd "$(dirname "$0")/.."
model=${1:-sandbox}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python=${PYTHON:-python3}
q() { "$python" -m qunlearn "$@"; }
say() { echo "== $* ($(( $(date +%s) - started )) s)"; }
started=$(date +%s)
"$python" -c 'import sys, torch; sys.exit(0 if torch.cuda.is_available() else 1)' || { echo "skipped: no CUDA device"; exit 0; }
nvidia-smi --query-gpu=name,memory.total --format=csv,noheader

"$python" - "$work/bad.jsonl" <<'PY'
import shutil, sys
from qunlearn.sandbox import data_file
shutil.copy(data_file("hallucination", "forget"), sys.argv[1])
PY
flags=(--model "$model" --bad "$work/bad.jsonl" --steps 40 --save-every 10 --normal-count 64 --set stop.check_every=10)
same() {  # the adapters of two runs, byte by byte
    if cmp -s "$1/adapter/adapter_model.safetensors" "$2/adapter/adapter_model.safetensors"; then echo "equal: $3"; else echo "NOT equal: $3"; fi
}

q forget "${flags[@]}" -o "$work/one" > "$work/one.log" 2>&1; say "forget ended with $?"
q forget "${flags[@]}" -o "$work/two" > "$work/two.log" 2>&1; say "the same again ended with $?"
same "$work/one" "$work/two" "two runs"

"$python" -m qunlearn forget "${flags[@]}" -o "$work/killed" > "$work/killed.log" 2>&1 &
pid=$!
for _ in $(seq 600); do
    compgen -G "$work/.killed.unfinished/checkpoints/*" > /dev/null && break
    kill -0 $pid 2> /dev/null || break
    sleep 0.05
done
kill -9 $pid 2> /dev/null; wait $pid 2> /dev/null; say "killed"
q forget --resume -o "$work/killed" > "$work/resumed.log" 2>&1; say "--resume ended with $?"
same "$work/one" "$work/killed" "an unbroken run and one that was killed and resumed"

q forget "${flags[@]}" --compile off -o "$work/off" > "$work/off.log" 2>&1; say "--compile off ended with $?"
same "$work/one" "$work/off" "recorded passes and launched ones (they are padded otherwise: rounding may differ)"

q merge "$work/one" -o "$work/merged" > "$work/merge.log" 2>&1; say "merge ended with $?"
q eval "$work/one" > "$work/eval.log" 2>&1; say "eval ended with $?"
grep -hE "stopped after|peak|exact match" "$work/one.log" | head -8
