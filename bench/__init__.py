"""Benchmarks: `python -m bench` lists the commands, and `pytest bench` times the ops."""
