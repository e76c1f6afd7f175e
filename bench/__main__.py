"""python -m bench throughput | quality | memory | ops | report | peers | decoding | loader | checkpoints |
                      ceilings | compile | roofline | tune

What each does, and its flags, with --help.
"""

import importlib
import sys

from acceleron.errors import run_command

COMMANDS = (
    "throughput", "quality", "memory", "ops", "report", "peers", "decoding", "loader", "checkpoints", "ceilings",
    "compile", "roofline", "tune",
)  # fmt: skip


def main():
    if sys.argv[1:2] in (["-h"], ["--help"]):
        print(__doc__.rstrip())
        return
    if len(sys.argv) < 2 or sys.argv[1] not in COMMANDS:
        sys.exit(__doc__.rstrip())
    command = sys.argv.pop(1)
    sys.argv[0] = f"python -m bench {command}"
    sys.exit(run_command(importlib.import_module(f"bench.{command}").main))


if __name__ == "__main__":
    main()
