"""Models on the Hub, in child processes against a loopback Hub: huggingface_hub reads its settings once, on import."""

import json
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from loopback_hub import BAD_TOKEN, READ_TOKEN, WRITE_TOKEN, hub_environment, loopback_hub
from waiting import TIMEOUT

from acceleron import Acceleron, ModelConfig

ROOT = Path(__file__).resolve().parents[2]
# Reads calls from stdin: a token, the name of a function of acceleron.hub, its arguments. Answers each with the result
# or InputError, and the log.
CHILD = """
import json, logging, os, sys
from acceleron import hub
from acceleron.errors import InputError

logged = []
handler = logging.Handler()
handler.emit = lambda record: logged.append(record.getMessage())
logging.getLogger("acceleron").addHandler(handler)
for line in sys.stdin:
    os.environ["HF_TOKEN"], name, *arguments = json.loads(line)
    logged.clear()
    try:
        result = str(getattr(hub, name)(*arguments))
    except InputError as error:
        result = f"error: {error}"
    print(json.dumps([result, logged]), flush=True)
"""
# Loads a model with both libraries and prints their logits.
LOGITS = """
import json, sys
import torch
from transformers import AutoModelForCausalLM
from acceleron import Acceleron

ids = torch.tensor(json.loads(sys.argv[1]))
with torch.no_grad():
    models = [library.from_pretrained("someone/nano") for library in (Acceleron, AutoModelForCausalLM)]
    print(json.dumps([model(ids).logits.tolist() for model in models]))
"""


class Child:
    """A process that calls acceleron.hub."""

    def __init__(self, process: subprocess.Popen):
        self.process = process
        self.log: list[str] = []  # of the last call

    def __call__(self, name: str, *arguments: str, token: str = "") -> str:
        self.process.stdin.write(json.dumps([token, name, *arguments]) + "\n")
        self.process.stdin.flush()
        result, self.log = json.loads(self.process.stdout.readline())
        return result


@contextmanager
def child_process(url: str, home: Path, **variables: str) -> Iterator[Child]:
    process = subprocess.Popen(
        [sys.executable, "-c", CHILD], cwd=ROOT, env=hub_environment(url, home, **variables), text=True,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE,
    )  # fmt: skip
    with process:
        yield Child(process)


@pytest.fixture(scope="module")
def hub():
    with loopback_hub() as server:
        server.repos["someone/pickle"] = {"pytorch_model.bin": b"0", "old/model.safetensors": b"0"}
        server.repos["someone/gated"] = {}
        server.gated.add("someone/gated")
        yield server


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    return tmp_path_factory.mktemp("home")


@pytest.fixture(scope="module")
def child(hub, home):
    with child_process(hub.url, home) as child:
        yield child


@pytest.fixture(scope="module")
def model():
    config = ModelConfig(
        vocab_size=64, d_model=32, num_layers=2, num_heads=2, num_kv_heads=1, num_experts=4, d_ff=32, d_ff_shared=16,
        max_seq_len=32,
    )  # fmt: skip
    torch.manual_seed(0)
    model = Acceleron(config)
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(4)  # logits at unit scale
    return model


@pytest.fixture(scope="module")
def pushed(hub, child, model, tmp_path_factory):
    """The directory that was pushed as someone/nano, in the first commit."""
    directory = tmp_path_factory.mktemp("export") / "nano"
    model.save_pretrained(directory)
    assert child("check_login", "someone/nano", token=WRITE_TOKEN) == "None"
    assert child("push", str(directory), "someone/nano", token=WRITE_TOKEN) == f"{hub.url}/someone/nano"
    return directory


def assert_error(result: str, *parts: str):
    assert result.startswith("error: ")
    assert "\n" not in result
    for part in parts:
        assert part in result


def requested(hub) -> set[str]:
    return {name for _, name, _ in hub.log}


def test_push_uploads_the_directory_in_one_commit(hub, child, pushed):
    """The weights go through LFS. A second push adds a commit."""
    files = {path.name: path.read_bytes() for path in pushed.iterdir()}
    assert sorted(files) == ["config.json", "model.safetensors"]
    assert hub.repos["someone/nano"] == files
    assert hub.commits == [{"config.json": "file", "model.safetensors": "lfsFile"}]
    (pushed / "config.json").write_bytes(files["config.json"] + b"\n")
    assert child("push", str(pushed), "someone/nano", token=WRITE_TOKEN) == f"{hub.url}/someone/nano"
    assert hub.repos["someone/nano"] == files | {"config.json": files["config.json"] + b"\n"}
    assert len(hub.commits) == 2


def test_both_libraries_load_a_pushed_model_by_name(hub, model, pushed, tmp_path):
    ids = torch.randint(64, (2, 32))
    run = subprocess.run(
        [sys.executable, "-c", LOGITS, json.dumps(ids.tolist())], cwd=ROOT, env=hub_environment(hub.url, tmp_path),
        capture_output=True, text=True, timeout=TIMEOUT,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    ours, transformers = torch.tensor(json.loads(run.stdout))
    with torch.no_grad():
        expected = model(ids).logits
    assert expected.std() > 0.5
    assert torch.equal(ours, expected)
    torch.testing.assert_close(transformers, expected, rtol=0, atol=1e-4)


def test_download_fetches_only_json_and_safetensors(hub, child, pushed):
    hub.repos["someone/extra"] = hub.repos["someone/nano"] | {
        "modeling.py": b"raise SystemExit",
        "pytorch_model.bin": b"0",
        "onnx/config.json": b"{}",
        "onnx/model.safetensors": b"0",
    }
    hub.log.clear()
    path = child("download_model", "someone/extra")
    assert {file.name: file.read_bytes() for file in Path(path).iterdir()} == hub.repos["someone/nano"]
    assert not {"modeling.py", "pytorch_model.bin"} & requested(hub)
    assert child.log == []


def test_config_is_downloaded_without_the_weights(hub, child, home, pushed):
    """The argument `weights` is an empty string, which is false. The cached config is used without a network."""
    hub.repos["someone/config"] = dict(hub.repos["someone/nano"])
    hub.log.clear()
    path = child("download_model", "someone/config", "")
    assert [file.name for file in Path(path).iterdir()] == ["config.json"]
    assert "model.safetensors" not in requested(hub)
    with child_process(hub.url, home, HF_HUB_OFFLINE="1") as other:
        assert other("download_model", "someone/config", "") == path
        assert_error(other("download_model", "someone/config"), "someone/config: ", "no cached copy")
    assert child("download_model", "someone/config") == path
    assert {file.name: file.read_bytes() for file in Path(path).iterdir()} == hub.repos["someone/config"]


@pytest.mark.parametrize("token", ["", WRITE_TOKEN])  # the Hub answers 401 and 404
def test_absent_repository_is_an_error(child, token):
    result = child("download_model", "someone/absent", token=token)
    assert_error(result, "someone/absent: no such directory", "no such repository", "hf auth login")


def test_gated_repository_is_an_error(child):
    assert_error(child("download_model", "someone/gated"), "someone/gated: ", "access is restricted", "hf auth login")


def test_repository_of_pickles_is_an_error(hub, child):
    hub.log.clear()
    assert_error(child("download_model", "someone/pickle"), "someone/pickle has no safetensors files")
    assert "pytorch_model.bin" not in requested(hub)


@pytest.mark.parametrize("name", ["some--one/nano", "someone/" + "a" * 97])
@pytest.mark.parametrize("function", ["download_model", "check_login"])
def test_name_that_breaks_the_rules_of_the_hub_is_an_error(hub, child, function, name):
    hub.log.clear()
    assert_error(child(function, name), name, "Cannot have --" if "--" in name else "the maximum length is 96")
    assert hub.log == []


@pytest.mark.parametrize("name", ["nano", "./nano", "a b/nano", "a/b/c"])
def test_check_login_rejects_names_of_another_form(child, name):
    assert_error(child("check_login", name), f"--push_to_hub {name}: pass user/name")


def test_bad_token_is_an_error(hub, child, pushed):
    commits = len(hub.commits)
    for call in ("download_model", "someone/nano"), ("check_login", "someone/nano"):
        result = child(*call, token=BAD_TOKEN)
        assert_error(result, "someone/nano: ", "the token is not valid", "HF_TOKEN", "hf auth login")
    result = child("push", str(pushed), "someone/nano", token=BAD_TOKEN)
    command = f"`hf upload someone/nano {pushed}`"
    assert_error(result, "the token is not valid", f"; {pushed} is complete: upload it with {command}")
    assert len(hub.commits) == commits


def test_check_login_needs_a_token_that_can_write(child):
    log_in = "run `hf auth login` or set HF_TOKEN"
    assert_error(child("check_login", "someone/nano"), f"--push_to_hub someone/nano: no token: {log_in}")
    result = child("check_login", "someone/nano", token=READ_TOKEN)
    assert_error(result, "--push_to_hub someone/nano: the token can only read", log_in)


def test_push_to_another_user_is_an_error(child, pushed):
    result = child("push", str(pushed), "other/nano", token=WRITE_TOKEN)
    assert_error(result, "You don't have the rights", f"`hf upload other/nano {pushed}`")


@pytest.mark.parametrize("answer", [b"<html>Log in</html>", b'{"error": 1}'])
def test_response_that_is_not_from_a_hub_is_an_error(hub, child, monkeypatch, pushed, answer):
    monkeypatch.setattr(hub, "answer", answer)
    for call in ("download_model", "someone/nano"), ("push", str(pushed), "someone/nano"):
        assert_error(
            child(*call, token=WRITE_TOKEN), "someone/nano: ", "invalid response", "check the network and proxy"
        )


@pytest.mark.parametrize("kind", ["no network", "offline"])
def test_without_network_the_cached_copy_is_used(hub, child, home, pushed, kind):
    """The log has its path. HF_HUB_OFFLINE has the same effect, and sends no request."""
    path = child("download_model", "someone/nano")
    hub.log.clear()
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))  # a reserved port without a listener
        gone = f"http://127.0.0.1:{closed.getsockname()[1]}"
        url, variables = (gone, {}) if kind == "no network" else (hub.url, {"HF_HUB_OFFLINE": "1"})
        with child_process(url, home, **variables) as other:
            assert other("download_model", "someone/nano") == path
            assert len(other.log) == 1
            assert other.log[0].startswith("someone/nano: no network")
            assert other.log[0].endswith(f": using the cached copy {path}")
            result = other("download_model", "someone/pickle")
            assert_error(result, "someone/pickle: no such directory, no network ", " and no cached copy")
            for call in ("check_login", "someone/nano"), ("push", str(pushed), "someone/nano"):
                result = other(*call, token=WRITE_TOKEN)
                fix = "check the network and proxy" if kind == "no network" else "unset HF_HUB_OFFLINE"
                assert_error(result, "--push_to_hub someone/nano: ", fix)
    assert hub.log == []


def test_server_error_counts_as_no_network(hub, child, pushed, monkeypatch):
    path = child("download_model", "someone/nano")
    monkeypatch.setattr(hub, "status", 503)
    assert child("download_model", "someone/nano") == path
    assert "503" in child.log[0]
