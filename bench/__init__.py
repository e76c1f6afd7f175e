"""Benchmarks: `python -m bench` lists the commands, `pytest bench` times the ops, bench/gpu.sh measures a GPU.

Each command is a module. Every command appends rows (rows.py) to results.jsonl; `report` turns them into a page.
Code that can crash or hang runs in a worker process (worker.py).
"""
