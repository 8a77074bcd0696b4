#!/usr/bin/env bash
# What a GPU has to show, in parts that each end within ten minutes and leave $OUT/<part>.json (OUT: build/gpu unless it is set).
#
#     python -m bench gpu [options] [part ...]      parts: build tests sanitize accuracy bench race tiles
#     python -m bench gpu record                    says which files to keep, and where
#
#     --budget SECONDS       of each part
#     --kernels cuda,...     those that build, tests, sanitize, accuracy and race look at: kernels.py names them
#     --backend cuda         the one that bench times and whose bars it checks; triton by default
#     --wheels DIR           install the wheels of a folder (peers, compute-sanitizer) beside the environment, without asking any index
#     --dry-run              everything at tiny sizes on the CPU with backend="torch": no figure means anything, but nothing may raise
#     --emulate              a dry run, in which build compiles csrc/cuda for the CPU, and what is about its kernels runs them there
#
# The CUDA library is found and built in FASTNCE_CACHE_DIR. A part that fails does not stop the others; the exit status is then 1. Bars that
# are missed and peers, or a library, that are not there are rows, not failures.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

OUT=${OUT:-build/gpu} dry=() wheels="" options=() parts=()
while (($#)); do
    case $1 in
        --dry-run | --emulate) dry=("$1") ;;
        --wheels) wheels=${2:?--wheels needs a folder} && shift ;;
        --budget | --kernels | --backend) options+=("$1" "${2:?$1 needs a value}") && shift ;;
        build | tests | sanitize | accuracy | bench | race | tiles) parts+=("$1") ;;
        record)
            echo "Copy the .json files of $OUT to bench/results/<gpu>/<UTC date>-<part>.json, the name of the GPU as env.gpu.name in"
            echo "lower case with dashes, and commit them: bench/README.md, section \"GPU\", says what a recorded result must hold."
            exit 0
            ;;
        *) echo "unknown argument '$1'; see the head of bench/gpu/run.sh" >&2 && exit 2 ;;
    esac
    shift
done
((${#parts[@]})) || parts=(build tests sanitize accuracy bench race tiles)
mkdir -p "$OUT"
rm -f "$OUT/parts.log"
export OUT CUBLAS_WORKSPACE_CONFIG=:4096:8 PYTHONUNBUFFERED=1 PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
interpret=0
((${#dry[@]})) && export OMP_NUM_THREADS=1 && interpret=1
limit=590
# A library for the CPU lies where no other one is looked for. A step of its kernels takes a tenth of a second, and nobody waits for a GPU.
[[ ${dry[*]} == --emulate ]] && export FASTNCE_CACHE_DIR=$PWD/build/gpu_emulated && limit=3600 && options=(--budget 3500 "${options[@]}")

if [[ -n $wheels ]]; then
    site=$PWD/build/gpu_site
    python3 -m pip install -q --no-index --no-deps --no-compile --upgrade --target "$site" "$wheels"/*.whl || echo "--wheels: pip failed; going on without" >&2
    export PYTHONPATH="$PYTHONPATH:$site"
fi

failed=0
for part in "${parts[@]}"; do
    echo "=== $part"
    rm -f "$OUT/$part.json"
    # The part watches its own budget, nine minutes unless --budget says otherwise; this is for one that hangs.
    TRITON_INTERPRET=$interpret timeout --kill-after=10 "$limit" python3 -m "bench.gpu.$part" --out "$OUT" "${options[@]}" "${dry[@]}"
    status=$?
    ((status)) && failed=1 && echo "=== $part: exit status $status" >&2
done
echo "=== summary"
python3 -m bench.gpu.part summary "${parts[@]}" --out "$OUT" || failed=1
exit $failed
