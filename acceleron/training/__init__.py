"""Training runs and their options."""

from .loop import train
from .options import TrainOptions

__all__ = ["TrainOptions", "train"]
