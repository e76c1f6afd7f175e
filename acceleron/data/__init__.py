"""Text to token shards, and shards to batches."""

from .loader import Loader, TokenStream, validation_batches
from .shards import Shards

__all__ = ["Loader", "Shards", "TokenStream", "validation_batches"]
