"""python -m bench compile | roofline | tune: what each does, and its flags, with --help."""

import importlib
import sys

COMMANDS = ("compile", "roofline", "tune")


def main():
    if len(sys.argv) < 2 or sys.argv[1] not in COMMANDS:
        sys.exit(__doc__)
    command = sys.argv.pop(1)
    sys.argv[0] = f"python -m bench {command}"
    importlib.import_module(f"bench.{command}").main()


main()
