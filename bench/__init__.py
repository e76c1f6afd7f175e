"""Benchmarks: `python -m bench` lists the commands, `pytest bench` times the ops, bench/gpu.sh benchmarks a GPU.

Each command is a module. Every command appends rows (rows.py) to results.jsonl; `report` writes a Markdown page.
Code that can crash or hang runs in a worker process (worker.py).
"""
