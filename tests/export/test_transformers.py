"""transformers opens a model directory and computes the same. `make test-all` also runs this file on transformers 4."""

import json

import pytest
import torch
import transformers
from small_models import SHAPES, random_ids, random_model, relative_error, small_tokenizer
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import AutoModelForCausalLM, AutoTokenizer

from acceleron import Acceleron
from acceleron.generation import Sampling, generate

MAX_DIFFERENCE, MAX_ERROR = 1e-4, 5e-6  # fp32 rounding in another order; the largest errors seen: 7.4e-6, 4.0e-7
STRINGS = (
    "the rain  in\tspain\r\n\r\n stays",
    "def f(x):\n    return {'a': [1, 23, 456]}\n",
    "naïve café, Straße, ﬁne, x̄",
    "数据 \U0001f642 \U0001f469\u200d\U0001f469\u200d\U0001f467 עברית",
    "<|endoftext|>the<|pad|> rain<|endoftext|>",
    "<|endoftext |> <|ENDOFTEXT|> <s></s>",
    " leading and trailing ",
    "\x00\x07\ufeff\u2028 \u00a0.",
    " .  , !  don't 'll n't",
    "",
)


@pytest.fixture(scope="module", params=[*SHAPES, "hybrid"])
def exported(request, tmp_path_factory):
    """(our model, its directory)."""
    model = random_model(**SHAPES.get(request.param, {}))
    directory = tmp_path_factory.mktemp("model")
    model.save_pretrained(directory, small_tokenizer(), hybrid=request.param == "hybrid")
    return model, directory


def load(directory):
    return AutoModelForCausalLM.from_pretrained(directory).eval()


@torch.no_grad()
def test_logits_are_equal(exported):
    model, directory = exported
    ids, other = random_ids(3, 64), load(directory)
    ours, theirs = model(ids).logits, other(ids).logits
    assert ours.std() > 1
    assert (ours - theirs).abs().max() < MAX_DIFFERENCE
    assert relative_error(theirs, ours) < MAX_ERROR
    assert {parameter.dtype for parameter in other.parameters()} == {torch.float32}


def test_greedy_text_is_equal(exported):
    model, directory = exported
    other = load(directory)
    for prompt in (random_ids(1, 7), random_ids(1, 20)):
        ours = list(generate(model, prompt[0].tolist(), 30, Sampling(temperature=0)))
        theirs = other.generate(prompt, max_new_tokens=30, do_sample=False, eos_token_id=None)[0, prompt.shape[1] :]
        assert theirs.tolist() == ours
        assert len(set(ours)) > 5  # not one token repeated


def test_greedy_text_of_a_padded_batch_is_equal(exported):
    """Prompts of different lengths are padded on the left. The mask must hide the padding from attention."""
    model, directory = exported
    tokenizer = AutoTokenizer.from_pretrained(directory, padding_side="left")
    prompts = ["the", "the rain in spain stays"]
    inputs = tokenizer(prompts, return_tensors="pt", padding=True)
    assert inputs.attention_mask.sum(dim=1).tolist() == [len(tokenizer(text).input_ids) for text in prompts]
    assert inputs.input_ids[0, 0] == tokenizer.pad_token_id
    texts = load(directory).generate(**inputs, max_new_tokens=12, do_sample=False, eos_token_id=None)
    for prompt, ids in zip(prompts, texts[:, inputs.input_ids.shape[1] :].tolist(), strict=True):
        assert ids == list(generate(model, tokenizer(prompt).input_ids, 12, Sampling(temperature=0)))


def test_generation_stops_at_the_end_of_text(exported):
    model, directory = exported
    other, prompt = load(directory), random_ids(1, 5)
    assert other.generation_config.eos_token_id == other.generation_config.bos_token_id == 0
    assert other.generation_config.pad_token_id == 1
    tokens = list(generate(model, prompt[0].tolist(), 30, Sampling(temperature=0)))
    stop = tokens[9]
    other.generation_config.eos_token_id = stop  # as if it were the id of the end-of-text token
    text = other.generate(prompt, max_new_tokens=30, do_sample=False)[0, 5:].tolist()
    assert text == tokens[: tokens.index(stop) + 1]


def test_truncation_padding_and_added_tokens_of_the_tokenizer_are_not_exported(tmp_path):
    """The model was trained without them."""
    tokenizer, text = small_tokenizer(), "the rain in spain stays mainly in the plain"
    expected = tokenizer.encode(text).ids
    tokenizer.post_processor = processors.TemplateProcessing("<|pad|> $A", special_tokens=[("<|pad|>", 1)])
    tokenizer.enable_truncation(4)
    tokenizer.enable_padding(length=50)
    random_model().save_pretrained(tmp_path / "model", tokenizer)
    assert AutoTokenizer.from_pretrained(tmp_path / "model")(text).input_ids == expected
    assert Tokenizer.from_file(str(tmp_path / "model" / "tokenizer.json")).encode(text).ids == expected


def test_a_word_level_tokenizer_without_unknown_token_is_exported(tmp_path):
    vocab = {"<|endoftext|>": 0, "the": 1, "rain": 2}
    tokenizer = Tokenizer(models.WordLevel(vocab))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    random_model().save_pretrained(tmp_path / "model", tokenizer)
    assert AutoTokenizer.from_pretrained(tmp_path / "model")("the rain").input_ids == [1, 2]
    assert Acceleron.from_pretrained(tmp_path / "model").config.vocab_size == 3


def test_losses_are_equal(exported):
    model, directory = exported
    ids = random_ids(2, 40)
    labels = ids.clone()
    labels[0, :9] = -100
    output = model(ids, labels)
    assert load(directory)(ids, labels=labels).loss.item() == pytest.approx(output.cross_entropy.item(), rel=1e-6)


@pytest.mark.parametrize("shape", [{}, dict(num_experts=5, top_k=3, d_ff_shared=0), dict(top_k=1)])
@pytest.mark.parametrize("num_layers", [1, 2])
def test_router_losses_are_equal(tmp_path, shape, num_layers):
    """With output_router_logits=True, transformers trains with our balance loss and coefficient, but no z-loss.

    It averages over the layers before it multiplies shares and probabilities. So the losses of several layers are equal
    if the probabilities of the layers are equal. Here they are uniform: tiny routers, which still have no ties.
    """
    model = random_model(num_layers=num_layers, balance_loss_coef=0.3, **shape)
    with torch.no_grad():
        for block in model.blocks:
            block.moe.router *= 1 if num_layers == 1 else 1e-6
    model.save_pretrained(tmp_path / "model")
    ids = random_ids(2, 40)
    ours, theirs = model(ids, ids), load(tmp_path / "model")(ids, labels=ids, output_router_logits=True)
    balance_loss = 0.3 * ours.balance_loss.item()
    assert balance_loss > 0.31 if num_layers == 1 else balance_loss == pytest.approx(0.6, rel=1e-4)
    assert 0.3 * num_layers / model.config.top_k * theirs.aux_loss.item() == pytest.approx(balance_loss, rel=1e-5)
    assert theirs.loss.item() == pytest.approx(ours.cross_entropy.item() + balance_loss, rel=1e-6)


# Each changes the computation. The flat rope_theta is the field of transformers 4, rope_parameters that of 5.
MUTATIONS = {
    "attention_multiplier 1": {"attention_multiplier": 1.0},
    "attention_multiplier missing": {"attention_multiplier": None},
    "embedding_multiplier": {"embedding_multiplier": 12.0},
    "residual_multiplier": {"residual_multiplier": 0.22},
    "logits_scaling": {"logits_scaling": 6.0},
    "rms_norm_eps": {"rms_norm_eps": 1e-2},
    "num_experts_per_tok": {"num_experts_per_tok": 1},
    "hidden_act": {"hidden_act": "gelu"},
    "rope theta": {"rope_theta": 5e5, "rope_parameters": {"rope_type": "default", "rope_theta": 5e5}},
    "tie_word_embeddings": {"tie_word_embeddings": False},
}


@pytest.mark.parametrize("name", MUTATIONS)
def test_every_field_matters(tmp_path, name):
    """Without this test, fields that an engine ignores or replaces with a default could be wrong."""
    model, ids = random_model(), random_ids(2, 40)
    model.save_pretrained(tmp_path / "model")
    path = tmp_path / "model" / "config.json"
    values = json.loads(path.read_text()) | MUTATIONS[name]
    path.write_text(json.dumps({key: value for key, value in values.items() if value is not None}))
    with torch.no_grad():
        theirs, ours = load(tmp_path / "model")(ids).logits, model(ids).logits
    assert (ours - theirs).abs().max() > 1000 * MAX_DIFFERENCE
    assert relative_error(theirs, ours) > 1000 * MAX_ERROR


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@torch.no_grad()
def test_16_bit_files_are_computed_in_fp32(tmp_path, dtype):
    """The logits are those of our model with rounded weights, except for norms and routers."""
    model, ids = random_model(), random_ids(3, 64)
    original = model(ids).logits
    model.save_pretrained(tmp_path / "model", dtype=dtype)
    for name, weight in model.named_parameters():
        if weight.dim() > 1 and not name.endswith("router"):
            weight.copy_(weight.to(dtype))
    rounded, other = model(ids).logits, load(tmp_path / "model")
    assert {parameter.dtype for parameter in other.parameters()} == {torch.float32}
    assert relative_error(other(ids).logits, rounded) < MAX_ERROR
    assert torch.equal(Acceleron.from_pretrained(tmp_path / "model")(ids).logits, rounded)
    assert relative_error(rounded, original) > 20 * MAX_ERROR  # the rounding is visible
    size = (tmp_path / "model" / "model.safetensors").stat().st_size
    assert size < 2.2 * sum(weight.numel() for weight in model.parameters())


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory):
    """(our tokenizer, that of transformers)."""
    directory, ours = tmp_path_factory.mktemp("tokenizer"), small_tokenizer()
    random_model(num_layers=1).save_pretrained(directory, ours)
    return ours, AutoTokenizer.from_pretrained(directory)


@pytest.mark.parametrize("text", STRINGS)
def test_token_ids_are_equal(tokenizers, text):
    ours, theirs = tokenizers
    ids = ours.encode(text, add_special_tokens=False).ids
    assert theirs(text).input_ids == theirs.encode(text) == ids
    assert theirs.decode(ids) == ours.decode(ids, skip_special_tokens=False) == text
    assert theirs.decode(ids, skip_special_tokens=True) == ours.decode(ids)


def test_special_tokens(tokenizers):
    ours, theirs = tokenizers
    assert (theirs.bos_token, theirs.eos_token, theirs.pad_token) == ("<|endoftext|>", "<|endoftext|>", "<|pad|>")
    assert (theirs.bos_token_id, theirs.eos_token_id, theirs.pad_token_id, theirs.unk_token) == (0, 0, 1, None)
    assert len(theirs) == ours.get_vocab_size() == len(theirs.get_vocab())
    assert theirs.model_max_length == 64
    assert theirs.is_fast


def test_batches_are_padded(tokenizers):
    batch = tokenizers[1](["the", "the rain in spain"], padding=True, return_tensors="pt")
    assert set(batch) == {"input_ids", "attention_mask"}  # what generate() accepts
    lengths = batch.attention_mask.sum(dim=1).tolist()
    assert lengths[0] < lengths[1] == batch.input_ids.shape[1]
    assert batch.input_ids[0, lengths[0] :].tolist() == [1] * (lengths[1] - lengths[0])


def test_tokenizers_that_add_tokens_do_not(tmp_path):
    """In training, no special tokens are added, whatever the post-processor of the tokenizer."""
    tokenizer = small_tokenizer()
    special = [("<|endoftext|>", 0)]
    tokenizer.post_processor = processors.TemplateProcessing(single="<|endoftext|> $A", special_tokens=special)
    random_model(num_layers=1).save_pretrained(tmp_path / "model", tokenizer)
    other = AutoTokenizer.from_pretrained(tmp_path / "model")
    assert tokenizer.encode("the rain").ids[0] == 0
    assert other("the rain").input_ids == tokenizer.encode("the rain", add_special_tokens=False).ids


def test_text_generation_pipeline(exported):
    model, directory = exported
    pipeline = transformers.pipeline("text-generation", model=str(directory), device="cpu")
    tokenizer = small_tokenizer()
    (result,) = pipeline("the rain", max_new_tokens=8, do_sample=False, return_full_text=False)
    ids = generate(model, tokenizer.encode("the rain").ids, 8, Sampling(temperature=0), stop_id=0)
    assert result["generated_text"] == tokenizer.decode(list(ids))
