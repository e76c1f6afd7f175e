"""Benchmarks: `python -m bench` lists the commands, and `pytest bench` times the ops.

A command is the module of its name. Behind them:
  throughput   worker (a training in a process of its own), op_shares, corpus
  quality      corpus
  ops          op_cases (shapes, FLOPs, bytes), op_peers (who serves an op)
  memory       passes (forward and backward of ours and of peers, checked), transformers_models
  peers        the same, and rounds; so do decoding and loader
  checkpoints  worker, corpus
  report       rows (what a row needs), sections, page, plots, comparison
  all          results (the rows, and their checks), timing
"""
