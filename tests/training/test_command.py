"""train.py itself, before and around the training."""

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from runs import records, write_shard

TRAIN = str(Path(__file__).parents[2] / "train.py")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_a_signal_while_torch_is_imported_ends_it_quietly(number):
    process = subprocess.Popen([sys.executable, TRAIN], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    while not handles(process.pid, number):
        assert process.poll() is None
        time.sleep(0.005)
    process.send_signal(number)
    output, errors = process.communicate(timeout=30)
    assert (process.returncode, output, errors) == (75, b"", b"")


def handles(pid: int, number: int) -> bool:
    """Whether the process has its handler of this signal by now."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    caught = next(int(line.split()[1], 16) for line in lines if line.startswith("SigCgt"))
    # Python's own handler of SIGINT is there from the start; ours come together.
    return bool(caught >> (signal.SIGUSR1 - 1) & 1) and bool(caught >> (number - 1) & 1)


def test_a_run_without_a_terminal_is_trained_all_the_same(tmp_path):
    data_dir = write_shard(tmp_path / "data")
    flags = "--model_size nano --vocab_size 64 --seq_len 64 --batch_size 4 --max_steps 2 --no_compile --device cpu "
    flags += f"--data_dir {data_dir} --save_dir {tmp_path / 'run'} --log_interval 1"
    status = subprocess.run(
        f"{sys.executable} {TRAIN} {flags} >&- 2>&-", shell=True, timeout=120, check=False
    ).returncode
    assert status == 0
    assert [line["step"] for line in records(tmp_path / "run")] == [1, 2]
