"""Bad input exits with status 2, prints one line that names the cause, and leaves the disk unchanged.

Most cases run in this process; the last ones run the commands in subprocesses.
"""

import os
import pickle
import shlex
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from waiting import TIMEOUT

import generate
import train
from acceleron.data.tokenizer import train_tokenizer
from acceleron.errors import run_command
from acceleron.kernels import launch

ROOT = Path(__file__).resolve().parents[1]
# The tokenizer has 300 entries, so nano's vocabulary is 384. The first 3 of the 4 rows are training data.
TRAIN = shlex.split(
    "--model_size nano --seq_len 32 --batch_size 3 --max_steps 1 --save_dir run --num_workers 1 "
    "--no_compile --device cpu --kernels reference"
)
SHARD = Path("data/shard_00000.npy")


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    """A directory with data, tokenizers, and a checkpoint written by train.py with the flags in TRAIN."""
    directory = tmp_path_factory.mktemp("original")
    (directory / "data").mkdir()
    np.save(directory / SHARD, np.arange(128, dtype=np.int32).reshape(4, 32))
    text = " ".join(f"word{number}" for number in range(200))
    train_tokenizer([text], 300).save(str(directory / "data" / "tokenizer.json"))
    train_tokenizer([text], 400).save(str(directory / "large.json"))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(directory)
        patch.setattr(sys, "argv", ["train.py", *TRAIN])
        assert run_command(train.main) == 0
    return directory


@pytest.fixture
def workdir(original, tmp_path, monkeypatch):
    """Change to a directory with a copy of the original's data and a link to its checkpoint, but no run."""
    shutil.copytree(original / "data", tmp_path / "data")
    shutil.copy(original / "large.json", tmp_path)
    (tmp_path / "good.pt").symlink_to(original / "run" / "checkpoint_1.pt")
    monkeypatch.chdir(tmp_path)
    for script in (train, generate):  # ignore a developer's pile_tokenizer.json next to the scripts
        monkeypatch.setattr(script, "__file__", str(tmp_path / "script.py"))
    return tmp_path


@pytest.fixture
def stderr_of(workdir, monkeypatch, capsys):
    """Run a command that must reject its input. Return the lines of its stderr."""

    def run(script, *arguments):
        before = snapshot(workdir)
        monkeypatch.setattr(sys, "argv", [f"{script.__name__}.py", *arguments])
        try:
            status = run_command(script.main)
        except SystemExit as exit:  # from argparse
            status = exit.code
        lines = capsys.readouterr().err.splitlines()
        assert status == 2, lines
        assert snapshot(workdir) == before
        return lines

    return run


def snapshot(directory: Path) -> dict:
    return {path: path.is_file() and path.read_bytes() for path in directory.rglob("*")}


def assert_error(lines: list[str], *culprits: str, after_log: bool = False):
    """Assert that the last line is the error. With `after_log`, log lines precede it; otherwise it is the only line."""
    *before, line = lines
    assert bool(before) == after_log
    assert not any("error" in text or "Traceback" in text for text in before)
    assert line.startswith("error: ")
    for culprit in culprits:
        assert culprit in line


class Trap:
    """Unpickling this object creates a file."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return open, (self.path, "w")


@pytest.fixture
def trap(workdir):
    path = workdir / "executed"
    pickle.loads(pickle.dumps(Trap(path))).close()
    path.unlink()  # fails if the trap does not work
    return Trap(path)


@pytest.mark.parametrize(
    ("flags", "culprit"),
    [
        ("--data_dir nowhere", "nowhere"),
        ("--data_dir data/shard_00000.npy", "pass its directory, data"),
        ("--tokenizer gpt2", "Hub model names are not supported yet"),
        ("--tokenizer EleutherAI/gpt-neox-20b", "Hub model names are not supported yet"),
        ("--save_dir caf\udce9", "not valid UTF-8"),
        ("--tokenizer nowhere.json", "nowhere.json"),
        ("--tokenizer=", "--tokenizer: expected a value"),
        ("--save_dir=", "--save_dir: expected a value"),
        ("--save_dir large.json", "--save_dir large.json: cannot be written (it is a file, not a directory)"),
        ("--resume Auto", "--resume Auto does not exist: did you mean auto?"),
        ("--vocab_size 256", "tokenizer has 300 entries"),
        ("--tokenizer large.json --vocab_size 384", "tokenizer has 400 entries"),
        ("--batch_size 0", "--batch_size 0"),
        ("--seq_len 0", "--seq_len 0"),
        ("--seq_len 24", "--seq_len 24"),  # does not divide 32
        ("--seq_len 4096", "--seq_len 4096"),  # longer than the model's 2048
        ("--lr nan", "--lr nan"),
        ("--lr 1e-3 --min_lr 1e-2", "--min_lr 0.01"),
        ("--warmup_steps 2", "--warmup_steps 2"),
        ("--seed -1", "--seed -1"),
        ("--seed 18446744073709551616", "--seed 18446744073709551616"),
        ("--device cuda:99", "--device cuda:99"),
        ("--device nonsense", "--device nonsense"),
        ("--device meta", "--device meta"),
        ("--device hpu", "--device hpu"),
        ("--batch_size 100000000000000000000", "--batch_size"),
        ("--vocab_size 100000000000", "vocab_size"),
        ("--resume nowhere.pt", "nowhere.pt"),
        ("--resume data", "data"),
        ("--resume good.pt", "good.pt is at step 1"),
        ("--resume good.pt --max_steps 2 --seed 1", "seed"),
        ("--resume good.pt --max_steps 2 --seq_len 16", "seq_len"),
        ("--resume good.pt --max_steps 2 --dense", "dense"),
        ("--resume good.pt --max_steps 2 --vocab_size 512", "vocab_size"),
    ],
)
def test_invalid_train_flags(stderr_of, flags, culprit):
    assert_error(stderr_of(train, *TRAIN, *flags.split()), culprit)


@pytest.mark.parametrize("flags", ["--data_dir nowhere", "--tokenizer nowhere.json", "--resume nowhere.pt"])
def test_error_does_not_list_files_created_by_train(stderr_of, flags):
    [line] = stderr_of(train, *TRAIN, *flags.split())
    assert line.endswith("urrent directory contains data, good.pt, large.json")


def test_resume_finds_a_checkpoint_name_in_save_dir(workdir, stderr_of):
    (workdir / "run").mkdir()
    shutil.copy(workdir / "good.pt", workdir / "run" / "checkpoint_1.pt")
    note, error = stderr_of(train, *TRAIN, "--resume", "checkpoint_1.pt")
    assert note == "note: checkpoint_1.pt does not exist: using run/checkpoint_1.pt"
    assert error == "error: --resume run/checkpoint_1.pt is at step 1: pass --max_steps above 1"


def test_triton_without_a_gpu_is_rejected(stderr_of, monkeypatch):
    monkeypatch.setattr(launch, "cpu_device", None)  # conftest.py enables the interpreter
    assert_error(stderr_of(train, *TRAIN, "--kernels", "triton"), "--kernels triton")


@pytest.mark.parametrize("flags", ["--model_size huge", "--batch_size two", "--bathc_size 2", "--dtype fp64"])
@pytest.mark.parametrize("script", [train, generate], ids=["train", "generate"])
def test_flags_rejected_by_argparse(stderr_of, script, flags):
    required = ["--checkpoint", "good.pt"] if script is generate else []
    assert_error(stderr_of(script, *required, *flags.split()), flags.split()[0])


@pytest.mark.parametrize(
    ("flags", "culprit"),
    [
        ("--top_k 0", "--top_k 0"),
        ("--top_k 9", "top_k 9 must be at most num_experts 8"),
        ("--num_experts 1", "--num_experts 1"),
        ("--num_experts 257", "num_experts 257"),
        ("--d_ff 0", "--d_ff 0"),
        ("--d_ff_shared -1", "--d_ff_shared -1"),
        ("--num_dense_layers 4", "num_dense_layers 4 must be below num_layers 4"),
        ("--config model.json", "--config: not allowed with argument --model_size"),
        ("--resume good.pt --max_steps 2 --top_k 4", "top_k 2 (here 4)"),
    ],
)
def test_invalid_shapes(stderr_of, flags, culprit):
    assert_error(stderr_of(train, *TRAIN, *flags.split()), culprit)


@pytest.mark.parametrize(
    ("content", "culprit"),
    [
        (None, "--config model.json does not exist"),
        ("{", "--config model.json: not a JSON file"),
        ("[" * 100_000, "--config model.json: not a JSON file"),
        ("[]", "--config model.json: not a JSON object"),
        ('{"experts": 8}', "--config model.json: unknown fields 'experts'"),
        ('{"top_k": 2.0}', "--config model.json: top_k must be an integer of at least 1, not 2.0"),
        ('{"vocab_size": 256}', "the tokenizer has 300 entries, more than the model's vocabulary of 256"),
    ],
)
def test_invalid_config_files(workdir, stderr_of, content, culprit):
    if content is not None:
        (workdir / "model.json").write_text(content)
    assert TRAIN[:2] == ["--model_size", "nano"]
    assert_error(stderr_of(train, *TRAIN[2:], "--config", "model.json"), culprit)


def save(array, path=SHARD):
    np.save(path, array, allow_pickle=True)


ROWS = np.arange(128, dtype=np.int32).reshape(4, 32)
BAD_SHARDS = {
    "none": (SHARD.unlink, "data has no shard"),
    "truncated": (lambda: SHARD.write_bytes(SHARD.read_bytes()[:-1]), SHARD.name),
    "empty": (lambda: SHARD.write_bytes(b""), SHARD.name),
    "text": (lambda: SHARD.write_text("Once upon a time"), SHARD.name),
    "half an archive": (lambda: SHARD.write_bytes(b"PK\x03\x04" + bytes(99)), SHARD.name),
    "damaged header": (lambda: SHARD.write_bytes(SHARD.read_bytes().replace(b"{", b"(")), SHARD.name),
    "huge header": (lambda: save(np.zeros(2, [(f"f{i}", "i4") for i in range(2000)])), SHARD.name),
    "a directory": (lambda: (SHARD.unlink(), SHARD.mkdir()), SHARD.name),
    "floats": (lambda: save(ROWS.astype(np.float32)), "float32"),
    "flags": (lambda: save(ROWS > 1), "bool"),
    "one dimension": (lambda: save(ROWS.ravel()), "(128,)"),
    "no rows": (lambda: save(ROWS[:0]), "(0, 32)"),
    "only one row": (lambda: save(ROWS[:1]), "one row is not enough"),
    "different row length": (lambda: save(ROWS[:, :16], SHARD.with_name("shard_00001.npy")), "shard_00001.npy"),
}


@pytest.mark.parametrize("case", BAD_SHARDS)
def test_invalid_shards(workdir, stderr_of, case):
    damage, culprit = BAD_SHARDS[case]
    damage()
    assert_error(stderr_of(train, *TRAIN), "data", culprit)


@pytest.mark.parametrize("as_array", [True, False])
def test_pickled_shard_does_not_run_code(stderr_of, trap, as_array):
    save(np.array([[trap]])) if as_array else SHARD.write_bytes(pickle.dumps(trap))
    assert_error(stderr_of(train, *TRAIN), SHARD.name)
    assert not Path(trap.path).exists()


@pytest.mark.parametrize("token", [384, -1])
def test_token_ids_outside_the_vocabulary(workdir, stderr_of, token):
    rows = ROWS.copy()
    rows[1, 20] = token
    save(rows)
    assert_error(stderr_of(train, *TRAIN), f"{SHARD}: row 1 contains token id {token}", "384", after_log=True)


@pytest.mark.parametrize("content", ["{", "[]", '{"version": "1.0"}', None])
def test_invalid_tokenizers(original, workdir, stderr_of, content):
    path = workdir / "data" / "tokenizer.json"
    # None: a tokenizer without the document separator.
    path.write_text(content or path.read_text().replace("<|endoftext|>", "<|end|>"))
    assert_error(stderr_of(train, *TRAIN), "tokenizer.json")
    assert_error(stderr_of(generate, "--checkpoint", "good.pt", "--tokenizer", str(path)), "tokenizer.json")


def test_missing_tokenizer(workdir, stderr_of):
    (workdir / "data" / "tokenizer.json").unlink()
    assert_error(stderr_of(train, *TRAIN), "--tokenizer")
    assert_error(
        stderr_of(generate, "--checkpoint", "good.pt", "--prompt", "word1"), "no tokenizer.json in .", "--tokenizer"
    )


def truncated(content: bytes, trap):
    return content[: len(content) // 2]


def bare_pickle(content: bytes, trap):
    return pickle.dumps(trap)


def archived_pickle(content: bytes, trap):
    torch.save({"format": 1, "model": trap}, "trap.pt")
    return Path("trap.pt").read_bytes()


def damaged_pickle(content: bytes, trap):
    """A valid archive with a damaged pickle."""
    name = next(name for name in zipfile.ZipFile("good.pt").namelist() if name.endswith("data.pkl"))
    at = content.index(zipfile.ZipFile("good.pt").read(name))
    return content[: at + 2] + b"t" + content[at + 3 :]  # an opcode that pops from the empty stack


def other_object(content: bytes, trap):
    torch.save([torch.ones(3)], "list.pt")
    return Path("list.pt").read_bytes()


def noise(content: bytes, trap):
    return np.random.default_rng(0).bytes(5000)


@pytest.mark.parametrize("make", [truncated, bare_pickle, archived_pickle, damaged_pickle, other_object, noise])
def test_invalid_checkpoints(workdir, stderr_of, trap, make):
    (workdir / "bad.pt").write_bytes(make((workdir / "good.pt").read_bytes(), trap))
    assert_error(stderr_of(train, *TRAIN, "--max_steps", "2", "--resume", "bad.pt"), "bad.pt")
    assert_error(stderr_of(generate, "--checkpoint", "bad.pt", "--prompt", "word1"), "bad.pt")
    assert not Path(trap.path).exists()


def test_checkpoint_with_weights_that_do_not_fit_its_config(workdir, stderr_of):
    contents = torch.load("good.pt", weights_only=True)
    contents["model"]["embedding"] = contents["model"]["embedding"][:-1].clone()
    torch.save(contents, "bad.pt")
    assert_error(stderr_of(train, *TRAIN, "--max_steps", "2", "--resume", "bad.pt"), "bad.pt")
    assert_error(stderr_of(generate, "--checkpoint", "bad.pt", "--prompt", "word1"), "bad.pt")


def test_resuming_with_different_data(workdir, stderr_of):
    save(ROWS[:3])
    assert_error(stderr_of(train, *TRAIN, "--max_steps", "2", "--resume", "good.pt"), "different shards")


@pytest.mark.parametrize("path", ["good.pt", "good.pt/below"])  # a file, and a path that even root cannot create
def test_unwritable_save_dir(stderr_of, path):
    assert_error(stderr_of(train, *TRAIN, "--save_dir", path), f"--save_dir {path}")


def test_directory_of_an_earlier_run_is_not_overwritten(workdir, stderr_of):
    (workdir / "run").mkdir()
    (workdir / "run" / "checkpoint_7.pt").write_text("precious")
    assert_error(stderr_of(train, *TRAIN), "--save_dir run", "--resume")


@pytest.mark.parametrize(
    ("flags", "culprit"),
    [
        ("--checkpoint nowhere.pt", "nowhere.pt"),
        ("--checkpoint=", "--checkpoint: expected a value"),
        ("--tokenizer=", "--tokenizer: expected a value"),
        ("--top_p 0", "--top_p 0"),
        ("--top_p 1.5", "--top_p 1.5"),
        ("--top_p nan", "--top_p nan"),
        ("--top_k -1", "--top_k -1"),
        ("--temperature -1", "--temperature -1"),
        ("--temperature nan", "--temperature nan"),
        ("--temperature inf", "--temperature inf"),
        ("--max_new_tokens 0", "--max_new_tokens 0"),
        ("--seed -1", "--seed -1"),
        ("--seed 18446744073709551616", "--seed 18446744073709551616"),
        ("--device nonsense", "--device nonsense"),
        ("--device meta", "--device meta"),
        ("--device hpu", "--device hpu"),
        ("--tokenizer nowhere.json", "nowhere.json"),
        ("--tokenizer large.json", "large.json has 400 entries"),
        ("--tokenizer data/tokenizer.json --prompt " + "~" * 3000, "prompt has 3000 tokens"),
    ],
)
def test_invalid_generate_flags(stderr_of, flags, culprit):
    flags = ["--checkpoint", "good.pt", "--prompt", "word1", "--device", "cpu", *flags.split(" ")]
    assert_error(stderr_of(generate, *flags), culprit)


def test_generate_ends_the_line_before_an_error(workdir, monkeypatch, capsys):
    flags = ["--checkpoint", "good.pt", "--tokenizer", "data/tokenizer.json", "--device", "cpu"]
    monkeypatch.setattr(sys, "argv", ["generate.py", *flags, "--prompt", "~" * 3000])
    assert run_command(generate.main) == 2
    assert capsys.readouterr().out == "~" * 3000 + "\n"


def test_generate_finds_a_checkpoint_name_in_the_default_save_dir(workdir, monkeypatch, capsys):
    (workdir / "checkpoints").mkdir()
    (workdir / "good.pt").rename(workdir / "checkpoints" / "checkpoint_5000.pt")
    shutil.copy(workdir / "data" / "tokenizer.json", workdir / "checkpoints")
    flags = "--checkpoint checkpoint_5000.pt --prompt word1 --max_new_tokens 1 --device cpu"
    monkeypatch.setattr(sys, "argv", ["generate.py", *flags.split()])
    assert run_command(generate.main) == 0
    note = "note: checkpoint_5000.pt does not exist: using checkpoints/checkpoint_5000.pt"
    assert note in capsys.readouterr().err.splitlines()
    monkeypatch.setattr(sys, "argv", ["generate.py", "--checkpoint", "checkpoint_500.pt", "--device", "cpu"])
    assert run_command(generate.main) == 2
    assert "did you mean checkpoint_5000.pt? checkpoints contains" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("redirected", "status", "shown", "errors"),
    [
        ("<&- >&- 2>&-", 0, "", 0),
        ("--prompt wörd >/dev/full", 3, "", 1),
        ("--prompt wörd", 0, r"w\xf6rd", 0),
        ("<<< wörd", 0, r"w\xf6rd", 0),
        (r"<<< $'w\xff'", 0, "> ", 1),
    ],
)
def test_generate_on_an_ascii_terminal(workdir, redirected, status, shown, errors):
    flags = "--checkpoint good.pt --tokenizer data/tokenizer.json --max_new_tokens 2 --device cpu"
    run = subprocess.run(
        ["bash", "-c", f"{sys.executable} {ROOT / 'generate.py'} {flags} {redirected}"],
        env=os.environ | {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
        capture_output=True, text=True, timeout=TIMEOUT, check=False,
    )  # fmt: skip
    assert run.returncode == status, run.stderr
    assert shown in run.stdout
    assert "Traceback" not in run.stderr
    assert run.stderr.count("error:") == errors


def command(script, *arguments):
    run = subprocess.run(
        [sys.executable, ROOT / script, *arguments], capture_output=True, text=True, timeout=TIMEOUT, check=False
    )
    assert run.returncode == 2, run.stderr
    assert run.stdout == ""
    return run.stderr.splitlines()


def test_reader_thread_error_is_one_line(workdir):
    save(np.full_like(ROWS, 384))
    before = snapshot(workdir)
    lines = command("train.py", *TRAIN, "--num_workers", "2")
    assert_error(lines, f"{SHARD}: row", "token id 384", after_log=True)
    assert snapshot(workdir) == before


def test_generate_subprocess_rejects_an_unsafe_checkpoint(workdir, trap):
    Path("bad.pt").write_bytes(archived_pickle(b"", trap))
    assert_error(command("generate.py", "--checkpoint", "bad.pt", "--prompt", "word1"), "bad.pt", "unsafe")
    assert not Path(trap.path).exists()
