"""Converts text into token shards, and shards into batches."""

from .loader import Loader, validation_batches, validation_loader
from .shards import ShardError, Shards

__all__ = ["Loader", "ShardError", "Shards", "validation_batches", "validation_loader"]
