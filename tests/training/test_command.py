"""Tests train.py as a command."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from runs import records, write_shard
from waiting import TIMEOUT, wait_until

ROOT = Path(__file__).parents[2]
TRAIN = str(ROOT / "train.py")


@pytest.mark.parametrize(
    ("script", "number", "status"),
    [
        ("train.py", signal.SIGTERM, 75),
        ("train.py", signal.SIGINT, 75),
        ("train.py", signal.SIGUSR1, 75),
        ("generate.py", signal.SIGINT, -signal.SIGINT),
    ],
)
def test_signal_while_torch_is_imported_exits_quietly(tmp_path, script, number, status):
    """torch imports tqdm, which this test replaces with a module that never finishes importing."""
    importing = tmp_path / "importing"
    (tmp_path / "tqdm.py").write_text(f"open({str(importing)!r}, 'w')\nimport threading\nthreading.Event().wait()")
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    command = [sys.executable, ROOT / script]
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    wait_until(lambda: importing.exists() or process.poll() is not None)
    process.send_signal(number)
    output, errors = process.communicate(timeout=TIMEOUT)
    assert (process.returncode, output, errors) == (status, b"", b"")


def test_run_with_closed_stdout_and_stderr_trains(tmp_path):
    data_dir = write_shard(tmp_path / "data")
    flags = "--model_size nano --vocab_size 64 --seq_len 64 --batch_size 4 --max_steps 2 --no_compile --device cpu "
    flags += f"--data_dir {data_dir} --save_dir {tmp_path / 'run'} --log_interval 1"
    status = subprocess.run(
        f"{sys.executable} {TRAIN} {flags} >&- 2>&-", shell=True, timeout=TIMEOUT, check=False
    ).returncode
    assert status == 0
    assert [line["step"] for line in records(tmp_path / "run")] == [1, 2]
