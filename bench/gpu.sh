#!/usr/bin/env bash
# What to measure on one GPU in a few minutes; bench/gpu.py says what and how. $PYTHON is the interpreter to use.
PYTHONPATH="$(cd "$(dirname "$0")/.." && pwd)${PYTHONPATH:+:$PYTHONPATH}" exec "${PYTHON:-python3}" -m bench.gpu "$@"
