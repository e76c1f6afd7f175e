"""Pretrain a model: python train.py --model_size tiny --data_dir ./data. --help lists all flags."""

import os
import signal
import sys
from pathlib import Path

if __name__ == "__main__":
    # Importing torch takes a while, and there is nothing to save before or after training. 75 is errors.STOPPED.
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP):
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, lambda *_: os._exit(75))

from acceleron.errors import run_command
from acceleron.training import train
from acceleron.training.options import parse_options


def main():
    train(parse_options(), scripts_dir=Path(__file__).resolve().parent)


if __name__ == "__main__":
    sys.exit(run_command(main))
