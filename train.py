"""Pretrain a model: python train.py --model_size tiny --data_dir ./data. All flags: --help, or the README's table."""

import sys
from pathlib import Path

from acceleron.errors import run_command
from acceleron.training import train
from acceleron.training.options import parse_options


def main():
    train(parse_options(), scripts_dir=Path(__file__).resolve().parent)


if __name__ == "__main__":
    sys.exit(run_command(main))
