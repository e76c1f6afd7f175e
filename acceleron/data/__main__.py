"""python -m acceleron.data prepare | download"""

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
    raise argparse.ArgumentTypeError("expected a whole number of at least 1")


def main():
    sys.exit(run_command(run))


def run():
    parser = Parser(prog="python -m acceleron.data", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    preparing = commands.add_parser("prepare", help="turn text into shards")
    preparing.add_argument(
        "--input", type=nonempty, nargs="+", required=True, help="text or .jsonl files, or directories"
    )
    preparing.add_argument("--output", type=nonempty, required=True, help="directory for the shards and tokenizer.json")
    preparing.add_argument("--tokenizer", type=nonempty, help="tokenizer.json to use (default: train a byte-level BPE)")
    preparing.add_argument("--vocab_size", type=_positive, help="entries of the trained tokenizer (default 8192)")
    downloading = commands.add_parser("download", help="fetch shards from the Hugging Face hub")
    downloading.add_argument("--repo", default="SuperGoatScriptGuy/PreprocessedMIXED", help="dataset repository")
    downloading.add_argument("--shards", type=_positive, default=50, help="how many of its shards (default 50)")
    downloading.add_argument("--output", type=nonempty, required=True, help="directory for the shards")
    arguments = parser.parse_args()
    if arguments.command == "prepare":
        prepare(arguments.input, arguments.output, arguments.tokenizer, arguments.vocab_size)
    else:
        download(arguments.repo, arguments.shards, arguments.output)


if __name__ == "__main__":
    main()
