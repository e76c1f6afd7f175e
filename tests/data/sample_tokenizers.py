"""Small tokenizers of the kinds used by published models."""

import json
import random

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from acceleron.data.tokenizer import END_OF_TEXT

WORDS = ["the", "rain", "Spain's", "1984", "—", "żółć", "数据", "🙂", "def f(x):\n    return x\n", "};\n", "  ", "\t"]
LLAMA_3 = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


def random_text(seed: int, words: int = 8000) -> str:
    """Text with tokens of many lengths: words, numbers, code, spaces, three scripts, an emoji."""
    draw = random.Random(seed)
    return "".join(draw.choice(WORDS) + draw.choice([" ", " ", "\n", ""]) for _ in range(words)).lstrip()


def _trained(model, trainer, pre_tokenizer, text: str) -> dict:
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizer
    tokenizer.train_from_iterator([text], trainer)
    return json.loads(tokenizer.to_str())


def byte_level(pre_tokenizer) -> Tokenizer:
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=[END_OF_TEXT], initial_alphabet=alphabet)
    tokenizer = Tokenizer.from_str(json.dumps(_trained(models.BPE(), trainer, pre_tokenizer, random_text(0))))
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def byte_fallback(prepend_scheme: str, split: bool = True) -> Tokenizer:
    """A BPE of printable ASCII. All other characters become bytes. Without `split`, tokens can span words."""
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=[END_OF_TEXT, "<unk>"])
    text = "".join(character for character in random_text(0) if " " <= character <= "~")
    document = _trained(models.BPE(), trainer, pre_tokenizers.Metaspace(split=split), text)
    vocab = document["model"]["vocab"]
    vocab |= {f"<0x{byte:02X}>": len(vocab) + byte for byte in range(256)}
    document["model"] |= {"byte_fallback": True, "unk_token": "<unk>", "fuse_unk": True}
    tokenizer = Tokenizer.from_str(json.dumps(document))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=prepend_scheme, split=split)
    tokenizer.decoder = decoders.Sequence(
        [decoders.ByteFallback(), decoders.Metaspace(prepend_scheme=prepend_scheme), decoders.Fuse()]
    )
    return tokenizer


def llama_2() -> Tokenizer:
    """Matches transformers' conversion of a SentencePiece BPE: no pre-tokenizer, a prefix mark, byte fallback."""
    tokenizer = byte_fallback("always")
    tokenizer.pre_tokenizer = None
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return tokenizer


def unigram() -> Tokenizer:
    trainer = trainers.UnigramTrainer(vocab_size=200, special_tokens=[END_OF_TEXT, "<unk>"], unk_token="<unk>")
    document = _trained(models.Unigram(), trainer, pre_tokenizers.Metaspace(), random_text(0))
    tokenizer = Tokenizer.from_str(json.dumps(document))
    tokenizer.decoder = decoders.Metaspace()
    return tokenizer


def word_piece(pre_tokenizer=None) -> Tokenizer:
    trainer = trainers.WordPieceTrainer(vocab_size=300, special_tokens=[END_OF_TEXT, "<unk>"])
    model = models.WordPiece(unk_token="<unk>")
    document = _trained(model, trainer, pre_tokenizer or pre_tokenizers.WhitespaceSplit(), random_text(0))
    tokenizer = Tokenizer.from_str(json.dumps(document))
    tokenizer.decoder = decoders.WordPiece(cleanup=False)
    return tokenizer


def word_bpe() -> Tokenizer:
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=[END_OF_TEXT])
    text = random_text(0) + "".join(chr(code) for code in range(32, 127))
    return Tokenizer.from_str(json.dumps(_trained(models.BPE(), trainer, pre_tokenizers.Whitespace(), text)))


def word_level() -> Tokenizer:
    trainer = trainers.WordLevelTrainer(vocab_size=200, special_tokens=[END_OF_TEXT, "[UNK]"])
    document = _trained(models.WordLevel(unk_token="[UNK]"), trainer, pre_tokenizers.Whitespace(), random_text(0))
    return Tokenizer.from_str(json.dumps(document))


TOKENIZERS = {
    "byte-level": lambda: byte_level(pre_tokenizers.ByteLevel(add_prefix_space=False)),
    "byte-level with a prefix space": lambda: byte_level(pre_tokenizers.ByteLevel(add_prefix_space=True)),
    "Llama 3": lambda: byte_level(
        pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(LLAMA_3), "isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
    ),
    "Llama 2": llama_2,
    "Metaspace always": lambda: byte_fallback("always"),
    "Metaspace first": lambda: byte_fallback("first"),
    "Metaspace never": lambda: byte_fallback("never"),
    "tokens that span words": lambda: byte_fallback("always", split=False),
    "Unigram": unigram,
    "WordPiece": word_piece,
}

# Tokenizers that drop or insert spaces, or replace unknown characters.
INEXACT_TOKENIZERS = {
    "Unigram": unigram,
    "WordPiece": word_piece,
    "WordPiece with BERT's pre-tokenizer": lambda: word_piece(pre_tokenizers.BertPreTokenizer()),
    "word BPE without a decoder": word_bpe,
    "byte-level with a space before each digit run": lambda: byte_level(
        pre_tokenizers.Sequence([pre_tokenizers.Digits(), pre_tokenizers.ByteLevel(add_prefix_space=True)])
    ),
    "WordLevel": word_level,
}
