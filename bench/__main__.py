"""python -m bench throughput | quality | memory | ops | report | peers | decoding | loader | checkpoints |
                      ceilings | compile | roofline | tune

`python -m bench COMMAND --help` describes a command and its flags.
"""

import importlib
import signal
import sys

if __name__ == "__main__":
    on_interrupt = signal.getsignal(signal.SIGINT)
    if on_interrupt != signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # no traceback on Ctrl-C during the imports, which take seconds

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
        raise InputError(f"unknown command {command}: {did_you_mean(command, COMMANDS)}--help lists all commands")
    sys.argv[0] = f"python -m bench {command}"
    importlib.import_module(f"bench.{command}").main()


if __name__ == "__main__":
    signal.signal(signal.SIGINT, on_interrupt)
    sys.exit(run_command(main))
