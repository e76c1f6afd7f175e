import numpy as np

from acceleron.data import Shards
from acceleron.data.tokenizer import load_tokenizer
from bench import corpus


def test_the_shards_hold_pythons_source_and_each_holds_out_a_row(tmp_path):
    corpus.write_corpus(tmp_path, 512, 1_000_000)
    text = load_tokenizer(tmp_path / "tokenizer.json").decode(np.load(tmp_path / "shard_00000.npy")[0].tolist())
    assert text[:300] == corpus.source_files(packages=False)[0].read_text(encoding="utf-8")[:300]
    assert Shards(tmp_path).num_validation_rows.tolist() == [1] * len(list(tmp_path.glob("shard_*"))) > [1, 1, 1]
