"""python -m acceleron.data prepare | download"""

import argparse
import sys

from ..errors import run_command


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} must be at least 1")
    return value


def main():
    parser = argparse.ArgumentParser(prog="python -m acceleron.data", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    prepare = commands.add_parser("prepare", help="turn text into shards")
    prepare.add_argument("--input", nargs="+", required=True, help="text or .jsonl files, or directories of them")
    prepare.add_argument("--output", required=True, help="directory for the shards and tokenizer.json")
    prepare.add_argument("--tokenizer", help="tokenizer.json to use; without it a byte-level BPE is trained")
    prepare.add_argument("--vocab_size", type=_positive, help="entries of the trained tokenizer (default 8192)")
    download = commands.add_parser("download", help="fetch shards from the Hugging Face hub")
    download.add_argument("--repo", default="SuperGoatScriptGuy/PreprocessedMIXED", help="dataset repository")
    download.add_argument("--shards", type=_positive, default=50, help="how many of its shards (default 50)")
    download.add_argument("--output", required=True, help="directory for the shards")
    arguments = parser.parse_args()
    # Imported here: each command loads only the libraries it needs.
    if arguments.command == "prepare":
        from .prepare import prepare as run

        sys.exit(run_command(lambda: run(arguments.input, arguments.output, arguments.tokenizer, arguments.vocab_size)))
    from .download import download as fetch

    sys.exit(run_command(lambda: fetch(arguments.repo, arguments.shards, arguments.output)))


if __name__ == "__main__":
    main()
