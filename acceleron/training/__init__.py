"""Training: the options of train.py, and the run they describe."""

from .loop import train
from .options import TrainOptions

__all__ = ["TrainOptions", "train"]
