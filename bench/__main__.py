"""python -m bench throughput | quality | memory | ops | report | peers | decoding | loader | checkpoints |
                      ceilings | compile | roofline | tune

What each does, and its flags, with --help.
"""

import importlib
import sys

from acceleron.errors import InputError, did_you_mean, run_command

COMMANDS = (
    "throughput", "quality", "memory", "ops", "report", "peers", "decoding", "loader", "checkpoints", "ceilings",
    "compile", "roofline", "tune",
)  # fmt: skip


def main():
    if sys.argv[1:2] in ([], ["-h"], ["--help"]):
        print(__doc__.rstrip())
        return
    command = sys.argv.pop(1)
    if command not in COMMANDS:
        raise InputError(f"unknown command {command}: {did_you_mean(command, COMMANDS)}--help lists all")
    sys.argv[0] = f"python -m bench {command}"
    importlib.import_module(f"bench.{command}").main()


if __name__ == "__main__":
    sys.exit(run_command(main))
