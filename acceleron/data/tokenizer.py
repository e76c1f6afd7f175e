"""Loads, validates and trains tokenizers, splits documents, and counts the bytes of tokens."""

import json
import re
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from itertools import islice
from operator import itemgetter
from pathlib import Path

import numpy as np
from tokenizers import Encoding, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from ..config import MAX_VOCAB_SIZE, short_repr
from ..errors import InputError, path_error

END_OF_TEXT = "<|endoftext|>"
PAD = "<|pad|>"
MIN_VOCAB_SIZE = 256 + 2  # every byte and the two special tokens

MAX_FILE_BYTES = 64 << 20  # the largest tokenizers of published models are 35 MB
# Supported components. The library has more, but a hostile file can make some of them allocate too much memory, crash
# or hang (Precompiled, FixedLength, CTC). A very long sequence of supported components can do the same.
SUPPORTED = {
    "normalizer": "Sequence NFC NFD NFKC NFKD Lowercase StripAccents Strip Prepend Replace BertNormalizer ByteLevel",
    "pre_tokenizer": "Sequence ByteLevel Split Digits Punctuation Whitespace WhitespaceSplit Metaspace "
    "BertPreTokenizer CharDelimiterSplit UnicodeScripts",
    "post_processor": "Sequence ByteLevel TemplateProcessing RobertaProcessing BertProcessing",
    "decoder": "Sequence ByteLevel BPEDecoder ByteFallback Fuse Metaspace Replace Strip WordPiece",
}
CHILDREN = ("normalizers", "pretokenizers", "processors", "decoders")  # the keys of a Sequence's components
MAX_COMPONENTS = 16
# Limits for added and Unigram tokens. The library stores them in tries that need up to 350 bytes per character.
MAX_TOKEN_LENGTH, MAX_TOTAL_TOKEN_LENGTH = 1000, 4 << 20


def load_tokenizer(path: str | Path) -> Tokenizer:
    """Load a tokenizer.json in the format of the tokenizers library.

    Raises InputError if the file is missing or invalid, has no end-of-text token, or could exhaust memory or time. Such
    files are never passed to the library, because some would crash the process.
    """
    if not Path(path).exists() and re.fullmatch(r"(\w[\w.-]*/)?\w[\w.-]*(?<!\.json)", str(path)):
        raise InputError(
            f"--tokenizer {path} does not exist, and Hub model names are not supported yet: "
            f"run `hf download {path} tokenizer.json --local-dir .` and pass --tokenizer tokenizer.json"
        )
    if not Path(path).is_file():
        raise path_error("--tokenizer", path, "file")
    try:
        with open(path, "rb") as file:
            content = file.read(MAX_FILE_BYTES + 1)
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from error
    if len(content) > MAX_FILE_BYTES:
        raise InputError(f"{path}: larger than {MAX_FILE_BYTES >> 20} MiB, so not a tokenizer; use a different file")
    try:
        _check(json.loads(content, object_pairs_hook=unique_keys))
        tokenizer = Tokenizer.from_buffer(content)
        # A file can enable truncation and padding, which would silently change the text.
        tokenizer.no_truncation()
        tokenizer.no_padding()
        tokenizer.encode("")  # fails if the post-processor fails on every text
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # tokenizers raises Exception, and pyo3's PanicException, a BaseException
        reason = repr(str(error)[:200])[1:-1] or type(error).__name__  # one line, with control characters escaped
        raise InputError(f"{path}: not a valid tokenizer.json ({reason}); use a different file") from error
    if tokenizer.token_to_id(END_OF_TEXT) is None:
        raise InputError(f"{path}: has no document separator {END_OF_TEXT}; use a tokenizer that has one")
    if num_ids(tokenizer) > MAX_VOCAB_SIZE:
        raise InputError(f"{path}: has the token id {num_ids(tokenizer) - 1}, but ids must be below {MAX_VOCAB_SIZE}")
    return tokenizer


def num_ids(tokenizer: Tokenizer) -> int:
    """The largest id plus one. It can exceed the number of entries, because ids can have gaps."""
    return max(tokenizer.get_vocab().values()) + 1


def vocabulary(tokenizer: Tokenizer) -> tuple:
    """Ids and merges, to compare tokenizers. Equal ones can be different files: an export writes the file again."""
    return tokenizer.get_vocab(), json.loads(tokenizer.to_str())["model"].get("merges")


def encode(tokenizer: Tokenizer, texts: list[str]) -> list[list[int]]:
    """Encode the texts on all cores, without special tokens. Raises InputError if the tokenizer cannot encode them."""
    return [encoding.ids for encoding in _encode_batch(tokenizer.encode_batch_fast, texts)]


def _encode_batch(encode_batch: Callable, texts: list[str]) -> list[Encoding]:
    try:
        return encode_batch(texts, add_special_tokens=False)
    except Exception as error:  # for example, a word-level model without its unknown token
        raise InputError(f"the tokenizer cannot encode this text ({error}): use a different tokenizer") from error


def unique_keys(pairs: list[tuple]) -> dict:
    """An object_pairs_hook for json. Raises ValueError for duplicate keys, because parsers handle them differently."""
    values = dict(pairs)
    if len(values) < len(pairs):
        raise ValueError("duplicate key in an object")
    return values


def _check(document):
    """Raise ValueError for a file that could crash the library. The library itself reports harmless errors."""
    model = document.get("model") if isinstance(document, dict) else None
    if not isinstance(model, dict):
        raise ValueError("no model")
    if "merges" in model and model.get("continuing_subword_prefix"):
        raise ValueError("a BPE model with a continuing_subword_prefix is not supported")
    tokens = [token.get("content") for token in document.get("added_tokens") or []]
    if isinstance(model.get("vocab"), list):  # a Unigram model
        tokens += [token for token, _ in model["vocab"]]
    lengths = [len(token) for token in tokens]
    if max(lengths, default=0) > MAX_TOKEN_LENGTH or sum(lengths) > MAX_TOTAL_TOKEN_LENGTH:
        raise ValueError("its tokens are too long")
    components = [(role, document[role]) for role in SUPPORTED if document.get(role) is not None]
    for count, (role, component) in enumerate(components, 1):  # breadth first: the loop appends children
        kind = component.get("type")
        if kind not in SUPPORTED[role].split():
            raise ValueError(f"a {role} of type {short_repr(kind)} is not supported")
        if count > MAX_COMPONENTS:
            raise ValueError(f"more than {MAX_COMPONENTS} normalizers, pre-tokenizers, post-processors and decoders")
        if kind == "Replace":
            pattern, replacement = component["pattern"].get("String"), component["content"]
            if not pattern or len(replacement) > len(pattern):
                raise ValueError("a Replace must replace a String with one of at most the same length")
        if role == "decoder" and kind == "Strip" and component["stop"] != 0:
            raise ValueError("a Strip at the end of tokens is not supported")
        components += [(role, child) for key in CHILDREN for child in component.get(key) or []]


def find_tokenizer(explicit: str | None, *directories: Path | None) -> Path | None:
    """Return `explicit`, or the first tokenizer.json or pile_tokenizer.json in the directories, or None."""
    if explicit:
        return Path(explicit)
    candidates = [Path(d) / name for d in directories if d for name in ("tokenizer.json", "pile_tokenizer.json")]
    return next((path for path in candidates if path.exists()), None)


def train_tokenizer(documents: Iterable[str], vocab_size: int) -> Tokenizer:
    """Train a byte-level BPE with at most vocab_size entries, with `<|endoftext|>` 0 and `<|pad|>` 1."""
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
        show_progress=False,  # it prints to stdout and panics on a full disk
    )
    _run_in_thread(lambda: tokenizer.train_from_iterator(documents, trainer))
    return tokenizer


def _run_in_thread(function: Callable[[], None]):
    """Run a long native call in a thread, so the main thread can run signal handlers."""
    finished = Future()

    def work():
        try:
            finished.set_result(function())
        except BaseException as error:
            finished.set_exception(error)

    threading.Thread(target=work, daemon=True).start()
    finished.result()


BYTE_TOKEN = re.compile("<0x[0-9A-F]{2}>")
# Text and code with the characters that some tokenizers drop, insert or replace: spaces, line breaks, tabs, digits,
# punctuation. The last one is NFC; NFD, NFKC, NFKD, Lowercase and StripAccents each change its byte count.
SAMPLES = (
    "The rain in Spain, 1984: it isn't over.  Two spaces, then a line break.\n\nNew paragraph.\n",
    "def area(x1, y2):\n    if x1 >= 0:\n\treturn {'a': x1*y2 + 3.14}  # [units]\n",
    "name\tcount\r\nQuartz & jug\t1,250%\r\n",
    "“STRAẞE” – it’s ½ café… x̄ ≥ ①, ﬁne Ａｂ１, Ἀθῆναι, 数据 🙂\n",
)


class ByteCounter:
    """Counts the UTF-8 bytes of the text that a sequence of tokens encodes.

    Attributes:
        table: int64 [2, vocab_size]. Row 0 has each id's bytes inside a document. Row 1 has them at the start of one,
            where some tokenizers insert a space that is not in the text. Special tokens and missing ids count as 0.
        exact: whether the counts of SAMPLES are correct. If False, do not use the counts: the tokenizer drops,
            inserts or replaces characters. An NFC tokenizer is exact: it counts the bytes of the NFC text.
    """

    def __init__(self, tokenizer: Tokenizer, vocab_size: int):
        self.end_id = tokenizer.token_to_id(END_OF_TEXT)
        self.table = np.zeros((2, vocab_size), dtype=np.int64)
        added = {token.content: token.special for token in tokenizer.get_added_tokens_decoder().values()}
        added[END_OF_TEXT] = True
        ids = {token: index for token, index in tokenizer.get_vocab().items() if index < vocab_size}
        parts = b"".join(part.__getstate__() for part in (tokenizer.normalizer, tokenizer.pre_tokenizer) if part)
        if b'"ByteLevel"' in parts:
            mark = "Ġ" if b'"add_prefix_space":true' in parts else None
            for token, index in ids.items():
                # Byte-level tokens have one character per byte. Added tokens are plain text.
                length = len(token.encode()) if token in added else len(token)
                self.table[:, index] = 0 if added.get(token) else (length, length - (token[0] == mark))
        else:
            self._fill_decoded(tokenizer, ids, added)
        self.exact = self._counts_samples(tokenizer)

    def _counts_samples(self, tokenizer: Tokenizer) -> bool:
        try:
            encoded = [np.array([[self.end_id, *ids]]) for ids in encode(tokenizer, list(SAMPLES))]
        except InputError:
            return False
        return all(
            ids[:, 1:].max(initial=0) < self.table.shape[1] and self.count(ids) == len(sample.encode())
            for ids, sample in zip(encoded, SAMPLES, strict=True)
        )

    def _fill_decoded(self, tokenizer: Tokenizer, ids: dict[str, int], added: dict[str, bool]):
        decoded = []
        for token, index in ids.items():
            if BYTE_TOKEN.fullmatch(token):
                self.table[:, index] = 1
            elif not added.get(token):
                decoded.append((token, index))
        if decoded:
            self._decode(tokenizer, sorted(decoded, key=itemgetter(1)))

    def _decode(self, tokenizer: Tokenizer, tokens: list[tuple[str, int]]):
        """Fill the table with the number of bytes that each token adds to the decoded text next to a known token."""

        def lengths(sequences: list[list[int]]) -> np.ndarray:
            return np.array([len(text.encode()) for text in tokenizer.decode_batch(sequences)])

        word = max(tokens, key=lambda token: token[0].isalnum())[1]  # the first alphanumeric token, if any
        alone, pair = lengths([[word], [word, word]])
        ids = [index for _, index in tokens]
        inside = lengths([[word, index, word] for index in ids]) - pair
        first = lengths([[index, word] for index in ids]) - (pair - alone)
        self.table[:, ids] = np.maximum([inside, first], 0)

    def count(self, ids: np.ndarray) -> int:
        """Count the bytes of all but the first token per row. ids: integer array (rows, tokens)."""
        return int(self.table[(ids[:, :-1] == self.end_id).astype(int), ids[:, 1:]].sum())


# Most pre-tokenizers start words here. Tokenizers from train_tokenizer do so at every match of the first pattern.
_WORD_START = re.compile(r"(?=[ \t\n]\S)")
_WORD_OR_LINE_START = re.compile(r"(?=[ \t\n]\S)|(?<=[\r\n])(?=\S)")
SPLIT_CONTEXT = 1024  # characters to check on either side of a split; at least MAX_TOKEN_LENGTH
MAX_SPLITS_TRIED = 64


def split_document(document: str, size: int, tokenizer: Tokenizer | None = None) -> Iterator[str]:
    """Yield pieces of about `size` characters. Their concatenated tokens equal the tokens of the whole document.

    If there is no safe split, the rest is one piece. Without `tokenizer`, a tokenizer from train_tokenizer is assumed.
    """
    start, pattern = 0, _WORD_OR_LINE_START if tokenizer else _WORD_START
    while len(document) - start > size:
        ends = (match.start() for match in islice(pattern.finditer(document, start + size), MAX_SPLITS_TRIED))
        # Also try to drop the space at the split: a tokenizer that inserts a space before every text restores it.
        splits = ((end, resume) for end in ends for resume in (end, end + 1))
        split = next((s for s in splits if tokenizer is None or _is_safe_split(tokenizer, document, *s)), None)
        if split is None:
            break
        yield document[start : split[0]]
        start = split[1]
    yield document[start:]


def _is_safe_split(tokenizer: Tokenizer, document: str, end: int, resume: int) -> bool:
    """Return whether the split keeps the surrounding tokens and no token can span it.

    A token never spans two pre-tokenizer words, or two characters that are not adjacent in any vocabulary entry.
    """
    left, right = document[max(0, end - SPLIT_CONTEXT) : end], document[end : end + SPLIT_CONTEXT]
    whole, before, after = _encode_batch(tokenizer.encode_batch, [left + right, left, right[resume - end :]])
    boundary = len(before.ids)
    if whole.ids != before.ids + after.ids or not before.ids or not after.ids:
        return False
    if whole.word_ids[boundary - 1] != whole.word_ids[boundary]:
        return True
    adjacent = whole.tokens[boundary - 1][-1] + whole.tokens[boundary][0]
    return not any(adjacent in token for token in tokenizer.get_vocab())
