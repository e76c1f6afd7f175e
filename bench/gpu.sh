#!/usr/bin/env bash
# Everything that matters on one GPU, in under 9 minutes, most important first:
#   bench/gpu.sh --output DIR           on a GPU
#   bench/gpu.sh --output DIR --smoke   all of it on a CPU at small shapes, the Triton kernels interpreted
# Needs python3 (or $PYTHON) with torch, triton and the project's dependencies, no network and no installation. Each part
# writes its results to DIR as soon as they exist; one that fails or takes too long is reported, and the next begins.
set -uo pipefail

usage() {
    echo "usage: bench/gpu.sh --output DIR [--smoke]" >&2
    exit 2
}
output="" smoke=""
while [ $# -gt 0 ]; do
    case $1 in
        --output) [ $# -ge 2 ] || usage; output=$2; shift 2 ;;
        --smoke) smoke=1; shift ;;
        *) usage ;;
    esac
done
[ -n "$output" ] || usage
mkdir -p "$output" && output=$(cd "$output" && pwd) || exit 2
cd "$(dirname "$0")/.." || exit 2
command -v "${PYTHON:-python3}" >/dev/null && "${PYTHON:-python3}" -c 'import torch' 2>/dev/null || {
    echo "bench/gpu.sh: ${PYTHON:-python3} has no torch: set PYTHON to one that has" >&2
    exit 2
}
export PYTHONUNBUFFERED=1
python=${PYTHON:-python3}

deadline=530 # seconds, of which the report keeps some
report=25
failed=()

# part NAME SECONDS ARGUMENTS...: python -m bench ARGUMENTS within so many seconds.
part() {
    local name=$1 limit=$2 left=$((deadline - report - SECONDS))
    shift 2
    [ "$name" = report ] && left=$((deadline - SECONDS))
    [ "$limit" -gt "$left" ] && limit=$left
    if [ "$limit" -le 0 ]; then
        echo "== $name: SKIPPED, no time is left" && failed+=("$name")
        return
    fi
    echo "== $name: python -m bench $* (${SECONDS} s so far, at most $limit s)"
    timeout -k 10 "$limit" "$python" -m bench "$@"
    local status=$?
    [ "$name" = "more throughput" ] && [ $status -eq 124 ] && echo "== $name: cut, no time is left" && return
    [ $status -eq 0 ] || { echo "== $name: FAILED with status $status (124: out of time)" && failed+=("$name"); }
}

run() {
    if [ -n "$smoke" ]; then
        export CUDA_VISIBLE_DEVICES=
        local small=(--batch_size 1 --seq_len 32)
        # The interpreter cuts off bf16; what is timed is not interpreted, and torch compiles its grouped_mm in bf16 alone.
        TRITON_INTERPRET=1 part kernels 100 ops --size nano --tokens 48 --check_only --dtype fp16 --output "$output"
        TRITON_INTERPRET=1 part throughput 300 throughput --size nano --mode eager --dtype fp32 "${small[@]}" --rounds 1 --seconds 0.01 --output "$output"
        TRITON_INTERPRET=1 part memory 120 memory --size nano --tokens 32 --dtype fp32 --output "$output"
        part ops 120 ops --size nano --tokens 48 --dtype bf16 --rounds 2 --output "$output"
    else
        "$python" -c 'import sys, torch; sys.exit(None if torch.cuda.is_available() else "there is no GPU: see --smoke")' ||
            return 1
        part kernels 90 ops --size tiny small medium large --check_only --output "$output"
        part throughput 250 throughput --size tiny small --mode compiled --seconds 1.5 --output "$output"
        # All but torch.compile of each op, which takes seconds a shape.
        part ops 70 ops --size tiny sonicmoe-768 small sonicmoe-1536 --output "$output" --provider triton reference torch \
            acceleron "SDPA cuDNN" "SDPA flash" liger "liger fused_moe" moe-ops cut-cross-entropy sonic-moe scattermoe
        part memory 45 memory --size tiny small --output "$output"
        part "reference's throughput" 70 throughput --size tiny --mode compiled --kernels triton reference --batch_size 32 --rounds 3 --seconds 1 --output "$output"
        part "more throughput" 500 throughput --size tiny --mode predecessor balanced deterministic eager checkpointed --rounds 3 --output "$output"
    fi
    part report "$report" report "$output"
    echo "== done in $SECONDS s; failed: ${failed[*]:-nothing}"
    ls -l "$output"
    [ ${#failed[@]} -eq 0 ]
}

run 2>&1 | tr '\r' '\n' | tee "$output/log.txt"
exit "${PIPESTATUS[0]}"
