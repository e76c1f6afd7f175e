"""Tokenizer files: finding, checking, training one, and the bytes that each token stands for."""

import re
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from ..errors import InputError

END_OF_TEXT = "<|endoftext|>"
PAD = "<|pad|>"
MIN_VOCAB_SIZE = 256 + 2  # every byte and the two special tokens


def load_tokenizer(path: str | Path) -> Tokenizer:
    """Raises InputError if the file is absent, not a tokenizers file, or lacks the end-of-text token."""
    if not Path(path).is_file():
        raise InputError(f"tokenizer {path} does not exist: name one with --tokenizer")
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # tokenizers raises plain Exception
        raise InputError(f"{path}: not a file of the tokenizers library ({error})") from error
    if tokenizer.token_to_id(END_OF_TEXT) is None:
        raise InputError(f"{path}: lacks the token {END_OF_TEXT}, which separates documents")
    # A file may ask for either; text would be cut off, or padding mixed in, without a word.
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def find_tokenizer(explicit: str | None, *directories: Path | None) -> Path | None:
    """The tokenizer asked for, or tokenizer.json in the first directory that has one, or pile_tokenizer.json there."""
    if explicit:
        return Path(explicit)
    candidates = [Path(d) / name for d in directories if d for name in ("tokenizer.json", "pile_tokenizer.json")]
    return next((path for path in candidates if path.is_file()), None)


def train_tokenizer(documents: Iterable[str], vocab_size: int) -> Tokenizer:
    """A byte-level BPE with `<|endoftext|>` 0 and `<|pad|>` 1 that can write any text. At most vocab_size entries."""
    if vocab_size < MIN_VOCAB_SIZE:
        raise InputError(f"--vocab_size {vocab_size}: a byte-level tokenizer needs at least {MIN_VOCAB_SIZE}")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT, PAD],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator(documents, trainer)
    return tokenizer


def token_bytes(tokenizer: Tokenizer, vocab_size: int) -> np.ndarray:
    """int64 [vocab_size]: the bytes of text behind each id; 0 for special tokens and ids without an entry."""
    lengths = np.zeros(vocab_size, dtype=np.int64)
    special = {token.content for token in tokenizer.get_added_tokens_decoder().values() if token.special}
    byte_level = isinstance(tokenizer.decoder, decoders.ByteLevel)
    for token, index in tokenizer.get_vocab().items():
        if token not in special and index < vocab_size:
            # Byte-level tokens are written with one character a byte.
            lengths[index] = len(token) if byte_level else len(tokenizer.decode([index]).encode())
    return lengths


# A newline between two non-spaces: the byte-level pattern always cuts on both sides of it, so pieces cut there
# have the tokens of the whole.
_SAFE_CUT = re.compile(r"(?<=\S)(?=\n\S)")


def pieces(document: str, size: int = 1 << 20) -> Iterator[str]:
    """A long document in pieces of about `size` characters, whose tokens together are those of the whole."""
    start = 0
    while len(document) - start > size:
        cut = _SAFE_CUT.search(document, start + size)
        if cut is None:
            break
        yield document[start : cut.start()]
        start = cut.start()
    yield document[start:]
