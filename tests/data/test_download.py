"""The download command, in a process of its own, against a hub on this machine that logs what is asked of it."""

import hashlib
import json
import os
import socket
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from waiting import HANG

ROOT = Path(__file__).resolve().parents[2]
# Longer than the 10 MiB that huggingface_hub reads at a time, so that a transfer can break after the first of them.
BIG = os.urandom(12 << 20)
FILES = {
    "README.md": b"# Some",
    "shard_00000.npy": os.urandom(1000),
    "shard_00001.npy": BIG,
    "shard_00002.npy": os.urandom(1000),
    "tokenizer.json": b"{}",
}
# huggingface_hub sleeps 24 s in all between its attempts to reach a server: here it doesn't.
COMMAND = "import runpy, time; time.sleep = lambda s: None; runpy.run_module('acceleron.data', run_name='__main__')"


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self):
        hub = self.server
        hub.log.append((self.command, self.path.rpartition("/")[2], self.headers.get("Range")))
        folder, _, name = self.path.partition("/resolve/main/")
        if hub.answer:
            self.reply(200, hub.answer)
        elif self.path.startswith("/api/datasets/someone/Some/tree/main"):
            entries = [{"type": "file", "path": path, "size": 1, "oid": "0" * 40} for path in hub.files]
            self.reply(200, json.dumps(entries).encode())
        elif folder == "/datasets/someone/Some" and name in hub.files:
            content = hub.files[name]
            headers = {"ETag": f'"{hashlib.sha256(content).hexdigest()}"', "X-Repo-Commit": "1" * 40}
            if self.headers.get("Range"):
                start = int(self.headers["Range"].removeprefix("bytes=").rstrip("-"))
                headers["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
                self.reply(206, content[start:], headers)
            else:
                self.reply(200, content, headers, stop_at=hub.breaks.pop((self.command, name), None))
        else:
            self.reply(404, b"{}", {"X-Error-Code": "RepoNotFound"})

    do_HEAD = do_GET

    def reply(self, status, body, headers=(), stop_at=None):
        self.send_response(status)
        for name, value in (dict(headers) | {"Content-Length": len(body)}).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body[:stop_at])
            self.close_connection = stop_at is not None

    def log_message(self, *_):
        pass


@pytest.fixture
def hub():
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.files, server.log, server.breaks, server.answer = dict(FILES), [], {}, b""
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


def download(output, port, *, repo="someone/Some", shards=2):
    environment = os.environ | {
        "HF_ENDPOINT": f"http://127.0.0.1:{port}",
        "HF_HOME": str(output.parent / "hub"),
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_DOWNLOAD_TIMEOUT": str(int(HANG)),
        "HF_HUB_ETAG_TIMEOUT": str(int(HANG)),
        "NO_PROXY": "127.0.0.1",
    }
    arguments = ["download", "--repo", repo, "--shards", str(shards), "--output", str(output)]
    command = [sys.executable, "-c", COMMAND, *arguments]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=HANG)


def fetched(hub):
    """Names of the files whose contents were asked for."""
    return [name for method, name, _ in hub.log if method == "GET" and name in FILES]


def contents(output):
    return {path.name: path.read_bytes() for path in output.iterdir() if path.is_file()}


def assert_refused(run, culprit, output):
    assert run.returncode == 2, run.stderr
    assert "Traceback" not in run.stderr
    last = run.stderr.strip().splitlines()[-1]  # before it there may be progress bars and the hub's warnings
    assert last.startswith("error: ")
    assert culprit in last
    assert not output.exists()


def test_it_fetches_the_first_shards_and_none_of_them_twice(hub, tmp_path):
    """One of them in a folder of the repository: it ends up in the output directory itself all the same."""
    hub.files["data/shard_00000.npy"] = hub.files.pop("shard_00000.npy")
    wanted = ["shard_00000.npy", "shard_00001.npy", "tokenizer.json"]
    run = download(tmp_path / "out", hub.server_port)
    assert run.returncode == 0, run.stderr
    assert fetched(hub) == wanted
    assert contents(tmp_path / "out") == {name: FILES[name] for name in wanted}

    hub.log.clear()
    (tmp_path / "out" / "tokenizer.json").unlink()
    assert download(tmp_path / "out", hub.server_port).returncode == 0
    assert fetched(hub) == ["tokenizer.json"]
    assert contents(tmp_path / "out") == {name: FILES[name] for name in wanted}


def test_an_output_of_other_shards_is_left_alone(hub, tmp_path):
    """Whether the repository records its shards or not; its own shards.json does not stand in the way of the rest."""
    output = tmp_path / "out"
    output.mkdir()
    (output / "shards.json").write_bytes(b"[1]")
    for theirs in ({}, {"shards.json": b"[2]"}):
        hub.files = FILES | theirs
        run = download(output, hub.server_port)
        assert run.returncode == 2
        assert f"error: --output {output} holds the shards.json of other shards" in run.stderr
        assert contents(output) == {"shards.json": b"[1]"}
    hub.files["shards.json"] = b"[1]"
    assert download(output, hub.server_port).returncode == 0
    assert sorted(contents(output)) == ["shard_00000.npy", "shard_00001.npy", "shards.json", "tokenizer.json"]


def test_a_broken_transfer_is_taken_up_where_it_broke(hub, tmp_path):
    hub.breaks["GET", "shard_00001.npy"] = 11 << 20
    run = download(tmp_path / "out", hub.server_port)
    assert run.returncode == 0, run.stderr
    assert contents(tmp_path / "out")["shard_00001.npy"] == BIG
    assert [entry for entry in hub.log if entry[0] == "GET" and entry[1] == "shard_00001.npy"] == [
        ("GET", "shard_00001.npy", None),
        ("GET", "shard_00001.npy", f"bytes={10 << 20}-"),
    ]


def test_more_shards_than_there_are(hub, tmp_path):
    run = download(tmp_path / "out", hub.server_port, shards=4)
    assert_refused(run, "--shards 4: someone/Some has 3 shards", tmp_path / "out")
    assert fetched(hub) == []


def test_shards_of_the_same_name_would_overwrite_each_other(hub, tmp_path):
    hub.files = {"a/shard_00000.npy": b"1", "b/shard_00000.npy": b"2"}
    assert_refused(download(tmp_path / "out", hub.server_port), "someone/Some", tmp_path / "out")


@pytest.mark.parametrize("name", ["a/../../shard_00000.npy", "/tmp/shard_00000.npy", "a\\b/shard_00000.npy"])
def test_names_that_lead_out_of_the_output_directory(hub, tmp_path, name):
    hub.files = {name: b"evil"} | FILES
    run = download(tmp_path / "out", hub.server_port)
    assert_refused(run, f"--repo someone/Some: its file {name!r}", tmp_path / "out")
    assert [entry for entry in hub.log if entry[1].endswith(".npy")] == []
    assert [path.name for path in tmp_path.iterdir() if path.name != "hub"] == []


def test_no_such_repository(hub, tmp_path):
    run = download(tmp_path / "out", hub.server_port, repo="someone/None")
    assert_refused(run, "--repo someone/None: 404", tmp_path / "out")


@pytest.mark.parametrize("answer", [b"<html>Log in</html>", b'[{"type": "file"}]', b'{"error": 1}', b"3"])
def test_a_server_that_is_no_hub(hub, tmp_path, answer):
    """As the login page of a network."""
    hub.answer = answer
    said = "--repo someone/Some: no valid answer from the Hugging Face hub"
    assert_refused(download(tmp_path / "out", hub.server_port), said, tmp_path / "out")


def test_a_proxy_of_no_known_kind(hub, tmp_path, monkeypatch):
    monkeypatch.setenv("https_proxy", "ftp://x")
    assert_refused(download(tmp_path / "out", hub.server_port), "check the network and its proxy", tmp_path / "out")


def test_no_server(tmp_path):
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))  # taken, but nobody listens
        run = download(tmp_path / "out", closed.getsockname()[1])
    assert_refused(run, "--repo someone/Some: ", tmp_path / "out")


def test_an_output_that_cannot_be_written(hub, tmp_path):
    (tmp_path / "file").touch()
    output = tmp_path / "file" / "below"
    assert_refused(download(output, hub.server_port), f"--output {output}: cannot be written", output)
