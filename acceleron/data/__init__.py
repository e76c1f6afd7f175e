"""Converts text into token shards, and shards into batches."""

from .loader import Loader
from .shards import ShardError, Shards

__all__ = ["Loader", "ShardError", "Shards"]
