#!/usr/bin/env bash
# The tests and measurements for a GPU, in parts that each end within ten minutes and leave $OUT/<part>.json (by default build/gpu).
#
#     python -m bench gpu [options] [part ...]      parts, in this order: build check tests sanitize accuracy bench steps race tiles
#     python -m bench gpu record                    prints which files to keep, and where
#
#     --budget SECONDS       of each part
#     --kernels cuda,...     the kernels for build, tests, sanitize, accuracy and race: kernels.py names them
#     --backend cuda         the backend that bench and steps compare with their bars; triton by default
#     --wheels DIR           install the wheels of a folder (peers, compute-sanitizer) beside the environment, without asking any index
#     --dry-run              everything at tiny sizes on the CPU with backend="torch": no figure means anything, but nothing may raise
#     --emulate              a dry run in which build compiles csrc/cuda for the CPU, and the parts about these kernels run them there
#
# The CUDA library is found and built in FASTNCE_CACHE_DIR. A part that fails does not stop the others; the exit status is then 1. A bar
# that is missed, and a peer or a library that is not there, are rows and no failures.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

OUT=${OUT:-build/gpu} dry=() wheels="" options=() parts=()
while (($#)); do
    case $1 in
        --dry-run | --emulate) dry=("$1") ;;
        --wheels) wheels=${2:?--wheels needs a folder} && shift ;;
        --budget | --kernels | --backend) options+=("$1" "${2:?$1 needs a value}") && shift ;;
        build | check | tests | sanitize | accuracy | bench | steps | race | tiles) parts+=("$1") ;;
        record)
            echo "Copy the .json files of $OUT to bench/results/<gpu>/<UTC date>-<part>.json, the name of the GPU as env.gpu.name in"
            echo "lower case with dashes, and commit them: bench/README.md, section \"GPU\", says what a recorded result must hold."
            exit 0
            ;;
        *) echo "unknown argument '$1'; see the head of bench/gpu/run.sh" >&2 && exit 2 ;;
    esac
    shift
done
((${#parts[@]})) || parts=(build check tests sanitize accuracy bench steps race tiles)
mkdir -p "$OUT"
rm -f "$OUT/parts.log"
export OUT CUBLAS_WORKSPACE_CONFIG=:4096:8 PYTHONUNBUFFERED=1 PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
interpret=0
((${#dry[@]})) && export OMP_NUM_THREADS=1 && interpret=1
limit=590
# The library for the CPU has a folder of its own, where no other one is looked for. A step of its kernels takes a tenth of a second, and no
# GPU is kept waiting.
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
    # A part watches its own budget, nine minutes unless --budget says otherwise. This limit ends one that hangs.
    TRITON_INTERPRET=$interpret timeout --kill-after=10 "$limit" python3 -m "bench.gpu.$part" --out "$OUT" "${options[@]}" "${dry[@]}"
    status=$?
    ((status)) && failed=1 && echo "=== $part: exit status $status" >&2
done
echo "=== summary"
python3 -m bench.gpu.part summary "${parts[@]}" --out "$OUT" || failed=1
exit $failed
