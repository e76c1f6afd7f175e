"""Tokenizer files: finding, checking, training one, and the bytes that each token stands for."""

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

MAX_FILE_BYTES = 64 << 20  # the largest tokenizers of published models take 35 MB
# What may stand around the model, by its place in the file. The library has more, some of which reserve memory, crash
# or hang at the word of a file (Precompiled, FixedLength, CTC), as does much of this in too long a sequence.
PARTS = {
    "normalizer": "Sequence NFC NFD NFKC NFKD Lowercase StripAccents Strip Prepend Replace BertNormalizer ByteLevel",
    "pre_tokenizer": "Sequence ByteLevel Split Digits Punctuation Whitespace WhitespaceSplit Metaspace "
    "BertPreTokenizer CharDelimiterSplit UnicodeScripts",
    "post_processor": "Sequence ByteLevel TemplateProcessing RobertaProcessing BertProcessing",
    "decoder": "Sequence ByteLevel BPEDecoder ByteFallback Fuse Metaspace Replace Strip WordPiece",
}
CHILDREN = ("normalizers", "pretokenizers", "processors", "decoders")  # the keys under which a Sequence has its parts
MAX_PARTS = 16
# Of added tokens, and of a Unigram model's: the library searches for them with tries, of up to 350 bytes a character.
MAX_TOKEN_LENGTH, MAX_TRIE_LENGTH = 1000, 4 << 20


def load_tokenizer(path: str | Path) -> Tokenizer:
    """Raises InputError if the file is absent, not a tokenizers file, lacks the end-of-text token, or is absurd.

    Absurd is what would take memory or time out of proportion to its use; such a file never reaches the library, in
    which some of them end the process.
    """
    if not Path(path).exists() and re.fullmatch(r"(\w[\w.-]*/)?\w[\w.-]*(?<!\.json)", str(path)):
        raise InputError(
            f"--tokenizer {path} does not exist, and names of the hub are not supported yet: "
            f"`hf download {path} tokenizer.json --local-dir .`, then --tokenizer tokenizer.json"
        )
    if not Path(path).is_file():
        raise path_error("--tokenizer", path, "file")
    try:
        with open(path, "rb") as file:
            content = file.read(MAX_FILE_BYTES + 1)
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from error
    if len(content) > MAX_FILE_BYTES:
        raise InputError(f"{path}: larger than {MAX_FILE_BYTES >> 20} MiB, so no tokenizer; name another file")
    try:
        _check(json.loads(content, object_pairs_hook=reject_duplicate_keys))
        tokenizer = Tokenizer.from_buffer(content)
        # A file may ask for either; text would silently be cut off or padded.
        tokenizer.no_truncation()
        tokenizer.no_padding()
        tokenizer.encode("")  # fails if the post-processor would fail on every text
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # tokenizers raises plain Exception, and pyo3's PanicException, which is none
        reason = repr(str(error)[:200])[1:-1] or type(error).__name__  # one line, without what a terminal would act on
        raise InputError(f"{path}: not a usable file of the tokenizers library ({reason}); name another one") from error
    if tokenizer.token_to_id(END_OF_TEXT) is None:
        raise InputError(f"{path}: lacks the token {END_OF_TEXT}, which separates documents")
    if num_ids(tokenizer) > MAX_VOCAB_SIZE:
        raise InputError(f"{path}: has the token id {num_ids(tokenizer) - 1}, but ids must be below {MAX_VOCAB_SIZE}")
    return tokenizer


def num_ids(tokenizer: Tokenizer) -> int:
    """One more than its largest id, which may be above the number of its entries."""
    return max(tokenizer.get_vocab().values()) + 1


def encode(tokenizer: Tokenizer, texts: list[str]) -> list[list[int]]:
    """Their ids, without what a post-processor would add, on all cores. Raises InputError for what it can't encode."""
    return [encoding.ids for encoding in _attempt(tokenizer.encode_batch_fast, texts)]


def _attempt(encode_batch: Callable, texts: list[str]) -> list[Encoding]:
    try:
        return encode_batch(texts, add_special_tokens=False)
    except Exception as error:  # of a word-level model that lacks its unknown token, for one
        raise InputError(f"the tokenizer can't encode this text ({error}): use another one") from error


def reject_duplicate_keys(pairs: list[tuple]) -> dict:
    """Of a key that comes twice, another reader might take the other value."""
    values = dict(pairs)
    if len(values) < len(pairs):
        raise ValueError("duplicate key in an object")
    return values


def _check(document):
    """Refuse, by a ValueError, what the library would not survive; what is merely wrong it refuses itself."""
    model = document.get("model") if isinstance(document, dict) else None
    if not isinstance(model, dict):
        raise ValueError("it has no model")
    if "merges" in model and model.get("continuing_subword_prefix"):
        raise ValueError("a BPE model with a continuing_subword_prefix is not supported")
    tries = [token.get("content") for token in document.get("added_tokens") or []]
    if isinstance(model.get("vocab"), list):  # a Unigram model's
        tries += [token for token, _ in model["vocab"]]
    lengths = [len(token) for token in tries]
    if max(lengths, default=0) > MAX_TOKEN_LENGTH or sum(lengths) > MAX_TRIE_LENGTH:
        raise ValueError("its tokens are too long")
    parts = [(place, document[place]) for place in PARTS if document.get(place) is not None]
    for count, (place, part) in enumerate(parts, 1):  # the list grows: breadth first
        kind = part.get("type")
        if kind not in PARTS[place].split():
            raise ValueError(f"a {place} of type {short_repr(kind)} is not supported")
        if count > MAX_PARTS:
            raise ValueError(f"more than {MAX_PARTS} normalizers, pre-tokenizers, post-processors and decoders")
        if kind == "Replace":
            pattern, replacement = part["pattern"].get("String"), part["content"]
            if not pattern or len(replacement) > len(pattern):
                raise ValueError("a Replace must be of a String by one that is no longer")
        if place == "decoder" and kind == "Strip" and part["stop"] != 0:
            raise ValueError("a Strip at the end of tokens is not supported")
        parts += [(place, child) for key in CHILDREN for child in part.get(key) or []]


def find_tokenizer(explicit: str | None, *directories: Path | None) -> Path | None:
    """The tokenizer asked for, or tokenizer.json in the first directory that has one, or pile_tokenizer.json there."""
    if explicit:
        return Path(explicit)
    candidates = [Path(d) / name for d in directories if d for name in ("tokenizer.json", "pile_tokenizer.json")]
    return next((path for path in candidates if path.exists()), None)


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
        show_progress=False,  # it goes to stdout, and panics if that is full
    )
    _run_in_thread(lambda: tokenizer.train_from_iterator(documents, trainer))
    return tokenizer


def _run_in_thread(function: Callable[[], None]):
    """Run a library's function for which a signal should not wait: Python's handlers run only in the main thread."""
    finished = Future()

    def work():
        try:
            finished.set_result(function())
        except BaseException as error:
            finished.set_exception(error)

    threading.Thread(target=work, daemon=True).start()
    finished.result()


_BYTE_TOKEN = re.compile("<0x[0-9A-F]{2}>")
# Text and code, with what some tokenizers lose, insert or replace: spaces, line breaks, tabs, digits, punctuation. The
# last one is NFC; NFD, NFKC, NFKD, Lowercase and StripAccents each change the number of its bytes.
SAMPLES = (
    "The rain in Spain, 1984: it isn't over.  Two spaces, then a line break.\n\nNew paragraph.\n",
    "def area(x1, y2):\n    if x1 >= 0:\n\treturn {'a': x1*y2 + 3.14}  # [units]\n",
    "name\tcount\r\nQuartz & jug\t1,250%\r\n",
    "“STRAẞE” – it’s ½ café… x̄ ≥ ①, ﬁne Ａｂ１, Ἀθῆναι, 数据 🙂\n",
)


class ByteCounter:
    """Counts the UTF-8 bytes of the text that tokens stand for.

    `table` is int64 [2, vocab_size]: the bytes of each id within a document, and as the first one of a document, where
    some tokenizers put a space that is not in the text. Special tokens and ids without an entry have 0.

    `exact` is whether the counts of SAMPLES are right. They are wrong if the tokenizer loses, inserts or replaces
    characters, such as spaces, accents or those it has no token for: do not use its counts. A tokenizer that normalizes
    to NFC is exact; its counts are the bytes of the NFC text.
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
                # Byte-level tokens are written with one character per byte, but for those that were added.
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
            if _BYTE_TOKEN.fullmatch(token):
                self.table[:, index] = 1
            elif not added.get(token):
                decoded.append((token, index))
        if decoded:
            self._decode(tokenizer, sorted(decoded, key=itemgetter(1)))

    def _decode(self, tokenizer: Tokenizer, tokens: list[tuple[str, int]]):
        """Fill the table with the bytes that each token adds to the decoded text between two known tokens."""

        def lengths(sequences: list[list[int]]) -> np.ndarray:
            return np.array([len(text.encode()) for text in tokenizer.decode_batch(sequences)])

        around = max(tokens, key=lambda token: token[0].isalnum())[1]  # the first that is a word, if any is
        alone, pair = lengths([[around], [around, around]])
        ids = [index for _, index in tokens]
        within = lengths([[around, index, around] for index in ids]) - pair
        first = lengths([[index, around] for index in ids]) - (pair - alone)
        self.table[:, ids] = np.maximum([within, first], 0)

    def count(self, ids: np.ndarray) -> int:
        """Of all but the first token of each row: ids is an integer array (rows, tokens)."""
        return int(self.table[(ids[:, :-1] == self.end_id).astype(int), ids[:, 1:]].sum())


# Where a word of most pre-tokenizers begins; the one of train_tokenizer begins one at each of the first kind.
_WORD_START = re.compile(r"(?=[ \t\n]\S)")
_WORD_OR_LINE_START = re.compile(r"(?=[ \t\n]\S)|(?<=[\r\n])(?=\S)")
CUT_CONTEXT = 1024  # characters on either side that decide whether a cut is safe; added tokens are no longer than this
MAX_CUTS_TRIED = 64


def split_document(document: str, size: int, tokenizer: Tokenizer | None = None) -> Iterator[str]:
    """A long document in pieces of about `size` characters, whose tokens together are those of the whole.

    Where the tokenizer has no such cut, the rest is one piece. Without a tokenizer they are for one of train_tokenizer.
    """
    start, pattern = 0, _WORD_OR_LINE_START if tokenizer else _WORD_START
    while len(document) - start > size:
        ends = (match.start() for match in islice(pattern.finditer(document, start + size), MAX_CUTS_TRIED))
        # A tokenizer that puts a space before every text restores the one that is left out between two pieces.
        cuts = ((end, following) for end in ends for following in (end, end + 1))
        cut = next((cut for cut in cuts if tokenizer is None or _is_safe(tokenizer, document, *cut)), None)
        if cut is None:
            break
        yield document[start : cut[0]]
        start = cut[1]
    yield document[start:]


def _is_safe(tokenizer: Tokenizer, document: str, end: int, following: int) -> bool:
    """Whether the text around has the same tokens with and without the cut, and none could span it anywhere else.

    None can between two words of the pre-tokenizer, or two characters that no entry of the vocabulary joins.
    """
    left, right = document[max(0, end - CUT_CONTEXT) : end], document[end : end + CUT_CONTEXT]
    whole, before, after = _attempt(tokenizer.encode_batch, [left + right, left, right[following - end :]])
    joint = len(before.ids)
    if whole.ids != before.ids + after.ids or not before.ids or not after.ids:
        return False
    if whole.word_ids[joint - 1] != whole.word_ids[joint]:
        return True
    joined = whole.tokens[joint - 1][-1] + whole.tokens[joint][0]
    return not any(joined in token for token in tokenizer.get_vocab())
