"""Damaged and hostile files: a reader gives what was written or raises InputError, in bounded time and memory.

Case n of a test is made by default_rng(n), so that a failure, which names n, can be made again. FUZZ_CASES sets how
many there are in all.
"""

import base64
import copy
import functools
import io
import json
import operator
import os
import pickle
import random
import shutil
import signal
import zipfile
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer

from acceleron import Acceleron, ModelConfig
from acceleron.config import LIMITS
from acceleron.data import Loader, Shards, validation_batches
from acceleron.data.tokenizer import load_tokenizer, token_bytes, train_tokenizer
from acceleron.errors import InputError
from acceleron.generation import load_model
from acceleron.training import TrainOptions
from acceleron.training.checkpoint import FORMAT, load_checkpoint
from acceleron.training.loop import _warn_of_changes
from acceleron.training.run import Run
from acceleron.training.saver import Saver

resource = pytest.importorskip("resource")

CASES = int(os.environ.get("FUZZ_CASES", 2400))
SHARES = {"archives": 0.3, "checkpoints": 0.15, "configs": 0.15, "tokenizers": 0.2, "shards": 0.2}
SECONDS, BYTES = 10, 1 << 30  # a case may take
VOCAB_SIZE, ROW_LENGTH = 64, 32
TEXT = "word1 word2, Słowo 数据 🙂\n<|endoftext|>  aaaaaaaa"
CONFIG = ModelConfig(
    vocab_size=VOCAB_SIZE, d_model=16, num_layers=2, num_heads=2, num_kv_heads=1, num_experts=2, d_ff=16, d_ff_shared=16
)


# Of bytes.


def flip_bits(rng, content: bytes) -> bytes:
    damaged = np.frombuffer(content, dtype=np.uint8).copy()
    damaged[rng.integers(len(damaged), size=rng.integers(1, 4))] ^= np.uint8(1 << rng.integers(8))
    return damaged.tobytes()


def flip_bits_at_the_ends(rng, content: bytes) -> bytes:
    """Where headers and directories are."""
    size = min(300, len(content) // 2)
    if rng.integers(2):
        return flip_bits(rng, content[:size]) + content[size:]
    return content[:-size] + flip_bits(rng, content[-size:])


def truncate(rng, content: bytes) -> bytes:
    return content[: rng.integers(len(content))]


def splice(rng, content: bytes) -> bytes:
    """Random or repeated bytes come in, or in the place of others."""
    at, size = rng.integers(len(content)), rng.integers(1, 100)
    inserted = [rng.bytes(size), content[at : at + 1] * size, content[at : at + size] * 2][rng.integers(3)]
    return content[:at] + inserted + content[at + rng.integers(2) * size :]


def zero_block(rng, content: bytes) -> bytes:
    at, size = rng.integers(len(content)), rng.integers(1, 5000)
    return content[:at] + bytes(len(content[at : at + size])) + content[at + size :]


def swap_blocks(rng, content: bytes) -> bytes:
    a, b, c, d = sorted(rng.integers(len(content) + 1, size=4))
    return content[:a] + content[c:d] + content[b:c] + content[a:b] + content[d:]


DAMAGE = [flip_bits, flip_bits_at_the_ends, truncate, splice, zero_block, swap_blocks]


# Of nested dicts and lists.


def nested(depth: int) -> list:
    return [nested(depth - 1)] if depth else []


def doubled(depth: int) -> list:
    """Of few objects, and 2^depth to one who walks it without care."""
    value = [1]
    for _ in range(depth):
        value = [value, value]
    return value


NUMBERS = [-1, 0, 1, 623, 2**24, 2**31, 2**32 - 1, 2**32, 2**63 - 1, 2**63, 2**64, 10**400, 1e308, 1e-308, -1.5]
NUMBERS += [float("inf"), float("nan")]
OTHERS = [None, True, "", "x" * 2000, "\0", "\ud800", "../../etc/passwd", [], {}, {"type": "Precompiled"}, nested(100)]
TENSORS = [torch.zeros(()), torch.zeros(3, dtype=torch.float64), torch.zeros(1).expand(10**10), torch.zeros(0, 2**40)]
TENSORS += [torch.full((4, 4), torch.nan), torch.zeros(5, dtype=torch.uint8), torch.zeros(2, 2).to_sparse()]


def choose(rng, container) -> tuple:
    """(container, key) of something within, as likely near the top as far below, where most values are."""
    while True:
        keys = list(container) if isinstance(container, dict) else range(len(container))
        if not keys:
            return container, None
        key = keys[rng.integers(len(keys))]
        if not isinstance(container[key], (dict, list)) or rng.random() < 0.3:
            return container, key
        container = container[key]


def damage_values(rng, values, absurd: list):
    """Replaces, removes, moves or adds an item or two."""
    for _ in range(rng.integers(1, 3)):
        container, key = choose(rng, values)
        other, other_key = choose(rng, values)
        value = absurd[rng.integers(len(absurd))]
        match rng.integers(6) if key is not None else -1:
            case -1:
                pass
            case 0:
                del container[key]
            case 1 if isinstance(container, dict):
                container["unknown"] = value
            case 2 if other_key is not None:
                container[key] = copy.deepcopy(other[other_key])
            case 3 if type(container[key]) in (int, float):
                container[key] = NUMBERS[rng.integers(len(NUMBERS))]
            case _:
                container[key] = value
    return values


@contextmanager
def limits(case: str):
    """Too much memory is a MemoryError within, too much time a failure."""

    def too_slow(*_):
        pytest.fail(f"{case}: above {SECONDS} s")

    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    before = resource.getrlimit(resource.RLIMIT_AS)
    handler = signal.signal(signal.SIGALRM, too_slow)
    resource.setrlimit(resource.RLIMIT_AS, (used + BYTES, before[1]))
    signal.alarm(SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        resource.setrlimit(resource.RLIMIT_AS, before)
        signal.signal(signal.SIGALRM, handler)


def fuzz(name: str, mutators: list, read):
    """`read(mutate, rng)` for each case; of the cases at least a third must be refused."""
    cases = round(CASES * SHARES[name])
    refused = 0
    for seed in range(cases):
        mutate = mutators[seed % len(mutators)]
        case = f"{name}: {mutate.__name__}, seed {seed}"
        try:
            with limits(case):
                read(mutate, np.random.default_rng(seed))
        except InputError as error:
            if not str(error).isprintable():
                pytest.fail(f"{case}: {error!r} is not one line")
            refused += 1
        except (Exception, pytest.fail.Exception) as error:
            raise AssertionError(f"{case}: {type(error).__name__}: {error}") from error
        except BaseException as error:
            if type(error).__name__ == "PanicException":  # Rust's
                raise AssertionError(f"{case}: {error}") from error
            raise
    assert refused >= cases / 3


def test_enough_cases():
    assert sum(SHARES.values()) == pytest.approx(1)
    assert "FUZZ_CASES" in os.environ or CASES >= 2000


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    directory = tmp_path_factory.mktemp("data")
    np.save(directory / "shard_00000.npy", np.arange(40 * ROW_LENGTH, dtype=np.int32).reshape(40, -1) % VOCAB_SIZE)
    options = TrainOptions(data_dir=str(directory), batch_size=2, seq_len=ROW_LENGTH, num_workers=1)
    run = Run(options, CONFIG, Shards(directory), torch.device("cpu"), torch.float32)
    yield run
    run.loader.close()


@pytest.fixture(scope="module")
def original(run, tmp_path_factory) -> Path:
    """A checkpoint as train.py writes it, of step 2."""
    directory = tmp_path_factory.mktemp("original")
    for _ in range(2):
        run.step(1e-3)
    run.judgements()
    contents = {"format": FORMAT, "config": CONFIG.to_dict(), "options": asdict(run.options), "environment": {"a": "b"}}
    saver = Saver(directory)
    saver.save(contents | run.state_dict())
    saver.wait()
    assert saver.outcome().error is None
    return directory / "checkpoint_2.pt"


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    """The model is too small for more, which would wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def _random_states():
    """As they were, also if a damaged checkpoint's come into force."""
    states = torch.get_rng_state(), np.random.get_state(), random.getstate()
    yield
    torch.set_rng_state(states[0])
    np.random.set_state(states[1])
    random.setstate(states[2])


def same(value, other) -> bool:
    if type(value) is not type(other):
        return False
    if isinstance(value, torch.Tensor):
        return value.dtype == other.dtype and value.numpy().tobytes() == other.numpy().tobytes()
    if isinstance(value, dict):
        return list(value) == list(other) and all(same(value[key], other[key]) for key in value)
    if isinstance(value, (list, tuple)):
        return len(value) == len(other) and all(map(same, value, other))
    return value == other


def use(run: Run, path: Path):
    """What train.py and generate.py do with a checkpoint."""
    contents = load_checkpoint(path)
    load_model(contents, path, torch.device("cpu"), torch.float32)
    run.batches = []
    run.load_state_dict(contents, path)
    _warn_of_changes(run.options, {"torch": "2"}, contents)
    assert 0 <= run.steps < 2**62
    assert 0 <= np.random.get_state()[2] <= 624  # beyond it numpy reads what isn't its own
    run.step(1e-3)


def test_damaged_archives(original, tmp_path):
    """Only what no reader looks at may be damaged unseen: then the contents are those of the original, to the bit."""
    content, expected, path = original.read_bytes(), load_checkpoint(original), tmp_path / "bad.pt"

    def read(mutate, rng):
        path.write_bytes(mutate(rng, content))
        assert same(load_checkpoint(path), expected)

    fuzz("archives", DAMAGE, read)


def rewritten(original: Path, path: Path, change, **kwargs):
    """The archive with the records (name, content) that `change` makes of each; their checksums fit."""
    with zipfile.ZipFile(original) as archive, zipfile.ZipFile(path, "w", **kwargs) as output:
        for record in archive.infolist():
            for name, content in change(record.filename, archive.read(record)):
                output.writestr(name, content)


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_checkpoints_with_valid_checksums(run, original, tmp_path):
    path = tmp_path / "bad.pt"
    everything = torch.load(original, weights_only=True)

    def absurd_values(rng):
        torch.save(damage_values(rng, copy.deepcopy(everything), NUMBERS + OTHERS + TENSORS + [doubled(40)]), path)

    def damaged_pickle(rng):
        damage = DAMAGE[rng.integers(len(DAMAGE))]
        rewritten(original, path, lambda name, c: [(name, damage(rng, c) if name.endswith("data.pkl") else c)])

    def records_mixed_up(rng):
        with zipfile.ZipFile(original) as archive:
            names = archive.namelist()
        chosen, other = rng.choice(names, 2, replace=False)
        changes = [[], [(other, b"x")], [(chosen, b"")], [(chosen, b"1"), (chosen, b"2")], [(chosen.upper(), b"3")]]
        change = changes[rng.integers(len(changes))]
        rewritten(original, path, lambda name, content: change if name == chosen else [(name, content)])

    def read(mutate, rng):
        mutate(rng)
        use(run, path)

    fuzz("checkpoints", [absurd_values, damaged_pickle, records_mixed_up], read)


def test_the_original_is_usable(run, original):
    """Else a reader that refuses everything would pass."""
    use(run, original)
    assert run.steps == 3


@pytest.mark.parametrize(
    ("keys", "value"),
    [
        (["format"], torch.zeros(2)),
        (["step"], -1),
        (["tokens"], 2**62),
        (["options", "lr"], torch.zeros(2)),
        (["environment"], {"torch": doubled(40)}),
        (["config", "d_model"], 2**40),
        (["config", "num_layers"], doubled(40)),
        (["data", "position"], 2**63),
        (["data", "shards", 0, 0], "../shard_00000.npy"),
        (["statistics", "unread_steps"], 10**400),
        (["statistics", "counts"], torch.zeros(1, dtype=torch.int64).expand(10**10)),
        (["optimizer", "state", 0, "exp_avg"], torch.zeros(())),
        (["model", "embedding"], torch.zeros(VOCAB_SIZE, 16, dtype=torch.float64)),
        (["rng", "torch"], torch.zeros(3)),
        (["rng", "numpy"], []),
        (["rng", "numpy", 2], 10**5),
        (["rng", "python"], [3, [2**40], None]),
    ],
)
def test_absurd_values_in_a_checkpoint(run, original, tmp_path, keys, value):
    contents = torch.load(original, weights_only=True)
    *path, last = keys
    functools.reduce(operator.getitem, path, contents)[last] = value
    torch.save(contents, tmp_path / "bad.pt")
    with limits(str(keys)), pytest.raises(InputError):
        use(run, tmp_path / "bad.pt")


# Instead of the whole pickle: what takes much memory, or runs code, by each of the opcodes that can.
COMMAND = b"X\x0c\x00\x00\x00touch sprung"
CODE = {
    "GLOBAL and REDUCE": b"cposix\nsystem\n" + COMMAND + b"\x85R.",
    "INST": b"(" + COMMAND + b"iposix\nsystem\n.",
    "OBJ": b"(cposix\nsystem\n" + COMMAND + b"o.",
    "NEWOBJ": b"csubprocess\nPopen\n" + COMMAND + b"\x85\x81.",
    "STACK_GLOBAL": b"\x8c\x05posix\x8c\x06system\x93" + COMMAND + b"\x85R.",
    "BUILD": b"cposix\nsystem\n}X\x08\x00\x00\x00__dict__" + COMMAND + b"sb.",
    "BUILD of an OrderedDict": b"ccollections\nOrderedDict\n)R}X\x0a\x00\x00\x00__reduce__cposix\nsystem\nsb.",
    "nested": b"](cos.path\ngenericpath.os.system\n" + COMMAND + b"\x85Re.",
}


@pytest.mark.parametrize("case", CODE)
def test_a_pickle_that_would_run_code_is_refused_by_name(original, tmp_path, monkeypatch, case):
    monkeypatch.chdir(tmp_path)
    rewritten(
        original, tmp_path / "bad.pt", lambda name, c: [(name, c.__class__(CODE[case]) if "data.pkl" in name else c)]
    )
    with pytest.raises(
        InputError, match=r"bad\.pt: refused: .*would run .*(posix\.system|subprocess\.Popen|os\.system)"
    ):
        load_checkpoint(tmp_path / "bad.pt")
    assert not (tmp_path / "sprung").exists()


def test_the_code_would_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for case in ("GLOBAL and REDUCE", "INST", "OBJ", "STACK_GLOBAL"):
        pickle.loads(b"\x80\x04" + CODE[case])
        (tmp_path / "sprung").unlink()


MEMORY = {
    "bytearray": b"cbuiltins\nbytearray\n\x8a\x06\x00\x00\x00\x00\x00\x01\x85R.",
    "FloatTensor": b"ctorch\nFloatTensor\n\x8a\x06\x00\x00\x00\x00\x00\x01\x85R.",
    "frame": b"\x80\x04\x95\xff\xff\xff\xff\xff\xff\xff\x7f.",
    "bytes": b"\x8e\x00\x00\x00\x00\x00\x01\x00\x00.",
    "int": b"\x8b\xff\xff\xff\x7f.",
    "nesting": b"(" * 10**5 + b"t" * 10**5 + b".",
    "itself": b"]q\x00h\x00a.",
}


@pytest.mark.parametrize("case", MEMORY)
def test_pickles_that_take_memory(original, tmp_path, case):
    rewritten(original, tmp_path / "bad.pt", lambda name, c: [(name, MEMORY[case] if "data.pkl" in name else c)])
    with limits(case), pytest.raises(InputError, match=r"bad\.pt"):
        load_checkpoint(tmp_path / "bad.pt")


@pytest.mark.parametrize("level", [0, 9])
def test_compressed_records(original, tmp_path, level):
    """A bomb; and what torch would take for weights as it is, compressed."""

    def change(name, content):
        return [(name, bytes(1 << 28) if level and name.endswith("data/0") else content)]

    rewritten(original, tmp_path / "bad.pt", change, compression=zipfile.ZIP_DEFLATED, compresslevel=level)
    assert (tmp_path / "bad.pt").stat().st_size < 1 << 20
    with limits("bomb"), pytest.raises(InputError, match=r"bad\.pt: not written by torch\.save"):
        load_checkpoint(tmp_path / "bad.pt")


@pytest.mark.parametrize("extra", [torch.zeros(1).expand(10**10), [torch.zeros(10**5)] * 100])
def test_tensors_larger_than_the_file(original, tmp_path, extra):
    torch.save(torch.load(original, weights_only=True) | {"extra": extra}, tmp_path / "bad.pt")
    with pytest.raises(InputError, match=r"bad\.pt: its tensors are larger than the file"):
        load_checkpoint(tmp_path / "bad.pt")


def test_configs():
    def absurd(rng):
        return damage_values(rng, CONFIG.to_dict(), NUMBERS + OTHERS + [doubled(40)])

    def read(mutate, rng):
        config = ModelConfig.from_dict(mutate(rng))
        assert all(0 <= getattr(config, name) <= limit for name, limit in LIMITS.items())
        with torch.device("meta"):
            Acceleron(config)

    fuzz("configs", [absurd], read)


TRAINED = json.loads(train_tokenizer([" ".join(f"word{number}" for number in range(200))], 300).to_str())
PADDING = {"strategy": {"Fixed": 9}, "direction": "Right", "pad_to_multiple_of": 8, "pad_id": 1, "pad_type_id": 0}
PADDING["pad_token"] = "<|pad|>"
REPLACE = {"type": "Replace", "pattern": {"String": "a"}, "content": "b"}


def charsmap(content: bytes) -> dict:
    return {"type": "Precompiled", "precompiled_charsmap": base64.b64encode(content).decode()}


def with_model(**changes) -> dict:
    return TRAINED | {"model": TRAINED["model"] | changes}


def with_id(token_id: int) -> dict:
    return with_model(vocab=TRAINED["model"]["vocab"] | {"word": token_id})


def with_token(content: str) -> dict:
    return TRAINED | {"added_tokens": [*TRAINED["added_tokens"], TRAINED["added_tokens"][0] | {"content": content}]}


# Some end the process once the library has them.
HOSTILE_TOKENIZERS = {
    "id 2**24": (with_id(2**24), "token id 16777216"),
    "id 2**32 - 1": (with_id(2**32 - 1), "token id 4294967295"),
    "id 2**32": (with_id(2**32), "4294967296"),
    "prefix": (with_model(continuing_subword_prefix="#" * 50), "continuing_subword_prefix"),
    "charsmap": (TRAINED | {"normalizer": charsmap(b"\xff\xff\xff\xff")}, "Precompiled"),
    "untyped charsmap": (TRAINED | {"normalizer": {"precompiled_charsmap": "/////w=="}}, "None"),
    "chunks of 0": (TRAINED | {"pre_tokenizer": {"type": "FixedLength", "length": 0}}, "FixedLength"),
    "strip": (TRAINED | {"decoder": {"type": "Strip", "content": "a", "start": 0, "stop": 2**63}}, "Strip"),
    "longer": (TRAINED | {"normalizer": REPLACE | {"content": "aaaaaaaa"}}, "Replace"),
    "pattern": (TRAINED | {"normalizer": REPLACE | {"pattern": {"Regex": ""}}}, "Replace"),
    "sequence": (TRAINED | {"normalizer": {"type": "Sequence", "normalizers": [{"type": "ByteLevel"}] * 40}}, "16"),
    "long token": (with_token("x" * 10**6), "too long"),
    "long tokens": (TRAINED | {"model": {"type": "Unigram", "vocab": [["x" * 900, 0]] * 5000}}, "too long"),
    "twice": (json.dumps(TRAINED).replace('"vocab"', '"vocab": {}, "vocab"'), "twice"),
    "nested": ("[" * 10**6, "recursion"),
    "not UTF-8": (json.dumps(TRAINED).encode().replace(b"word", b"w\xffrd"), "utf-8"),
    "half a pair": (json.dumps(TRAINED).replace("word", "\\ud800"), "hex escape"),
    "digits": (json.dumps(TRAINED).replace("299", "9" * 5000), "digits"),
    "large": (b" " * ((64 << 20) + 1), "64 MiB"),
}


@pytest.mark.parametrize("case", HOSTILE_TOKENIZERS)
def test_hostile_tokenizers(tmp_path, case):
    document, culprit = HOSTILE_TOKENIZERS[case]
    text = json.dumps(document) if isinstance(document, dict) else document
    path = tmp_path / "tokenizer.json"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with limits(case), pytest.raises(InputError) as raised:
        load_tokenizer(path)
    assert str(raised.value).startswith(f"{path}: ")
    assert culprit in str(raised.value)


def test_absurd_padding_and_truncation_are_left_out(tmp_path):
    path = tmp_path / "tokenizer.json"
    truncation = {"direction": "Right", "max_length": 2**64 - 1, "strategy": "LongestFirst", "stride": 2**64 - 1}
    padding = PADDING | {"strategy": {"Fixed": 2**40}, "pad_to_multiple_of": 0}
    path.write_text(json.dumps(TRAINED | {"truncation": truncation, "padding": padding}))
    with limits("padding"):
        assert load_tokenizer(path).encode("word1").ids == Tokenizer.from_str(json.dumps(TRAINED)).encode("word1").ids


def test_a_panic_of_the_library_is_an_error_too(tmp_path):
    path = tmp_path / "tokenizer.json"
    template = {"type": "TemplateProcessing", "pair": [], "special_tokens": {}}
    template["single"] = [{"Sequence": {"id": "B", "type_id": 1}}]  # of a text that is none of a pair
    path.write_text(json.dumps(TRAINED | {"post_processor": template}))
    with pytest.raises(InputError, match=r"tokenizer\.json: not a usable file .*out of bounds"):
        load_tokenizer(path)


def test_tokenizers(tmp_path):
    parts = {
        "normalizer": [{"type": "NFC"}, REPLACE],
        "pre_tokenizer": [TRAINED["pre_tokenizer"], {"type": "Digits", "individual_digits": True}],
        "decoder": [TRAINED["decoder"], {"type": "Strip", "content": " ", "start": 1, "stop": 0}],
    }
    children = {"normalizer": "normalizers", "pre_tokenizer": "pretokenizers", "decoder": "decoders"}
    document = TRAINED | {place: {"type": "Sequence", children[place]: items} for place, items in parts.items()}
    document["truncation"] = {"direction": "Right", "max_length": 9, "strategy": "LongestFirst", "stride": 0}
    document["padding"] = PADDING
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(document))
    load_tokenizer(path)  # so that there is something to damage
    kinds = ["Sequence", "Precompiled", "FixedLength", "Strip", "CTC", "ByteLevel", "WordPiece", "Unigram", "WordLevel"]

    def damaged_text(rng, content):
        return DAMAGE[rng.integers(len(DAMAGE))](rng, content)

    def absurd_values(rng, content):
        damaged = damage_values(rng, json.loads(content), [*NUMBERS, *OTHERS, *kinds])
        return json.dumps(damaged).encode()

    def repeated_text(rng, content):
        """A stretch between two commas comes again: keys, tokens and merges double."""
        pieces = content.split(b",")
        at, size = rng.integers(len(pieces)), rng.integers(1, 5)
        return b",".join(pieces[: at + size] + pieces[at:])

    content = path.read_bytes()

    def read(mutate, rng):
        path.write_bytes(mutate(rng, content))
        tokenizer = load_tokenizer(path)
        assert max(tokenizer.get_vocab().values()) < LIMITS["vocab_size"]
        assert (token_bytes(tokenizer, 512) >= 0).all()
        ids = tokenizer.encode(TEXT, add_special_tokens=False).ids
        assert len(ids) < 200
        tokenizer.decode(ids)

    fuzz("tokenizers", [damaged_text, absurd_values, repeated_text], read)


def test_shards(tmp_path):
    buffer = io.BytesIO()
    rows = np.arange(20 * ROW_LENGTH, dtype=np.int32).reshape(20, -1) % VOCAB_SIZE
    np.save(buffer, rows)
    content = buffer.getvalue()
    np.save(tmp_path / "shard_00000.npy", rows)
    known = Shards(tmp_path).fingerprint()
    shutil.copy(tmp_path / "shard_00000.npy", tmp_path / "shard_00001.npy")

    def damaged_header(rng, content):
        return flip_bits(rng, content[:128]) + content[128:]

    def absurd_shape(rng, content):
        sizes = [-1, 0, 1, 3, 20, 32, 2**31, 2**62, 2**63, 10**30]
        shape = f"({sizes[rng.integers(len(sizes))]}, {sizes[rng.integers(len(sizes))]}), }}"
        return content.replace(b"(20, 32), }", shape.encode().ljust(11)[:60], 1)

    def another_dtype(rng, content):
        dtypes = [b"|i1", b"<i2", b"<u8", b">i4", b"<f4", b"|O", b"|V4", b"<U1", b"<M8", b"|S0", b"<c8"]
        return content.replace(b"<i4", dtypes[rng.integers(len(dtypes))], 1)

    def read(mutate, rng):
        (tmp_path / "shard_00000.npy").write_bytes(mutate(rng, content))
        bad_data = ("fail", "skip")[rng.integers(2)]
        entries = damage_values(rng, [*copy.deepcopy(known), ["shard_00001.npy", 20, 32, 0]], NUMBERS + OTHERS)
        shards = Shards(tmp_path, entries if rng.integers(4) == 0 else None)
        settings = dict(seq_len=16, batch_size=3, vocab_size=VOCAB_SIZE, bad_data=bad_data)
        loader = Loader(shards, seed=0, **settings)
        batches = [next(loader) for _ in range(3)]
        for batch in [*batches, *validation_batches(shards, **settings)]:
            assert batch.dtype == torch.int64
            assert 1 <= len(batch) <= 3
            assert batch.shape[1] == 16
            assert 0 <= batch.min() <= batch.max() < VOCAB_SIZE

    fuzz("shards", [*DAMAGE, damaged_header, absurd_shape, another_dtype], read)
