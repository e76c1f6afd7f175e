"""Benchmarks. Each module is a command: python -m bench.training, bench.decoding, bench.cross_entropy, bench.loader."""
