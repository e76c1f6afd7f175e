"""Damaged and hostile files: readers return the original data or raise InputError, in bounded time and memory.

Case n uses default_rng(n). A failure reports n, so it can be reproduced. FUZZ_CASES sets the total number of cases.
"""

import copy
import io
import json
import os
import shutil
import zipfile

import numpy as np
import pytest
import torch
from hostile_files import (
    CONFIG,
    PADDING,
    REPLACE,
    ROW_LENGTH,
    TOKENIZER,
    VOCAB_SIZE,
    exponential_list,
    limits,
    rewrite,
    use_checkpoint,
)

from acceleron import Acceleron, ModelConfig
from acceleron.checkpoint import load_checkpoint
from acceleron.config import LIMITS
from acceleron.data import Loader, Shards
from acceleron.data.tokenizer import ByteCounter, load_tokenizer
from acceleron.errors import InputError

NUM_CASES = int(os.environ.get("FUZZ_CASES", 2400))
SHARES = {"archives": 0.3, "checkpoints": 0.15, "configs": 0.15, "tokenizers": 0.2, "shards": 0.2}
TEXT = "word1 word2, Słowo 数据 🙂\n<|endoftext|>  aaaaaaaa"

# Byte mutators


def flip_bits(rng, content: bytes) -> bytes:
    damaged = np.frombuffer(content, dtype=np.uint8).copy()
    damaged[rng.integers(len(damaged), size=rng.integers(1, 4))] ^= np.uint8(1 << rng.integers(8))
    return damaged.tobytes()


def flip_bits_near_the_ends(rng, content: bytes) -> bytes:
    """Damage headers and directories."""
    size = min(300, len(content) // 2)
    if rng.integers(2):
        return flip_bits(rng, content[:size]) + content[size:]
    return content[:-size] + flip_bits(rng, content[-size:])


def truncate(rng, content: bytes) -> bytes:
    return content[: rng.integers(len(content))]


def splice(rng, content: bytes) -> bytes:
    """Insert random or repeated bytes, or overwrite existing bytes with them."""
    at, size = rng.integers(len(content)), rng.integers(1, 100)
    inserted = [rng.bytes(size), content[at : at + 1] * size, content[at : at + size] * 2][rng.integers(3)]
    return content[:at] + inserted + content[at + rng.integers(2) * size :]


def zero_block(rng, content: bytes) -> bytes:
    at, size = rng.integers(len(content)), rng.integers(1, 5000)
    return content[:at] + bytes(len(content[at : at + size])) + content[at + size :]


def swap_blocks(rng, content: bytes) -> bytes:
    a, b, c, d = sorted(rng.integers(len(content) + 1, size=4))
    return content[:a] + content[c:d] + content[b:c] + content[a:b] + content[d:]


BYTE_MUTATORS = [flip_bits, flip_bits_near_the_ends, truncate, splice, zero_block, swap_blocks]


# Mutators of nested dicts and lists


def deep(depth: int) -> list:
    return [deep(depth - 1)] if depth else []


NUMBERS = [-1, 0, 1, 623, 2**24, 2**31, 2**32 - 1, 2**32, 2**63 - 1, 2**63, 2**64, 10**400, 1e308, 1e-308, -1.5]
NUMBERS += [float("inf"), float("nan")]
VALUES = [None, True, "", "x" * 2000, "\0", "\ud800", "../../etc/passwd", [], {}, {"type": "Precompiled"}, deep(100)]
TENSORS = [torch.zeros(()), torch.zeros(3, dtype=torch.float64), torch.zeros(1).expand(10**10), torch.zeros(0, 2**40)]
TENSORS += [torch.full((4, 4), torch.nan), torch.zeros(5, dtype=torch.uint8), torch.zeros(2, 2).to_sparse()]


def choose(rng, container) -> tuple:
    """Return a random (container, key). The few values near the top are as likely as the many deep ones."""
    while True:
        keys = list(container) if isinstance(container, dict) else range(len(container))
        if not keys:
            return container, None
        key = keys[rng.integers(len(keys))]
        if not isinstance(container[key], (dict, list)) or rng.random() < 0.3:
            return container, key
        container = container[key]


def damage_values(rng, values, replacements: list):
    """Replace, remove, copy or add one or two items."""
    for _ in range(rng.integers(1, 3)):
        container, key = choose(rng, values)
        other, other_key = choose(rng, values)
        value = replacements[rng.integers(len(replacements))]
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


def fuzz(name: str, mutators: list, read):
    """Call `read(mutate, rng)` for each case. At least a third of the cases must raise InputError."""
    cases = round(NUM_CASES * SHARES[name])
    rejected = 0
    for seed in range(cases):
        mutate = mutators[seed % len(mutators)]
        case = f"{name}: {mutate.__name__}, seed {seed}"
        try:
            with limits(case):
                read(mutate, np.random.default_rng(seed))
        except InputError as error:
            if not str(error).isprintable():
                pytest.fail(f"{case}: {error!r} is not one line")
            rejected += 1
        except (Exception, pytest.fail.Exception) as error:
            raise AssertionError(f"{case}: {type(error).__name__}: {error}") from error
        except BaseException as error:
            if type(error).__name__ == "PanicException":  # from Rust
                raise AssertionError(f"{case}: {error}") from error
            raise
    assert rejected >= cases / 3


def test_default_number_of_cases():
    assert sum(SHARES.values()) == pytest.approx(1)
    assert "FUZZ_CASES" in os.environ or NUM_CASES >= 2000


def equal(value, other) -> bool:
    if type(value) is not type(other):
        return False
    if isinstance(value, torch.Tensor):
        return value.dtype == other.dtype and value.numpy().tobytes() == other.numpy().tobytes()
    if isinstance(value, dict):
        return list(value) == list(other) and all(equal(value[key], other[key]) for key in value)
    if isinstance(value, (list, tuple)):
        return len(value) == len(other) and all(map(equal, value, other))
    return value == other


def test_damaged_archives_are_detected(small_checkpoint, tmp_path):
    """Undetected damage is allowed only if the loaded contents are bitwise equal to the original."""
    content, expected = small_checkpoint.read_bytes(), load_checkpoint(small_checkpoint)
    path = tmp_path / "bad.pt"

    def read(mutate, rng):
        path.write_bytes(mutate(rng, content))
        assert equal(load_checkpoint(path), expected)

    fuzz("archives", BYTE_MUTATORS, read)


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_hostile_checkpoints_with_valid_checksums(small_run, small_checkpoint, tmp_path):
    path = tmp_path / "bad.pt"
    valid = torch.load(small_checkpoint, weights_only=True)

    def extreme_values(rng):
        torch.save(damage_values(rng, copy.deepcopy(valid), NUMBERS + VALUES + TENSORS + [exponential_list(40)]), path)

    def damaged_pickle(rng):
        damage = BYTE_MUTATORS[rng.integers(len(BYTE_MUTATORS))]
        rewrite(small_checkpoint, path, lambda name, c: [(name, damage(rng, c) if name.endswith("data.pkl") else c)])

    def mixed_up_records(rng):
        with zipfile.ZipFile(small_checkpoint) as archive:
            names = archive.namelist()
        chosen, other = rng.choice(names, 2, replace=False)
        changes = [[], [(other, b"x")], [(chosen, b"")], [(chosen, b"1"), (chosen, b"2")], [(chosen.upper(), b"3")]]
        change = changes[rng.integers(len(changes))]
        rewrite(small_checkpoint, path, lambda name, content: change if name == chosen else [(name, content)])

    def read(mutate, rng):
        mutate(rng)
        use_checkpoint(small_run, path)

    fuzz("checkpoints", [extreme_values, damaged_pickle, mixed_up_records], read)


def test_damaged_configs():
    def extreme_values(rng):
        return damage_values(rng, CONFIG.to_dict(), NUMBERS + VALUES + [exponential_list(40)])

    def read(mutate, rng):
        config = ModelConfig.from_dict(mutate(rng))
        assert all(0 <= getattr(config, name) <= limit for name, limit in LIMITS.items())
        with torch.device("meta"):
            Acceleron(config)

    fuzz("configs", [extreme_values], read)


def test_damaged_tokenizers(tmp_path):
    parts = {
        "normalizer": [{"type": "NFC"}, REPLACE],
        "pre_tokenizer": [TOKENIZER["pre_tokenizer"], {"type": "Digits", "individual_digits": True}],
        "decoder": [TOKENIZER["decoder"], {"type": "Strip", "content": " ", "start": 1, "stop": 0}],
    }
    children = {"normalizer": "normalizers", "pre_tokenizer": "pretokenizers", "decoder": "decoders"}
    document = TOKENIZER | {place: {"type": "Sequence", children[place]: items} for place, items in parts.items()}
    document["truncation"] = {"direction": "Right", "max_length": 9, "strategy": "LongestFirst", "stride": 0}
    document["padding"] = PADDING
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(document))
    load_tokenizer(path)  # the undamaged file is valid
    kinds = ["Sequence", "Precompiled", "FixedLength", "Strip", "CTC", "ByteLevel", "WordPiece", "Unigram", "WordLevel"]

    def damaged_text(rng, content):
        return BYTE_MUTATORS[rng.integers(len(BYTE_MUTATORS))](rng, content)

    def extreme_values(rng, content):
        damaged = damage_values(rng, json.loads(content), [*NUMBERS, *VALUES, *kinds])
        return json.dumps(damaged).encode()

    def repeat_text(rng, content):
        """Repeat the text between two commas, which duplicates keys, tokens and merges."""
        pieces = content.split(b",")
        at, size = rng.integers(len(pieces)), rng.integers(1, 5)
        return b",".join(pieces[: at + size] + pieces[at:])

    content = path.read_bytes()

    def read(mutate, rng):
        path.write_bytes(mutate(rng, content))
        tokenizer = load_tokenizer(path)
        assert max(tokenizer.get_vocab().values()) < LIMITS["vocab_size"]
        assert (ByteCounter(tokenizer, 512).table >= 0).all()
        ids = tokenizer.encode(TEXT, add_special_tokens=False).ids
        assert len(ids) < 200
        tokenizer.decode(ids)

    fuzz("tokenizers", [damaged_text, extreme_values, repeat_text], read)


def test_damaged_shards(tmp_path):
    buffer = io.BytesIO()
    rows = np.arange(20 * ROW_LENGTH, dtype=np.int32).reshape(20, -1) % VOCAB_SIZE
    np.save(buffer, rows)
    content = buffer.getvalue()
    np.save(tmp_path / "shard_00000.npy", rows)
    known = Shards(tmp_path).fingerprint()
    shutil.copy(tmp_path / "shard_00000.npy", tmp_path / "shard_00001.npy")

    def damaged_header(rng, content):
        return flip_bits(rng, content[:128]) + content[128:]

    def extreme_shape(rng, content):
        sizes = [-1, 0, 1, 3, 20, 32, 2**31, 2**62, 2**63, 10**30]
        shape = f"({sizes[rng.integers(len(sizes))]}, {sizes[rng.integers(len(sizes))]}), }}"
        return content.replace(b"(20, 32), }", shape.encode().ljust(11)[:60], 1)

    def other_dtype(rng, content):
        dtypes = [b"|i1", b"<i2", b"<u8", b">i4", b"<f4", b"|O", b"|V4", b"<U1", b"<M8", b"|S0", b"<c8"]
        return content.replace(b"<i4", dtypes[rng.integers(len(dtypes))], 1)

    def read(mutate, rng):
        (tmp_path / "shard_00000.npy").write_bytes(mutate(rng, content))
        bad_data = ("fail", "skip")[rng.integers(2)]
        entries = damage_values(rng, [*copy.deepcopy(known), ["shard_00001.npy", 20, 32, 0]], NUMBERS + VALUES)
        shards = Shards(tmp_path, entries if rng.integers(4) == 0 else None)
        loader = Loader(shards, seed=0, seq_len=16, batch_size=3, vocab_size=VOCAB_SIZE, bad_data=bad_data)
        batches = [next(loader) for _ in range(3)]
        for batch in [*batches, *loader.held_out()]:
            assert batch.dtype == torch.int64
            assert 1 <= len(batch) <= 3
            assert batch.shape[1] == 16
            assert 0 <= batch.min() <= batch.max() < VOCAB_SIZE

    fuzz("shards", [*BYTE_MUTATORS, damaged_header, extreme_shape, other_dtype], read)
