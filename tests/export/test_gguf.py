"""GGUF files, opened by llama.cpp. Its log-probabilities, text and tokens must equal ours."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers

from acceleron import Acceleron, ModelConfig
from acceleron.data.tokenizer import END_OF_TEXT, load_tokenizer, num_ids, train_tokenizer
from acceleron.errors import InputError
from acceleron.gguf_file import check_gguf_tokenizer, load_gguf, write_gguf, write_modelfile

pytest.importorskip("xllamacpp")  # Linux only
gguf = pytest.importorskip("gguf")
from llama_engine import Engine  # noqa: E402

TEXT = "The rain in Spain's 1984 — żółć 数据 🙂\ndef f(x):\n\treturn x  # it'll\r\n" * 20
NOTE = "<note>"
VOCAB_SIZE = 300
# Two query heads per kv head. d_ff is not a multiple of 32, the block of q8_0.
SHAPE = dict(vocab_size=VOCAB_SIZE, d_model=32, num_layers=3, num_heads=4, num_kv_heads=2, num_experts=4, d_ff=48)
CONFIGS = {
    "shared expert": ModelConfig(**SHAPE, d_ff_shared=64, max_seq_len=64),
    "no shared expert, K=3": ModelConfig(**SHAPE, d_ff_shared=0, top_k=3, max_seq_len=64),
    "K=1": ModelConfig(**SHAPE, d_ff_shared=64, top_k=1, max_seq_len=64),
    "dense": ModelConfig(**SHAPE, d_ff_shared=64, dense=True, max_seq_len=64),
}
MOE = CONFIGS["shared expert"]
NUM_TOKENS = 12
HARD_STRINGS = [
    "emoji 🙂👩‍👩‍👧🏽 x🙂🙂",
    "combining: e\u0301 a\u0308\u0301, nai\u0308ve, क्षि",
    "CRLF\r\nline\r\n\r\nend\r",
    "   runs    of     spaces   ",
    "digits 1984 3.14159 ١٢٣ ½ ²",
    "it's we'll I'd they've O'Neill's 'S 'tis don't''t",
    f"special {END_OF_TEXT}text<|endof{END_OF_TEXT}<|pad|> {NOTE}a{NOTE}",
    "数据和图像、日本語のテキスト한국어",
    "def f(x):\n\tif x:\n\t\treturn  x\n\n\n\t# done\t\n",
    "\u00a0no-break\u2003em\u3000wide\u200bzero\u0085",
    "ǅ ʰ Ⅷ ㊿ _underscore__ \x00\x7f",
]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    """From train_tokenizer, but the last id is an added token that is not special, and the id before it is unused."""
    document = json.loads(train_tokenizer([TEXT], VOCAB_SIZE).to_str())
    vocab = {token: index for token, index in document["model"]["vocab"].items() if index < VOCAB_SIZE - 2}
    document["model"]["vocab"] = vocab | {NOTE: VOCAB_SIZE - 1}
    document["model"]["merges"] = document["model"]["merges"][:-2]
    note = dict(document["added_tokens"][0], id=VOCAB_SIZE - 1, content=NOTE, special=False)
    document["added_tokens"].append(note)
    tokenizer = Tokenizer.from_str(json.dumps(document))
    assert num_ids(tokenizer) == VOCAB_SIZE
    assert tokenizer.id_to_token(VOCAB_SIZE - 2) is None
    return tokenizer


def random_model(config: ModelConfig, seed: int = 0) -> Acceleron:
    """Matrices with std 0.3, so each layer changes the result visibly."""
    generator = torch.Generator().manual_seed(seed)
    model = Acceleron(config)
    for weight in model.parameters():
        if weight.dim() == 1:
            torch.nn.init.uniform_(weight, 0.5, 1.5, generator=generator)
        else:
            torch.nn.init.normal_(weight, std=0.3, generator=generator)
    return model


def continuation(path: Path, tokenizer: Tokenizer) -> tuple[list[int], list[int], torch.Tensor]:
    """llama.cpp's greedy continuation: (prompt, new ids, log-probabilities). Checks the text."""
    prompt = tokenizer.encode("The rain in Spain's 1984\ndef f(x):").ids
    assert len(prompt) > 10
    ids, text, logprobs = Engine(path, 64).generate(prompt, NUM_TOKENS, VOCAB_SIZE, banned_tokens(tokenizer))
    assert len(ids) == NUM_TOKENS
    assert text == tokenizer.decode(ids)
    return prompt, ids, logprobs


def banned_tokens(tokenizer: Tokenizer) -> list[int]:
    """Tokens that are not valid UTF-8, and those without text."""
    texts = tokenizer.decode_batch([[index] for index in range(VOCAB_SIZE)])
    return [index for index, text in enumerate(texts) if not text or "\ufffd" in text]


@torch.no_grad()
def log_probabilities(model: Acceleron, prompt: list[int], ids: list[int]) -> torch.Tensor:
    """Ours at the positions that predict `ids`."""
    logits = model(torch.tensor([prompt + ids])).logits[0, len(prompt) - 1 : -1]
    return logits.double().log_softmax(-1)


def difference(model: Acceleron, path: Path, tokenizer: Tokenizer) -> float:
    """The largest difference of the log-probabilities."""
    prompt, ids, theirs = continuation(path, tokenizer)
    return (theirs - log_probabilities(model, prompt, ids)).abs().max().item()


def median_error(theirs: torch.Tensor, ours: torch.Tensor) -> float:
    """The median of the positions' RMS errors. An expert that changes because of rounding affects few positions."""
    return (theirs - ours).square().mean(-1).sqrt().median().item()


@pytest.mark.parametrize("name", CONFIGS)
def test_llama_cpp_computes_the_same_log_probabilities_and_text(name, tokenizer, tmp_path):
    model = random_model(CONFIGS[name])
    write_gguf(model, tokenizer, tmp_path / "model.gguf", "fp32", "test")
    prompt, ids, theirs = continuation(tmp_path / "model.gguf", tokenizer)
    ours = log_probabilities(model, prompt, ids)
    assert ours.std() > 1
    torch.testing.assert_close(theirs, ours, rtol=0, atol=1e-4)
    greedy = ours.index_fill(-1, torch.tensor(banned_tokens(tokenizer)), -torch.inf).argmax(-1)
    assert greedy.tolist() == ids


def test_hard_strings_have_the_same_tokens(tokenizer, tmp_path):
    write_gguf(random_model(MOE), tokenizer, tmp_path / "model.gguf", "fp32", "test")
    engine = Engine(tmp_path / "model.gguf", 64)
    for text in HARD_STRINGS:
        assert engine.tokenize(text) == tokenizer.encode(text, add_special_tokens=False).ids, text


def set_field(name: str, value: float):
    def mutate(reader):
        field = reader.get_field(f"granitemoe.{name}")
        assert field.parts[field.data[0]][0] != value
        field.parts[field.data[0]][0] = value

    return mutate


def undo_permutation(*names: str):
    def mutate(reader):
        for tensor in reader.tensors:
            if tensor.name.endswith(names):
                pairs = tensor.data.reshape(-1, MOE.head_dim // 2, 2, tensor.data.shape[-1])
                tensor.data[:] = np.ascontiguousarray(pairs.swapaxes(1, 2)).reshape(tensor.data.shape)

    return mutate


def swap_gate_and_up(kind: str):
    def mutate(reader):
        tensors = {tensor.name: tensor.data for tensor in reader.tensors}
        for layer in range(MOE.num_layers):
            gate, up = (tensors[f"blk.{layer}.ffn_{part}_{kind}.weight"] for part in ("gate", "up"))
            gate[:], up[:] = up.copy(), gate.copy()

    return mutate


MUTATIONS = {
    "attention.scale": set_field("attention.scale", 1.0),
    "embedding_scale": set_field("embedding_scale", 12.0),
    "residual_scale": set_field("residual_scale", 0.22),
    "logit_scale": set_field("logit_scale", 6.0),
    "rope.freq_base": set_field("rope.freq_base", 5e5),
    "layer_norm_rms_epsilon": set_field("attention.layer_norm_rms_epsilon", 1e-2),
    "expert_used_count": set_field("expert_used_count", 1),
    "q not permuted": undo_permutation("attn_q.weight"),
    "k not permuted": undo_permutation("attn_k.weight"),
    "q and k not permuted": undo_permutation("attn_q.weight", "attn_k.weight"),
    "gate and up of the experts swapped": swap_gate_and_up("exps"),
    "gate and up of the shared expert swapped": swap_gate_and_up("shexp"),
}


@pytest.mark.parametrize("name", MUTATIONS)
def test_every_mutation_of_the_file_is_detected(name, tokenizer, tmp_path):
    """Proves that the comparison above detects a wrong value: 300 times its tolerance or more."""
    model, path = random_model(MOE), tmp_path / "model.gguf"
    write_gguf(model, tokenizer, path, "fp32", "test")
    MUTATIONS[name](gguf.GGUFReader(path, "r+"))
    assert difference(model, path, tokenizer) > 0.03


ROUNDED = [(name, dtype) for name in ("shared expert", "dense") for dtype in ("f16", "bf16", "q8_0")]


def rounding_bound(model: Acceleron, path: Path, prompt: list[int], ids: list[int]) -> float:
    """Three times the error of the file's weights in our model, which computes in fp32.

    llama.cpp also rounds the activations, as finely as the weights. The two errors are equal and independent, so they
    add up to sqrt(2) of one; 3 leaves a margin for chance. Measured: 0.9 to 1.7.
    """
    rounded = load_gguf(path)
    error = median_error(log_probabilities(rounded, prompt, ids), log_probabilities(model, prompt, ids))
    assert error > 1e-4
    return 3 * error


@pytest.mark.parametrize(("name", "dtype"), ROUNDED)
def test_smaller_types_stay_within_their_rounding(name, dtype, tokenizer, tmp_path):
    model, path = random_model(CONFIGS[name]), tmp_path / "model.gguf"
    write_gguf(model, tokenizer, path, dtype, "test")
    prompt, ids, theirs = continuation(path, tokenizer)
    assert median_error(theirs, log_probabilities(model, prompt, ids)) < rounding_bound(model, path, prompt, ids)


@pytest.mark.parametrize(("name", "dtype"), ROUNDED)
def test_a_wrong_permutation_exceeds_the_rounding(name, dtype, tokenizer, tmp_path):
    model, path = random_model(CONFIGS[name]), tmp_path / "model.gguf"
    write_gguf(model, tokenizer, path, dtype, "test")
    wrong = tmp_path / "wrong.gguf"
    wrong.write_bytes(path.read_bytes())
    undo_permutation("attn_q.weight", "attn_k.weight")(gguf.GGUFReader(wrong, "r+"))
    prompt, ids, theirs = continuation(wrong, tokenizer)
    assert median_error(theirs, log_probabilities(model, prompt, ids)) > rounding_bound(model, path, prompt, ids)


@pytest.mark.parametrize("name", CONFIGS)
def test_reading_fp32_gives_the_weights_bit_for_bit(name, tokenizer, tmp_path):
    model = random_model(CONFIGS[name])
    write_gguf(model, tokenizer, tmp_path / "model.gguf", "fp32", "test")
    other = load_gguf(tmp_path / "model.gguf")
    for key, weight in model.named_parameters():
        assert torch.equal(weight, other.get_parameter(key)), key
    ids = torch.arange(60)[None]
    with torch.no_grad():
        torch.testing.assert_close(other(ids).logits, model(ids).logits, rtol=0, atol=1e-5)


def test_q8_0_keeps_norms_and_routers_in_fp32_and_logs_the_f16_tensors(tokenizer, tmp_path, caplog):
    write_gguf(random_model(MOE), tokenizer, tmp_path / "model.gguf", "q8_0", "test")
    types = {t.name: t.tensor_type.name for t in gguf.GGUFReader(tmp_path / "model.gguf").tensors}
    kinds = {name.removeprefix("blk.0.").removesuffix(".weight"): kind for name, kind in types.items()}
    assert {kinds[name] for name in ("attn_norm", "ffn_norm", "output_norm", "ffn_gate_inp")} == {"F32"}
    assert kinds["ffn_down_exps"] == "F16"  # its rows have 48 values
    assert {kinds[name] for name in ("token_embd", "attn_q", "ffn_up_exps", "ffn_down_shexp")} == {"Q8_0"}
    assert caplog.messages == ["3 of 41 tensors have rows that are not multiples of 32: f16, not q8_0"]


def test_ids_and_kinds_of_tokens(tokenizer, tmp_path):
    write_gguf(random_model(MOE), tokenizer, tmp_path / "model.gguf", "f16", "the name")
    reader = gguf.GGUFReader(tmp_path / "model.gguf")
    tokens, types = (reader.get_field(f"tokenizer.ggml.{key}").contents() for key in ("tokens", "token_type"))
    kinds = {token: gguf.TokenType(kind).name for token, kind in zip(tokens, types, strict=True)}
    assert len(tokens) == VOCAB_SIZE
    assert all(tokens[index] == token for token, index in tokenizer.get_vocab().items())
    special = {END_OF_TEXT: "CONTROL", "<|pad|>": "CONTROL", NOTE: "USER_DEFINED", f"[PAD{VOCAB_SIZE - 2}]": "UNUSED"}
    assert {token: kind for token, kind in kinds.items() if kind != "NORMAL"} == special
    assert reader.get_field("general.name").contents() == "the name"
    assert reader.get_field("tokenizer.ggml.eos_token_id").contents() == 0


PILE = Path(__file__).parents[3] / "shared/data/pile_tokenizer.json"


@pytest.mark.skipif(not PILE.is_file(), reason="needs the published tokenizer")
def test_the_published_tokenizer_is_supported():
    check_gguf_tokenizer(load_tokenizer(PILE))


def test_a_sequence_of_only_the_gpt_2_split_is_supported(tokenizer):
    copy = Tokenizer.from_str(tokenizer.to_str())
    copy.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.ByteLevel(add_prefix_space=False)])
    check_gguf_tokenizer(copy)


SPLIT = pre_tokenizers.Split(Regex(r"\p{N}{1,3}"), "isolated")
UNSUPPORTED = {
    "a WordLevel model instead of BPE": ("model", models.WordLevel({END_OF_TEXT: 0}, unk_token=END_OF_TEXT)),
    r"a normalizer \(NFC\)": ("normalizer", normalizers.NFC()),
    "no pre-tokenizer instead of a ByteLevel pre-tokenizer": ("pre_tokenizer", None),
    "Metaspace instead of a ByteLevel pre-tokenizer": ("pre_tokenizer", pre_tokenizers.Metaspace()),
    r"Split\+ByteLevel instead of a ByteLevel pre-tokenizer": (
        "pre_tokenizer",
        pre_tokenizers.Sequence([SPLIT, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]),
    ),
    "add_prefix_space": ("pre_tokenizer", pre_tokenizers.ByteLevel(add_prefix_space=True)),
    "use_regex false": ("pre_tokenizer", pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)),
    "dropout 0.5": ("model.dropout", 0.5),
    "continuing_subword_prefix ##": ("model.continuing_subword_prefix", "##"),
    "end_of_word_suffix </w>": ("model.end_of_word_suffix", "</w>"),
    "byte_fallback True": ("model.byte_fallback", True),
    "ignore_merges True": ("model.ignore_merges", True),
    "no token for 255 of the 256 bytes": ("model", models.BPE({"a": 0}, [])),
}


@pytest.mark.parametrize("message", UNSUPPORTED)
def test_unsupported_tokenizers_are_refused_by_name(message, tokenizer, tmp_path):
    copy = Tokenizer.from_str(tokenizer.to_str())
    check_gguf_tokenizer(copy)
    name, value = UNSUPPORTED[message]
    setattr(copy.model if name.startswith("model.") else copy, name.removeprefix("model."), value)
    with pytest.raises(InputError, match=f"the tokenizer has {message}.*use --format hf"):
        write_gguf(random_model(MOE), copy, tmp_path / "model.gguf", "fp32", "test")
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("flag", ["single_word", "lstrip", "rstrip"])
def test_added_tokens_that_llama_cpp_would_split_differently_are_refused(flag, tokenizer):
    document = json.loads(tokenizer.to_str())
    document["added_tokens"][-1][flag] = True
    with pytest.raises(InputError, match=f"the tokenizer has {flag} for the added token '<note>': llama.cpp"):
        check_gguf_tokenizer(Tokenizer.from_str(json.dumps(document)))


@pytest.mark.parametrize(
    ("dtype", "value", "message"),
    [
        ("fp32", float("nan"), "not finite"),
        ("q8_0", float("inf"), "not finite"),
        ("f16", 1e5, "f16 cannot represent"),
        ("bf16", 3.4e38, "bf16 cannot represent"),
        ("q8_0", 1e7, "f16 cannot represent"),  # the scale would be 1e7 / 127
    ],
)
def test_values_that_a_type_cannot_represent_are_refused_and_leave_no_file(dtype, value, message, tokenizer, tmp_path):
    model = random_model(MOE)
    with torch.no_grad():
        model.blocks[2].moe.shared.w2[3, 5] = value
    with pytest.raises(InputError, match=f"blk.2.ffn_down_shexp.weight has values that .*{message}"):
        write_gguf(model, tokenizer, tmp_path / "model.gguf", dtype, "test")
    assert not any(tmp_path.iterdir())


def test_large_values_within_the_range_of_q8_0_survive(tokenizer, tmp_path):
    """Above the largest f16 value, 65,504."""
    model = random_model(MOE)
    with torch.no_grad():
        model.embedding[3, 5] = 1e6
    write_gguf(model, tokenizer, tmp_path / "model.gguf", "q8_0", "test")
    other = load_gguf(tmp_path / "model.gguf")
    assert other.embedding[3, 5].item() == pytest.approx(1e6, rel=2**-10)


def test_models_without_an_architecture_are_refused(tokenizer, tmp_path):
    model = Acceleron(ModelConfig(**SHAPE, num_dense_layers=1))
    with pytest.raises(InputError, match="num_dense_layers 1: no architecture of transformers or llama"):
        write_gguf(model, tokenizer, tmp_path / "model.gguf", "fp32", "test")
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("attention.scale", 1.0, r"granitemoe.attention.scale is 1.0, not 0.353"),
        ("residual_scale", 0.5, r"granitemoe.residual_scale is 0.5, not 1.0"),
    ],
)
def test_reading_refuses_other_factors(key, value, message, tokenizer, tmp_path):
    write_gguf(random_model(MOE), tokenizer, tmp_path / "model.gguf", "fp32", "test")
    reader = gguf.GGUFReader(tmp_path / "model.gguf", "r+")
    set_field(key, value)(reader)
    reader.data.flush()
    with pytest.raises(RuntimeError, match=message):
        load_gguf(tmp_path / "model.gguf")


def test_a_missing_gguf_package_is_named(tokenizer, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(InputError, match="pip install gguf"):
        write_gguf(random_model(MOE), tokenizer, tmp_path / "model.gguf", "fp32", "test")


def test_modelfile_passes_the_prompt_through_unchanged(tmp_path):
    write_modelfile(tmp_path / "Modelfile", "nano.gguf", 2048)
    assert (tmp_path / "Modelfile").read_text().splitlines() == [
        "FROM ./nano.gguf",
        'TEMPLATE "{{ .Prompt }}"',
        "PARAMETER num_ctx 2048",
        'PARAMETER stop "<|endoftext|>"',
    ]
