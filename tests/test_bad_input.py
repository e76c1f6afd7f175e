"""Bad input ends with status 2, one line that names the culprit, and everything on disk as it was before.

Most cases run in this process; the last ones are commands of their own, with a worker process in one.
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
from waiting import HANG

import generate
import train
from acceleron.data.tokenizer import train_tokenizer
from acceleron.errors import run_command
from acceleron.kernels import launch

ROOT = Path(__file__).resolve().parents[1]
# 300 entries, so nano's vocabulary is 384. With 4 rows of data, the first 3 train.
TRAIN = shlex.split(
    "--model_size nano --seq_len 32 --batch_size 3 --max_steps 1 --save_dir run --num_workers 1 "
    "--no_compile --device cpu --kernels reference"
)
SHARD = Path("data/shard_00000.npy")


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    """A directory with data, a tokenizer, and a checkpoint that the command wrote with these very flags."""
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
def here(original, tmp_path, monkeypatch):
    """The current directory: a copy of the original's data, a link to its checkpoint, no run."""
    shutil.copytree(original / "data", tmp_path / "data")
    shutil.copy(original / "large.json", tmp_path)
    (tmp_path / "good.pt").symlink_to(original / "run" / "checkpoint_1.pt")
    monkeypatch.chdir(tmp_path)
    for script in (train, generate):  # beside which a developer may have a pile_tokenizer.json
        monkeypatch.setattr(script, "__file__", str(tmp_path / "script.py"))
    return tmp_path


@pytest.fixture
def refusal(here, monkeypatch, capsys):
    """Runs a command that must refuse its input; returns what it wrote to stderr, as lines."""

    def run(script, *arguments):
        before = snapshot(here)
        monkeypatch.setattr(sys, "argv", [f"{script.__name__}.py", *arguments])
        try:
            status = run_command(script.main)
        except SystemExit as exit:  # argparse's
            status = exit.code
        lines = capsys.readouterr().err.splitlines()
        assert status == 2, lines
        assert snapshot(here) == before
        return lines

    return run


def snapshot(directory: Path) -> dict:
    return {path: path.is_file() and path.read_bytes() for path in directory.rglob("*")}


def assert_error(lines: list[str], *culprits: str, announced: bool = False):
    """One line; or the last, and `announced`, if lines that say what is about to run come before it."""
    *before, line = lines
    assert bool(before) == announced
    assert not any("error" in text or "Traceback" in text for text in before)
    assert line.startswith("error: ")
    for culprit in culprits:
        assert culprit in line


class Trap:
    """Unpickling it writes a file."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return open, (self.path, "w")


@pytest.fixture
def trap(here):
    path = here / "sprung"
    pickle.loads(pickle.dumps(Trap(path))).close()
    path.unlink()  # it must exist: the trap works
    return Trap(path)


@pytest.mark.parametrize(
    ("flags", "culprit"),
    [
        ("--data_dir nowhere", "nowhere"),
        ("--data_dir data/shard_00000.npy", "name the directory that it is in, data"),
        ("--tokenizer gpt2", "names of the hub are not supported yet"),
        ("--tokenizer EleutherAI/gpt-neox-20b", "names of the hub are not supported yet"),
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
def test_flags_of_train(refusal, flags, culprit):
    assert_error(refusal(train, *TRAIN, *flags.split()), culprit)


@pytest.mark.parametrize("flags", ["--data_dir nowhere", "--tokenizer nowhere.json", "--resume nowhere.pt"])
def test_what_train_itself_creates_is_not_listed(refusal, flags):
    [line] = refusal(train, *TRAIN, *flags.split())
    assert line.endswith("urrent directory holds data, good.pt, large.json")


def test_a_checkpoint_to_resume_is_also_looked_for_in_save_dir(here, refusal):
    (here / "run").mkdir()
    shutil.copy(here / "good.pt", here / "run" / "checkpoint_1.pt")
    note, error = refusal(train, *TRAIN, "--resume", "checkpoint_1.pt")
    assert note == "note: checkpoint_1.pt does not exist: using run/checkpoint_1.pt"
    assert error == "error: --resume run/checkpoint_1.pt is at step 1: pass --max_steps above 1"


def test_triton_on_a_cpu(refusal, monkeypatch):
    monkeypatch.setattr(launch, "cpu_device", None)  # conftest.py's interpreter would serve it
    assert_error(refusal(train, *TRAIN, "--kernels", "triton"), "--kernels triton")


@pytest.mark.parametrize("flags", ["--model_size huge", "--batch_size two", "--bathc_size 2", "--dtype fp64"])
@pytest.mark.parametrize("script", [train, generate], ids=["train", "generate"])
def test_flags_that_argparse_refuses(refusal, script, flags):
    required = ["--checkpoint", "good.pt"] if script is generate else []
    assert_error(refusal(script, *required, *flags.split()), flags.split()[0])


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
    "another row length": (lambda: save(ROWS[:, :16], SHARD.with_name("shard_00001.npy")), "shard_00001.npy"),
}


@pytest.mark.parametrize("case", BAD_SHARDS)
def test_bad_shards(here, refusal, case):
    damage, culprit = BAD_SHARDS[case]
    damage()
    assert_error(refusal(train, *TRAIN), "data", culprit)


@pytest.mark.parametrize("as_array", [True, False])
def test_a_shard_that_would_run_code(refusal, trap, as_array):
    save(np.array([[trap]])) if as_array else SHARD.write_bytes(pickle.dumps(trap))
    assert_error(refusal(train, *TRAIN), SHARD.name)
    assert not Path(trap.path).exists()


@pytest.mark.parametrize("token", [384, -1])
def test_token_ids_outside_the_vocabulary(here, refusal, token):
    rows = ROWS.copy()
    rows[1, 20] = token
    save(rows)
    assert_error(refusal(train, *TRAIN), f"{SHARD}: row 1 contains token id {token}", "384", announced=True)


@pytest.mark.parametrize("content", ["{", "[]", '{"version": "1.0"}', None])
def test_bad_tokenizers(original, here, refusal, content):
    path = here / "data" / "tokenizer.json"
    # None: a tokenizer that lacks the mark between documents.
    path.write_text(content or path.read_text().replace("<|endoftext|>", "<|end|>"))
    assert_error(refusal(train, *TRAIN), "tokenizer.json")
    assert_error(refusal(generate, "--checkpoint", "good.pt", "--tokenizer", str(path)), "tokenizer.json")


def test_no_tokenizer(here, refusal):
    (here / "data" / "tokenizer.json").unlink()
    assert_error(refusal(train, *TRAIN), "--tokenizer")
    assert_error(refusal(generate, "--checkpoint", "good.pt", "--prompt", "word1"), "--tokenizer", "good.pt")


def truncated(content: bytes, trap):
    return content[: len(content) // 2]


def bare_pickle(content: bytes, trap):
    return pickle.dumps(trap)


def archived_pickle(content: bytes, trap):
    torch.save({"format": 1, "model": trap}, "trap.pt")
    return Path("trap.pt").read_bytes()


def damaged_pickle(content: bytes, trap):
    """The archive is whole, but not the pickle in it."""
    name = next(name for name in zipfile.ZipFile("good.pt").namelist() if name.endswith("data.pkl"))
    at = content.index(zipfile.ZipFile("good.pt").read(name))
    return content[: at + 2] + b"t" + content[at + 3 :]  # an opcode that takes from the stack, which is empty


def another_kind(content: bytes, trap):
    torch.save([torch.ones(3)], "list.pt")
    return Path("list.pt").read_bytes()


def noise(content: bytes, trap):
    return np.random.default_rng(0).bytes(5000)


@pytest.mark.parametrize("make", [truncated, bare_pickle, archived_pickle, damaged_pickle, another_kind, noise])
def test_bad_checkpoints(here, refusal, trap, make):
    (here / "bad.pt").write_bytes(make((here / "good.pt").read_bytes(), trap))
    assert_error(refusal(train, *TRAIN, "--max_steps", "2", "--resume", "bad.pt"), "bad.pt")
    assert_error(refusal(generate, "--checkpoint", "bad.pt", "--prompt", "word1"), "bad.pt")
    assert not Path(trap.path).exists()


def test_a_checkpoint_whose_weights_do_not_fit_its_config(here, refusal):
    contents = torch.load("good.pt", weights_only=True)
    contents["model"]["embedding"] = contents["model"]["embedding"][:-1].clone()
    torch.save(contents, "bad.pt")
    assert_error(refusal(train, *TRAIN, "--max_steps", "2", "--resume", "bad.pt"), "bad.pt")
    assert_error(refusal(generate, "--checkpoint", "bad.pt", "--prompt", "word1"), "bad.pt")


def test_other_data_than_the_resumed_run_had(here, refusal):
    save(ROWS[:3])
    assert_error(refusal(train, *TRAIN, "--max_steps", "2", "--resume", "good.pt"), "other shards")


@pytest.mark.parametrize("path", ["good.pt", "good.pt/below"])  # a file, and what not even root can make
def test_a_save_dir_that_cannot_be_written(refusal, path):
    assert_error(refusal(train, *TRAIN, "--save_dir", path), f"--save_dir {path}")


def test_the_directory_of_an_earlier_run_is_left_alone(here, refusal):
    (here / "run").mkdir()
    (here / "run" / "checkpoint_7.pt").write_text("precious")
    assert_error(refusal(train, *TRAIN), "--save_dir run", "--resume")


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
def test_flags_of_generate(refusal, flags, culprit):
    flags = ["--checkpoint", "good.pt", "--prompt", "word1", "--device", "cpu", *flags.split(" ")]
    assert_error(refusal(generate, *flags), culprit)


def test_an_error_after_text_starts_a_line(here, monkeypatch, capsys):
    flags = ["--checkpoint", "good.pt", "--tokenizer", "data/tokenizer.json", "--device", "cpu"]
    monkeypatch.setattr(sys, "argv", ["generate.py", *flags, "--prompt", "~" * 3000])
    assert run_command(generate.main) == 2
    assert capsys.readouterr().out == "~" * 3000 + "\n"


def test_a_checkpoint_is_also_looked_for_where_train_writes_it(here, monkeypatch, capsys):
    (here / "checkpoints").mkdir()
    (here / "good.pt").rename(here / "checkpoints" / "checkpoint_5000.pt")
    shutil.copy(here / "data" / "tokenizer.json", here / "checkpoints")
    flags = "--checkpoint checkpoint_5000.pt --prompt word1 --max_new_tokens 1 --device cpu"
    monkeypatch.setattr(sys, "argv", ["generate.py", *flags.split()])
    assert run_command(generate.main) == 0
    note = "note: checkpoint_5000.pt does not exist: using checkpoints/checkpoint_5000.pt"
    assert note in capsys.readouterr().err.splitlines()
    monkeypatch.setattr(sys, "argv", ["generate.py", "--checkpoint", "checkpoint_500.pt", "--device", "cpu"])
    assert run_command(generate.main) == 2
    assert "did you mean checkpoint_5000.pt? checkpoints holds" in capsys.readouterr().err


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
def test_generate_on_any_terminal(here, redirected, status, shown, errors):
    """Each can show ASCII only."""
    flags = "--checkpoint good.pt --tokenizer data/tokenizer.json --max_new_tokens 2 --device cpu"
    run = subprocess.run(
        ["bash", "-c", f"{sys.executable} {ROOT / 'generate.py'} {flags} {redirected}"],
        env=os.environ | {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
        capture_output=True, text=True, timeout=HANG, check=False,
    )  # fmt: skip
    assert run.returncode == status, run.stderr
    assert shown in run.stdout
    assert "Traceback" not in run.stderr
    assert run.stderr.count("error:") == errors


def command(script, *arguments):
    run = subprocess.run(
        [sys.executable, ROOT / script, *arguments], capture_output=True, text=True, timeout=HANG, check=False
    )
    assert run.returncode == 2, run.stderr
    assert run.stdout == ""
    return run.stderr.splitlines()


def test_an_error_in_a_worker_process_is_one_line_too(here):
    save(np.full_like(ROWS, 384))
    before = snapshot(here)
    lines = command("train.py", *TRAIN, "--num_workers", "2")
    assert_error(lines, f"{SHARD}: row", "token id 384", announced=True)
    assert snapshot(here) == before


def test_the_generate_command(here, trap):
    Path("bad.pt").write_bytes(archived_pickle(b"", trap))
    assert_error(command("generate.py", "--checkpoint", "bad.pt", "--prompt", "word1"), "bad.pt", "unsafe")
    assert not Path(trap.path).exists()
