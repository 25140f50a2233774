#!/usr/bin/env bash
# The five-minute tour on the bundled zoo, in a new folder: bash samples/tour.sh [FOLDER]
# Needs messcli on the PATH (or in $MESSCLI); downloads nothing.
set -euo pipefail
samples=$(cd "$(dirname "$0")" && pwd)
read -ra messcli <<< "${MESSCLI:-messcli}"
folder=${1:-$(mktemp -d)}
mkdir -p "$folder" && cd "$folder"
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} # tiny models: more threads only wait for each other
step() { printf '\n== %s\n' "$*"; }

step "calibrate: what does a request cost with each model?"
"${messcli[@]}" calibrate --quick --budget 20

step "route, and interrupt it"
"${messcli[@]}" route "$samples/requests.jsonl" -o out.jsonl --window 16 &
running=$!
for _ in $(seq 300); do # until rows are there
    [ -s out.jsonl ] && break
    kill -0 "$running" 2>/dev/null || break
    sleep 0.1
done
kill -TERM "$running" 2>/dev/null || true
status=0
wait "$running" || status=$?
echo "stopped with exit status $status (143: after a clean commit) after $(wc -l < out.jsonl) rows"
[ "$status" -eq 143 ] || [ "$status" -eq 0 ]

step "the same command goes on"
"${messcli[@]}" route "$samples/requests.jsonl" -o out.jsonl --window 16
[ "$(wc -l < out.jsonl)" -eq "$(wc -l < "$samples/requests.jsonl")" ]

step "one row"
head -n 1 out.jsonl

step "report"
"${messcli[@]}" report out.jsonl.state --html report.html

step "simulate: which policy, on a table that every model answered?"
"${messcli[@]}" simulate "$samples/outcomes.jsonl" --alpha 0.9 --order-seeds 2 --complete-only --quiet

printf '\nAll of it lies in %s\n' "$folder"
