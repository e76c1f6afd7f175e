"""Benchmarks: `python -m bench` lists the commands, `pytest bench` times the ops, bench/gpu.sh runs all on a GPU.

A command is the module of its name. All of them write rows (rows.py) to results.jsonl; report makes a page of them.
What may crash or hang runs in a worker (worker.py). command has the flags, timing the clocks, shapes the batches.
"""
