"""Prepare or download training data."""

import argparse
import sys
from contextlib import suppress

from ..errors import run_command
from ..flags import Parser, nonempty
from .download import download
from .prepare import prepare


def _positive(number: str) -> int:
    with suppress(ValueError):
        if (value := int(number)) >= 1:
            return value
    raise argparse.ArgumentTypeError("expected a positive integer")


def main():
    sys.exit(run_command(run))


def run():
    parser = Parser(prog="python -m acceleron.data", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    add = commands.add_parser("prepare", help="tokenize text into shards").add_argument
    add("--input", type=nonempty, nargs="+", required=True, help="text or .jsonl files, or directories")
    add("--output", type=nonempty, required=True, help="directory for the shards and tokenizer.json")
    add("--tokenizer", type=nonempty, help="tokenizer.json to use (default: train a byte-level BPE)")
    add("--vocab_size", type=_positive, help="vocabulary size of the trained tokenizer (default 8192)")
    add = commands.add_parser("download", help="download shards from the Hugging Face Hub").add_argument
    add("--repo", default="SuperGoatScriptGuy/PreprocessedMIXED", help="dataset repository")
    add("--shards", type=_positive, default=50, help="number of shards to download (default 50)")
    add("--output", type=nonempty, required=True, help="directory for the shards")
    arguments = parser.parse_args()
    if arguments.command == "prepare":
        prepare(arguments.input, arguments.output, arguments.tokenizer, arguments.vocab_size)
    else:
        download(arguments.repo, arguments.shards, arguments.output)


if __name__ == "__main__":
    main()
