#!/usr/bin/env bash
# What a GPU has to show, in parts that each end within ten minutes and leave $OUT/<part>.json (OUT: build/gpu unless it is set).
#
#     bash bench/gpu_run.sh [--dry-run] [--wheels DIR] [--budget SECONDS] [part ...]      parts: tests sanitize accuracy bench tiles
#     bash bench/gpu_run.sh record                                                        says which files to keep, and where
#
# --dry-run runs everything at tiny sizes on the CPU with backend="cpu": no figure means anything, but nothing may raise. --wheels installs
# the wheels of a folder (peers, compute-sanitizer) beside the environment, without asking any index. A part that fails does not stop the
# others; the exit status is then 1. Bars that are missed and peers that are not there are rows, not failures.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

OUT=${OUT:-build/gpu} dry=() wheels="" budget="" parts=()
while (($#)); do
    case $1 in
        --dry-run) dry=(--dry-run) ;;
        --wheels) wheels=${2:?--wheels needs a folder} && shift ;;
        --budget) budget=${2:?--budget needs seconds} && shift ;;
        tests | sanitize | accuracy | bench | tiles) parts+=("$1") ;;
        record)
            echo "Copy the .json files of $OUT to bench/results/<gpu>/<UTC date>-<part>.json, the name of the GPU as env.gpu.name in"
            echo "lower case with dashes, and commit them: bench/README.md, section \"GPU\", says what a recorded result must hold."
            exit 0
            ;;
        *) echo "unknown argument '$1'; see the head of bench/gpu_run.sh" >&2 && exit 2 ;;
    esac
    shift
done
((${#parts[@]})) || parts=(tests sanitize accuracy bench tiles)
mkdir -p "$OUT"
export OUT CUBLAS_WORKSPACE_CONFIG=:4096:8 PYTHONUNBUFFERED=1 PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
interpret=0
((${#dry[@]})) && export OMP_NUM_THREADS=1 && interpret=1

if [[ -n $wheels ]]; then
    site=$PWD/build/gpu_site
    python3 -m pip install -q --no-index --no-deps --no-compile --upgrade --target "$site" "$wheels"/*.whl || echo "--wheels: pip failed; going on without" >&2
    export PYTHONPATH="$PYTHONPATH:$site"
fi

declare -A module=([tests]=gpu_tests [sanitize]=sanitize [accuracy]=gpu_accuracy [bench]=gpu_bars [tiles]=gpu_tiles)
failed=0
for part in "${parts[@]}"; do
    echo "=== $part"
    rm -f "$OUT/$part.json"
    # The part watches its own budget of nine minutes; this is for one that hangs.
    TRITON_INTERPRET=$interpret timeout --kill-after=10 590 python3 -m "bench.${module[$part]}" --out "$OUT" ${budget:+--budget "$budget"} "${dry[@]}"
    status=$?
    ((status)) && failed=1 && echo "=== $part: exit status $status" >&2
done
echo "=== summary"
python3 -m bench.gpu summary "${parts[@]}" --out "$OUT" || failed=1
exit $failed
