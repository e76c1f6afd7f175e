#!/usr/bin/env bash
# Benchmarks one GPU in a few minutes; see bench/gpu.py. $PYTHON selects the interpreter.
PYTHONPATH="$(cd "$(dirname "$0")/.." && pwd)${PYTHONPATH:+:$PYTHONPATH}" exec "${PYTHON:-python3}" -m bench.gpu "$@"
