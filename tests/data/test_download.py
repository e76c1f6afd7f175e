"""The download command, run in a subprocess against a local hub that logs its requests."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from loopback_hub import hub_environment, loopback_hub
from waiting import TIMEOUT

ROOT = Path(__file__).resolve().parents[2]
# Larger than huggingface_hub's 10 MiB read size, so a transfer can break after the first read.
BIG = os.urandom(12 << 20)
REPO = "datasets/someone/Some"
FILES = {
    "README.md": b"# Some",
    "shard_00000.npy": os.urandom(1000),
    "shard_00001.npy": BIG,
    "shard_00002.npy": os.urandom(1000),
    "tokenizer.json": b"{}",
}
# huggingface_hub sleeps 24 s in total between retries. Skip the sleeps.
COMMAND = "import runpy, time; time.sleep = lambda s: None; runpy.run_module('acceleron.data', run_name='__main__')"


@pytest.fixture
def hub():
    with loopback_hub() as server:
        server.repos[REPO] = dict(FILES)
        yield server


def download(output, url, *, repo="someone/Some", shards=2, home=None):
    environment = hub_environment(url, home or output.parent / "hub")
    arguments = ["download", "--repo", repo, "--shards", str(shards), "--output", str(output)]
    command = [sys.executable, "-c", COMMAND, *arguments]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=TIMEOUT)


def requested_files(hub):
    """Return the names of the files requested from the hub."""
    return [name for method, name, _ in hub.log if method == "GET" and name in FILES]


def contents(output):
    return {path.name: path.read_bytes() for path in output.iterdir() if path.is_file()}


def assert_rejected(run, culprit, output):
    assert run.returncode == 2, run.stderr
    assert "Traceback" not in run.stderr
    last = run.stderr.strip().splitlines()[-1]  # after any progress bars and huggingface_hub warnings
    assert last.startswith("error: ")
    assert culprit in last
    assert not output.exists()


def test_download_fetches_the_first_shards_and_skips_complete_files(hub, tmp_path):
    """A shard in a folder of the repository is saved at the top level of the output."""
    hub.repos[REPO]["data/shard_00000.npy"] = hub.repos[REPO].pop("shard_00000.npy")
    wanted = ["shard_00000.npy", "shard_00001.npy", "tokenizer.json"]
    run = download(tmp_path / "out", hub.url)
    assert run.returncode == 0, run.stderr
    assert requested_files(hub) == wanted
    assert contents(tmp_path / "out") == {name: FILES[name] for name in wanted}

    hub.log.clear()
    (tmp_path / "out" / "tokenizer.json").unlink()
    assert download(tmp_path / "out", hub.url).returncode == 0
    assert requested_files(hub) == ["tokenizer.json"]
    assert contents(tmp_path / "out") == {name: FILES[name] for name in wanted}


def test_output_with_different_shards_is_rejected(hub, tmp_path):
    """This applies to repositories with and without shards.json. An identical shards.json is accepted."""
    output = tmp_path / "out"
    output.mkdir()
    (output / "shards.json").write_bytes(b"[1]")
    for theirs in ({}, {"shards.json": b"[2]"}):
        hub.repos[REPO] = FILES | theirs
        run = download(output, hub.url)
        assert run.returncode == 2
        assert f"error: --output {output} contains a shards.json for different shards" in run.stderr
        assert contents(output) == {"shards.json": b"[1]"}
    hub.repos[REPO]["shards.json"] = b"[1]"
    assert download(output, hub.url).returncode == 0
    assert sorted(contents(output)) == ["shard_00000.npy", "shard_00001.npy", "shards.json", "tokenizer.json"]


def test_interrupted_transfer_resumes(hub, tmp_path):
    hub.breaks["GET", "shard_00001.npy"] = 11 << 20
    run = download(tmp_path / "out", hub.url)
    assert run.returncode == 0, run.stderr
    assert contents(tmp_path / "out")["shard_00001.npy"] == BIG
    assert [entry for entry in hub.log if entry[0] == "GET" and entry[1] == "shard_00001.npy"] == [
        ("GET", "shard_00001.npy", None),
        ("GET", "shard_00001.npy", f"bytes={10 << 20}-"),
    ]


def test_too_few_shards_is_an_error(hub, tmp_path):
    run = download(tmp_path / "out", hub.url, shards=4)
    assert_rejected(run, "--shards 4: someone/Some has only 3 shards", tmp_path / "out")
    assert requested_files(hub) == []


def test_duplicate_shard_names_are_rejected(hub, tmp_path):
    hub.repos[REPO] = {"a/shard_00000.npy": b"1", "b/shard_00000.npy": b"2"}
    assert_rejected(download(tmp_path / "out", hub.url), "someone/Some", tmp_path / "out")


@pytest.mark.parametrize("name", ["a/../../shard_00000.npy", "/tmp/shard_00000.npy", "a\\b/shard_00000.npy"])
def test_file_names_outside_the_output_are_rejected(hub, tmp_path, name):
    hub.repos[REPO] = {name: b"evil"} | FILES
    run = download(tmp_path / "out", hub.url)
    assert_rejected(run, f"--repo someone/Some: its file {name!r}", tmp_path / "out")
    assert [entry for entry in hub.log if entry[1].endswith(".npy")] == []
    assert [path.name for path in tmp_path.iterdir() if path.name != "hub"] == []


def test_missing_repository_is_an_error(hub, tmp_path):
    run = download(tmp_path / "out", hub.url, repo="someone/None")
    assert_rejected(run, "--repo someone/None: no such repository", tmp_path / "out")


@pytest.mark.parametrize("answer", [b"<html>Log in</html>", b'[{"type": "file"}]', b'{"error": 1}', b"3"])
def test_response_that_is_not_from_a_hub_is_an_error(hub, tmp_path, answer):
    hub.answer = answer  # for example, a network's login page
    message = "--repo someone/Some: invalid response from the Hugging Face Hub"
    assert_rejected(download(tmp_path / "out", hub.url), message, tmp_path / "out")


def test_unknown_proxy_scheme_is_an_error(hub, tmp_path, monkeypatch):
    monkeypatch.setenv("https_proxy", "ftp://x")
    assert_rejected(download(tmp_path / "out", hub.url), "check the network and proxy", tmp_path / "out")


def test_unreachable_server_is_an_error(tmp_path):
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))  # a reserved port without a listener
        run = download(tmp_path / "out", f"http://127.0.0.1:{closed.getsockname()[1]}")
    assert_rejected(run, "--repo someone/Some: ", tmp_path / "out")


def test_unwritable_output_is_an_error(hub, tmp_path):
    (tmp_path / "file").touch()
    output = tmp_path / "file" / "below"
    run = download(output, hub.url, home=tmp_path / "hub")
    assert_rejected(run, f"--output {output}: cannot be written", output)
