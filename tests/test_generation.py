"""Sampling, the KV cache and streaming."""

import math
import random
import shutil
from itertools import pairwise

import pytest
import torch
from test_model import OTHER_SHAPE, small_model, token_ids, unit_scale
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers

from acceleron import generation
from acceleron.attention import KVCache
from acceleron.data.tokenizer import END_OF_TEXT, train_tokenizer
from acceleron.errors import InputError
from acceleron.generation import Sampling, generate, prepare_for_inference, sample_token, stream_text

GREEDY = Sampling(temperature=0)


@pytest.fixture
def model():
    return unit_scale(small_model())


@pytest.mark.parametrize("shape", [{}, {"dense": True}, OTHER_SHAPE], ids=["MoE", "dense baseline", "other shape"])
def test_greedy_with_kv_cache_matches_greedy_without(shape):
    model = unit_scale(small_model(**shape))
    prompt = token_ids(1, 5)[0].tolist()
    ids = list(prompt)
    with torch.no_grad():
        for _ in range(40):
            ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
    assert list(generate(model, prompt, 40, GREEDY)) == ids[5:]
    assert len(set(ids[5:])) > 5  # not the same token repeated


def test_chunked_prefill_matches_one_forward_pass(model):
    ids = token_ids(2, 30)
    cache = KVCache(model.config, 2, 30, torch.device("cpu"), torch.float32)
    with torch.no_grad():
        pieces = [model.hidden_states(ids[:, start:end], cache)[0] for start, end in pairwise((0, 7, 8, 20, 30))]
        whole, _ = model.hidden_states(ids)
    torch.testing.assert_close(torch.cat(pieces, dim=1), whole, rtol=1e-4, atol=1e-4)


def test_generation_stops_at_the_context_length(model):
    assert len(list(generate(model, [1] * 60, 100, GREEDY))) == 4  # max_seq_len is 64
    assert len(list(generate(model, [1], 10, GREEDY))) == 10


@pytest.mark.parametrize("length", [0, 64, 200])
def test_empty_or_too_long_prompts_are_rejected(model, length):
    with pytest.raises(InputError, match=f"{length} tokens; the model accepts 1 to 63"):
        list(generate(model, [1] * length, 5, GREEDY))


def test_stop_token_ends_generation_and_is_not_yielded(model):
    tokens = list(generate(model, [3], 20, GREEDY))
    stop = tokens[6]
    assert list(generate(model, [3], 20, GREEDY, stop_id=stop)) == tokens[: tokens.index(stop)]


def test_ids_missing_from_the_tokenizer_are_never_sampled(model):
    """The ids without a tokenizer entry get the largest logits."""
    with torch.no_grad():
        model.embedding[100:] *= 20
    assert max(generate(model, [3], 50, Sampling(temperature=1.0, top_k=0, seed=0))) >= 100
    assert max(generate(model, [3], 50, Sampling(temperature=1.0, top_k=0, seed=0), num_entries=100)) < 100
    assert max(generate(model, [3], 50, GREEDY, num_entries=100)) < 100


def test_same_seed_gives_the_same_tokens(model):
    draws = [list(generate(model, [3], 30, Sampling(temperature=1.0, seed=seed))) for seed in (1, 1, 2)]
    assert draws[0] == draws[1] != draws[2]


@pytest.mark.parametrize(
    ("sampling", "expected"),
    [
        (Sampling(temperature=1.0, top_k=0, seed=0), [0.1, 0.4, 0.2, 0.3]),
        (Sampling(temperature=1.0, top_k=2, seed=0), [0, 4 / 7, 0, 3 / 7]),
        (Sampling(temperature=1.0, top_k=0, top_p=0.7, seed=0), [0, 4 / 7, 0, 3 / 7]),
        (Sampling(temperature=1.0, top_k=0, top_p=0.71, seed=0), [0, 4 / 9, 2 / 9, 3 / 9]),
        (Sampling(temperature=0.5, top_k=0, seed=0), [1 / 30, 16 / 30, 4 / 30, 9 / 30]),
        (Sampling(temperature=1.0, top_k=0, top_p=1e-6, seed=0), [0, 1, 0, 0]),
        (Sampling(temperature=1.0, top_k=0, top_p=1e-300, seed=0), [0, 1, 0, 0]),
        (Sampling(temperature=1e-45, top_k=0, seed=0), [0, 1, 0, 0]),
        (GREEDY, [0, 1, 0, 0]),
    ],
)
def test_samples_follow_the_filtered_distribution(sampling, expected):
    logits = torch.tensor([0.1, 0.4, 0.2, 0.3]).log()
    generator, draws = torch.Generator().manual_seed(0), 4000
    counts = torch.zeros(4)
    for _ in range(draws):
        counts[sample_token(logits, sampling, generator)] += 1
    for share, p in zip((counts / draws).tolist(), expected, strict=True):
        # Five standard deviations of a binomial proportion. Probabilities 0 and 1 must match exactly.
        assert abs(share - p) <= 5 * math.sqrt(p * (1 - p) / draws)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("sampling", [GREEDY, Sampling(seed=0)])
def test_non_finite_logits_are_rejected(sampling, bad):
    with pytest.raises(InputError, match="diverged"):
        sample_token(torch.tensor([0.1, bad, 0.3]), sampling, torch.Generator())
    assert sample_token(torch.tensor([-math.inf, 0.3, -math.inf]), sampling, torch.Generator()) == 1


@pytest.mark.parametrize(
    "values", [{"temperature": -1}, {"temperature": math.nan}, {"top_k": -1}, {"top_p": 0}, {"top_p": 1.1}]
)
def test_invalid_sampling_settings_are_rejected(values):
    with pytest.raises(InputError, match=next(iter(values))):
        Sampling(**values)


def byte_fallback() -> Tokenizer:
    """A tokenizer like Llama 2's: characters without a token become byte tokens."""
    tokens = [END_OF_TEXT, "<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), *"▁:Sabcdegnoprty"]
    tokenizer = Tokenizer(
        models.BPE({token: index for index, token in enumerate(tokens)}, [], unk_token="<unk>", byte_fallback=True)
    )
    tokenizer.add_special_tokens([END_OF_TEXT])
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    spaces = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(spaces)
    return tokenizer


def metaspace() -> Tokenizer:
    pieces = [(END_OF_TEXT, 0.0), ("<unk>", 0.0), *((token, -3.0) for token in ["▁end", *"▁:Sabcdegnoprtyößr–漢字🎉"])]
    tokenizer = Tokenizer(models.Unigram(pieces, 1))
    tokenizer.add_special_tokens([END_OF_TEXT])
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    return tokenizer


TOKENIZERS = {
    "byte-level": lambda: train_tokenizer(["plain ascii only"], 258 + 20),
    "byte-fallback": byte_fallback,
    "metaspace": metaspace,
}


def stream(monkeypatch, model, tokenizer, prompt: str, script: list[int]) -> list[tuple]:
    """Stream text from a model that generates the ids in `script`."""
    monkeypatch.setattr(generation, "generate", lambda *args, **kwargs: iter(script))
    return list(stream_text(model, tokenizer, prompt, 100, GREEDY))


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_streamed_pieces_concatenate_to_the_text(monkeypatch, model, kind):
    """Multi-byte characters arrive one byte at a time and appear only when complete."""
    text = "größer – 漢字 🎉 end"
    tokenizer = TOKENIZERS[kind]()
    start = len(tokenizer.encode("Say: ").ids)
    script = tokenizer.encode("Say: " + text).ids[start:]
    assert tokenizer.decode(script).strip() == text
    streamed = stream(monkeypatch, model, tokenizer, "Say: ", script)
    assert [token for token, _ in streamed] == script
    assert "".join(piece for _, piece in streamed) == text
    assert all("\ufffd" not in piece for _, piece in streamed)
    assert streamed[0][1] == "g"  # without delay


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_arbitrary_ids_stream_to_their_decoded_text(monkeypatch, model, kind):
    """Covers invalid bytes, a character cut off at the end, special tokens, and a prompt that ends in byte tokens."""
    tokenizer = TOKENIZERS[kind]()
    draw = random.Random(0)
    for prompt in ("", "Say: ", "漢"):
        prompt_ids = tokenizer.encode(prompt).ids or [0]
        for length in (1, 2, 5, 60):
            script = [draw.randrange(tokenizer.get_vocab_size()) for _ in range(length)]
            streamed = stream(monkeypatch, model, tokenizer, prompt, script)
            assert [token for token, _ in streamed if token is not None] == script
            whole = tokenizer.decode(prompt_ids + script)
            assert "".join(piece for _, piece in streamed) == whole[len(tokenizer.decode(prompt_ids)) :]


def test_prompt_with_invalid_utf8_is_rejected(model):
    tokenizer = train_tokenizer(["plain"], 258)
    with pytest.raises(InputError, match="not valid UTF-8"):
        list(stream_text(model, tokenizer, "\udcff", 5, GREEDY))


def test_generate_reports_a_diverged_model(model):
    with torch.no_grad():
        model.norm.weight.fill_(torch.nan)
    with pytest.raises(InputError, match="diverged"):
        list(generate(model, [3], 5, Sampling(seed=0)))


def test_inference_keeps_routers_and_norms_in_fp32(model):
    wide = list(generate(model, [3], 5, GREEDY))
    prepare_for_inference(model, torch.bfloat16)
    kinds = {name: p.dtype for name, p in model.named_parameters()}
    assert {d for n, d in kinds.items() if n.endswith("router") or "norm" in n} == {torch.float32}
    assert {d for n, d in kinds.items() if not (n.endswith("router") or "norm" in n)} == {torch.bfloat16}
    assert list(generate(model, [3], 1, GREEDY)) == wide[:1]


def test_tokenizer_lookup_order(tmp_path):
    """--tokenizer, then next to the checkpoint, then next to the scripts."""
    places = {name: tmp_path / name for name in ("run", "scripts", "named")}
    sizes = {"named": 285, "run": 280, "scripts": 270}
    for name, folder in places.items():
        folder.mkdir()
        file = folder / ("pile_tokenizer.json" if name == "scripts" else "tokenizer.json")
        train_tokenizer(["many words to learn from, again and again, words to merge " * 3], sizes[name]).save(str(file))

    def opened(explicit=None) -> Tokenizer:
        return generation.open_tokenizer(explicit, places["run"], 512, places["scripts"])

    named, own = places["named"] / "tokenizer.json", places["run"] / "tokenizer.json"
    assert opened().get_vocab_size() == 280
    with pytest.raises(InputError, match=f"--tokenizer {named} is not {own}, which"):
        opened(str(named))
    shutil.copy(own, tmp_path / "copy.json")
    assert opened(str(tmp_path / "copy.json")).get_vocab_size() == 280
    own.unlink()
    assert opened(str(named)).get_vocab_size() == 285
    assert opened().get_vocab_size() == 270
    (places["scripts"] / "pile_tokenizer.json").unlink()
    with pytest.raises(InputError, match="--tokenizer"):
        opened()
