"""Bad model directories and failed exports: one line that names the file, and nothing is left behind."""

import json
import math
import resource
import shutil
import struct
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from hostile_files import exponential_list, limits
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from small_models import SHAPES, random_ids, random_model, small_tokenizer

from acceleron import Acceleron
from acceleron.errors import InputError, RunFailed
from acceleron.hf_config import from_hf_config, to_hf_config

KINDS = {"granitemoeshared": {}, "granitemoe": {"d_ff_shared": 0}, "llama": {"dense": True}, "granitemoehybrid": {}}
CONFIGS = {
    kind: to_hf_config(random_model(**shape).config, 0, 1, hybrid=kind == "granitemoehybrid")
    for kind, shape in KINDS.items()
}
# Fields that from_hf_config does not read.
UNREAD = {"architectures", "attention_dropout", "initializer_range", "use_cache", "torch_dtype", "output_router_logits"}
UNREAD |= {"bos_token_id", "eos_token_id", "pad_token_id", "mamba_expand", "mamba_n_heads", "mamba_d_head"}
WRONG = (
    "4", "", [], [4], {}, {"rope_type": 4}, True, False, -1, 0, 10**400, -(10**400), 2**40, 1e300, 0.5,
    math.nan, math.inf, "\n" * 99, exponential_list(40),
)  # fmt: skip


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    directory = tmp_path_factory.mktemp("original")
    random_model().save_pretrained(directory, small_tokenizer())
    return directory


@pytest.fixture
def directory(original, tmp_path):
    return shutil.copytree(original, tmp_path / "model")


def refused(directory, message: str) -> str:
    """Check that the model is refused with one line that matches, without much memory or time."""
    with limits(message), pytest.raises(InputError, match=message) as error:
        Acceleron.from_pretrained(directory)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 500 + 2 * len(str(directory))
    return str(error.value)


@pytest.mark.parametrize("name", [*SHAPES, "hybrid"])
def test_valid_models_are_unchanged(tmp_path, name):
    """Without this test, a loader that refuses everything would pass."""
    model = random_model(**SHAPES.get(name, {}), balance_loss_coef=0.007, z_loss_coef=0.003)
    model.save_pretrained(tmp_path / "model", hybrid=name == "hybrid")
    other = Acceleron.from_pretrained(tmp_path / "model")
    weights = dict(model.named_parameters())
    assert weights.keys() == dict(other.named_parameters()).keys()
    assert all(torch.equal(weight, weights[name]) for name, weight in other.named_parameters())
    assert torch.equal(other(random_ids(1, 20)).logits, model(random_ids(1, 20)).logits)
    if name != "dense":  # it has no routed experts, so their number and width are not stored
        assert other.config == model.config


def convert(values: dict):
    """Return the HFConfig, or the line of the error."""
    try:
        return from_hf_config(values)
    except InputError as error:
        line = str(error)
    assert "\n" not in line
    return line


@pytest.mark.parametrize("kind", CONFIGS)
def test_wrong_types_name_the_field(kind):
    unread = UNREAD | ({"shared_intermediate_size"} if kind == "granitemoe" else set())
    fields = [name for name in CONFIGS[kind] if name not in unread]
    assert len(fields) > 14
    for name in [*fields, "rope_scaling", "sliding_window", "quantization_config", "head_dim", "partial_rotary_factor"]:
        for value in WRONG:
            result = convert(CONFIGS[kind] | {name: value})
            if isinstance(result, str):
                assert name in result or (name.startswith("rope") and "rope_t" in result)
                assert len(result) < 200
            else:  # True is 1, and an empty object is a missing one
                assert value in ({}, True, False) or (type(value) in (int, float) and abs(value) < 2**41)


JSON = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=9) | st.lists(st.text(max_size=9))


@settings(max_examples=100)
@given(st.sampled_from(sorted(CONFIGS)), st.dictionaries(st.sampled_from(sorted(CONFIGS["granitemoehybrid"])), JSON))
def test_any_json_is_converted_or_refused(kind, changes):
    result = convert(CONFIGS[kind] | changes)
    if not isinstance(result, str):
        assert all(1e-30 < factor < 1e30 for factor in result.factors.values())
        assert result.config.head_dim * result.config.num_heads == result.config.d_model


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("rope_scaling", {"rope_type": "llama3", "factor": 8.0}),
        ("rope_parameters", {"type": "yarn", "rope_theta": 1e4}),
        ("rope_parameters", {"full_attention": {"rope_type": "yarn"}}),
        ("rope_parameters", {"rope_type": "default", "partial_rotary_factor": 0.5}),
    ],
)
def test_scaled_rope_is_refused(field, value):
    """transformers 5 and 4 read rope_scaling also if rope_parameters is present."""
    assert field in convert(CONFIGS["llama"] | {field: value})


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "config.json does not exist"),
        (b"", r"config\.json: not a JSON file"),
        (b"[]", r"config\.json: not a JSON object"),
        (b"{", r"config\.json: not a JSON file"),
        (b"\xff\xfe{}", r"config\.json: not a JSON"),
        (b"[" * 10**5, r"config\.json: not a JSON file"),
        (b"{}", r"config\.json: model_type None"),
        (b'{"model_type": ["llama"]}', r"config\.json: model_type \['llama'\]"),
        (b'{"model_type": "llama", "tie_word_embeddings": true}', r"config\.json: vocab_size, hidden_size.* missing"),
    ],
)
def test_bad_config_json(directory, content, message):
    (directory / "config.json").unlink()
    if content is not None:
        (directory / "config.json").write_bytes(content)
    refused(directory, message)


LARGE = {"vocab_size": 2**24, "hidden_size": 2**16, "num_hidden_layers": 1024, "num_local_experts": 256}
LARGE |= {"intermediate_size": 2**18, "max_position_embeddings": 2**20, "shared_intermediate_size": 2**18}


@pytest.mark.parametrize("names", [*([name] for name in LARGE if name != "max_position_embeddings"), list(LARGE)])
def test_sizes_above_those_of_the_file_allocate_nothing(directory, names):
    values = json.loads((directory / "config.json").read_text())
    large = {name: LARGE[name] for name in names}
    (directory / "config.json").write_text(json.dumps(values | large))
    refused(directory, r"config\.json|is missing")


def test_the_size_of_the_rope_table_is_limited():
    """No tensor of the file has its length."""
    for length, width in ((2**20, 256), (2**14, 2**14)):
        with pytest.raises(InputError, match=f"max_position_embeddings {length} times the head width {width} is above"):
            from_hf_config(
                CONFIGS["llama"] | {"max_position_embeddings": length, "hidden_size": 4 * width, "head_dim": width}
            )


def change_weights(path, change):
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


EMBEDDING, NORM = "model.embed_tokens.weight", "model.norm.weight"
TENSORS = {
    "missing": (lambda t: t.pop(NORM), rf"tensor {NORM} is missing"),
    "all missing": (lambda t: t.clear(), r"config\.json has 2 layers, but the files have 0 tensors"),
    "extra": (
        lambda t: t.update({"model.layers.2.\n.weight": torch.ones(3)}),
        r"has no tensor 'model\.layers\.2\.\\n",
    ),
    "bias": (
        lambda t: t.update({"model.layers.0.self_attn.q_proj.bias": torch.ones(32)}),
        "has no tensor.*q_proj.bias",
    ),
    "shape": (lambda t: t.update({NORM: torch.ones(31)}), rf"{NORM} is \(31,\), but config.json implies \(32,\)"),
    "scalar": (lambda t: t.update({NORM: torch.ones(())}), rf"{NORM} is \(\), but config.json implies \(32,\)"),
    "transposed": (lambda t: t.update({EMBEDDING: t[EMBEDDING].T.contiguous()}), rf"{EMBEDDING} is \(32, 320\)"),
    "integers": (
        lambda t: t.update({NORM: torch.ones(32, dtype=torch.int8)}),
        rf"{NORM} is I8, not one of F32, F16, BF16",
    ),
    "fp8": (lambda t: t.update({NORM: torch.ones(32).to(torch.float8_e4m3fn)}), rf"{NORM} is F8_E4M3, not one of"),
    "complex": (lambda t: t.update({NORM: torch.ones(32, dtype=torch.complex64)}), rf"{NORM} is C64, not one of"),
    "NaN": (lambda t: t[NORM].fill_(math.nan), rf"{NORM} has values that are not finite"),
    "infinite": (lambda t: t[NORM][3:4].fill_(-math.inf), rf"{NORM} has values that are not finite"),
    "other head": (
        lambda t: t.update({"lm_head.weight": torch.ones(320, 32)}),
        r"lm_head\.weight differs from the emb",
    ),
    "small head": (lambda t: t.update({"lm_head.weight": torch.ones(320, 31)}), r"lm_head\.weight is \(320, 31\)"),
}


@pytest.mark.parametrize("name", TENSORS)
def test_bad_tensors(directory, name):
    change, message = TENSORS[name]
    change_weights(directory / "model.safetensors", change)
    assert str(directory) in refused(directory, message)


def header(values, size=None) -> bytes:
    content = values if isinstance(values, bytes) else json.dumps(values).encode()
    return struct.pack("<Q", len(content) if size is None else size) + content


HUGE = {NORM: {"dtype": "F32", "shape": [2**40], "data_offsets": [0, 2**42]}}
FILES = {
    "empty": b"",
    "text": b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n",
    "huge header": header({}, 2**63),
    "header above the file": header({}, 2**20),
    "not JSON": header(b"{" * 99),
    "a list": header([]),
    "tensor above the file": header(HUGE),
    "overflow": header({NORM: {"dtype": "F32", "shape": [2**33, 2**33], "data_offsets": [0, 0]}}),
    "negative": header({NORM: {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]}}),
    "bad dtype": header({NORM: {"dtype": "F\n32", "shape": [1], "data_offsets": [0, 4]}}) + bytes(4),
    "bad UTF-8": header(b'{"\xff": {}}'),
}


@pytest.mark.parametrize("name", FILES)
def test_damaged_safetensors(directory, name):
    (directory / "model.safetensors").write_bytes(FILES[name])
    refused(directory, r"model\.safetensors: damaged or not a safetensors file")


def test_truncated_or_changed_safetensors(directory):
    """Every bit flip in the header is refused, except those in the metadata and inside the data offsets' order."""
    path = directory / "model.safetensors"
    content = path.read_bytes()
    length = struct.unpack("<Q", content[:8])[0]
    for end in (1, 7, 8, 100, 8 + length, len(content) - 1):
        path.write_bytes(content[:end])
        refused(directory, r"model\.safetensors: damaged")
    accepted = 0
    for position in range(0, 8 + length, 61):
        changed = bytearray(content)
        changed[position] ^= 1 << position % 7
        path.write_bytes(changed)
        with suppress(InputError):
            Acceleron.from_pretrained(directory)
            accepted += 1
    assert accepted < 0.1 * (8 + length) / 61


def shard(directory, weight_map):
    """Replace model.safetensors with two shards and an index."""
    tensors = load_file(directory / "model.safetensors")
    (directory / "model.safetensors").unlink()
    save_file({NORM: tensors.pop(NORM)}, directory / "b.safetensors")
    save_file(tensors, directory / "a.safetensors")
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


SHARDS = {EMBEDDING: "a.safetensors", NORM: "b.safetensors"}


def test_shards(directory):
    shard(directory, SHARDS)
    assert torch.equal(Acceleron.from_pretrained(directory).norm.weight, random_model().norm.weight)


@pytest.mark.parametrize(
    ("weight_map", "message"),
    [
        (SHARDS | {NORM: "../b.safetensors"}, r"index\.json: not an index"),
        (SHARDS | {NORM: "/b.safetensors"}, r"index\.json: not an index"),
        (SHARDS | {NORM: "x" * 5000 + ".safetensors"}, r"index\.json: not an index"),
        (SHARDS | {NORM: "b\n.safetensors"}, r"index\.json: not an index"),
        (SHARDS | {NORM: "b.bin"}, r"index\.json: not an index"),
        (SHARDS | {NORM: ["b.safetensors"]}, r"index\.json: not an index"),
        (SHARDS | {NORM: None}, r"index\.json: not an index"),
        ({}, r"index\.json: not an index"),
        ([], r"index\.json: not an index"),
        (None, r"index\.json: not an index"),
        (SHARDS | {NORM: "c.safetensors"}, r"has no c\.safetensors"),
        ({EMBEDDING: "a.safetensors"}, rf"tensor {NORM} is missing"),
    ],
)
def test_bad_index(directory, weight_map, message):
    shard(directory, weight_map)
    refused(directory, message)


def test_other_formats_are_named(directory):
    (directory / "model.safetensors").rename(directory / "pytorch_model.bin")
    refused(directory, r"has no model\.safetensors, only pytorch_model\.bin")


@pytest.mark.parametrize("name", ["missing/directory/x", "x" * 5000, "nul\0", ""])
def test_missing_directory(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    refused(name, "does not exist")


def test_a_file_is_not_a_directory(directory):
    refused(directory / "config.json", "config.json is a file, not a directory: pass its directory")
    (directory / "other").touch()
    refused(directory / "other", "other is not a model directory; for a checkpoint, use Acceleron.load")


@pytest.fixture
def parent(tmp_path):
    """A directory with one file. At the end, it must still have only this file."""
    (tmp_path / "file").write_text("mine")
    yield tmp_path
    assert [path.name for path in tmp_path.rglob("*")] == ["file"]
    assert (tmp_path / "file").read_text() == "mine"


def failed_save(directory, message, model=None, *args, **kwargs):
    with pytest.raises(InputError, match=message) as error:
        (model or random_model()).save_pretrained(directory, *args, **kwargs)
    assert "\n" not in str(error.value)


def test_existing_files_are_kept(parent, monkeypatch):
    failed_save(parent, "is not empty: choose a new directory")
    failed_save(parent / "file", r"file: cannot be written")
    failed_save(parent / "file" / "model", r"file/model: cannot be written \(Not a directory\)")
    failed_save(parent / "file" / "a" / "model", r"file/a/model: cannot be written \(.*ot a directory\)")
    failed_save(parent / ("x" * 300), r"x: cannot be written \(File name too long\)")
    monkeypatch.chdir(parent)
    failed_save(".", "is not empty")
    failed_save("/", "is not empty")


def test_unwritable_directory(parent, monkeypatch):
    """Root can write everywhere, so a system call fails instead."""

    def fail(path, *args, **kwargs):
        raise PermissionError(13, "Permission denied", str(path))

    with monkeypatch.context() as patch:
        patch.setattr("pathlib.Path.mkdir", fail)
        failed_save(parent / "new" / "model", r"new/model: cannot be written \(Permission denied\)")


def test_full_disk(parent):
    """Can succeed later, so it is not an InputError. A limit of the file size stands for a small disk."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
    try:
        with pytest.raises(RunFailed, match=r"model: cannot be written \(File too large\)"):
            random_model().save_pretrained(parent / "new" / "model")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_models_that_cannot_be_exported_leave_nothing(parent):
    target = parent / "new" / "model"
    failed_save(
        target,
        "tokenizer has [0-9]+ entries, more than the model's vocabulary of 280",
        random_model(vocab_size=280),
        small_tokenizer(),
    )
    failed_save(
        target, "num_dense_layers 1: no architecture of transformers or llama", random_model(num_dense_layers=1)
    )
    failed_save(target, "--hybrid: the dense baseline has no experts", random_model(dense=True), hybrid=True)
    failed_save(target, "--hybrid: the model has no shared expert", random_model(d_ff_shared=0), hybrid=True)
    failed_save(target, "tokenizer: expected a tokenizers.Tokenizer, .*but got str", None, "tokenizer.json")
    failed_save(target, "dtype: expected .*float16, but got torch.int8", dtype=torch.int8)
    for value in (math.nan, math.inf):
        model = random_model()
        torch.nn.init.constant_(model.blocks[1].moe.w2_EDF[3, 2], value)
        failed_save(
            target, r"layers\.1\..*output_linear\.weight has values that are not finite: the run diverged", model
        )
    torch.nn.init.constant_(model.blocks[1].moe.w2_EDF, 70000.0)
    failed_save(target, "that f16 cannot represent: export in fp32 or bf16", model, dtype=torch.float16)


def test_an_empty_directory_is_used_and_leftovers_are_named(tmp_path):
    (tmp_path / "empty").mkdir()
    random_model().save_pretrained(tmp_path / "empty")
    assert sorted(path.name for path in (tmp_path / "empty").iterdir()) == ["config.json", "model.safetensors"]
    (tmp_path / "model" / ".partial").mkdir(parents=True)
    failed_save(
        tmp_path / "model", r"model/\.partial exists: another export is writing it, or was killed; then remove it"
    )
    assert (tmp_path / "model" / ".partial").exists()


def test_an_interruption_while_files_move_leaves_nothing(parent, monkeypatch):
    """All other files have moved when config.json does."""
    replace = Path.replace

    def interrupted(path, target):
        if path.name == "config.json":
            raise KeyboardInterrupt
        return replace(path, target)

    monkeypatch.setattr(Path, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        random_model().save_pretrained(parent / "new" / "model", small_tokenizer())


def test_a_run_directory_and_a_gguf_file_are_named(directory):
    (directory / "config.json").unlink()
    (directory / "checkpoint_5.pt").touch()
    refused(directory, "model has checkpoints but no config.json: pass one, such as .*checkpoint_5.pt")
    (directory / "model.gguf").touch()
    refused(directory / "model.gguf", "model.gguf: GGUF files cannot be opened")


def test_an_existing_directory_stays_the_same_one(tmp_path, monkeypatch):
    """It can be the current directory, a symbolic link or a mount point, and have special permissions."""
    (tmp_path / "empty").mkdir(mode=0o750)
    (tmp_path / "link").symlink_to("empty")
    before = (tmp_path / "empty").stat()
    monkeypatch.chdir(tmp_path / "empty")
    random_model().save_pretrained(".")
    assert Path("config.json").is_file()
    after = (tmp_path / "empty").stat()
    assert (after.st_ino, after.st_mode) == (before.st_ino, before.st_mode)
    for file in Path().iterdir():
        file.unlink()
    random_model().save_pretrained(tmp_path / "link")
    assert Path("config.json").is_file()


def test_files_have_the_usual_permissions(tmp_path):
    """safetensors writes a file that only its owner can read."""
    random_model().save_pretrained(tmp_path / "model", small_tokenizer())
    modes = {path.stat().st_mode & 0o777 for path in (tmp_path / "model").iterdir()}
    (tmp_path / "file").touch()
    assert modes == {(tmp_path / "file").stat().st_mode & 0o777}
