from ranks import on_ranks

from acceleron.distributed import Ranks


def work(ranks: Ranks):
    return ranks.max(ranks.rank), ranks.gather(ranks.rank), ranks.from_first(lambda: "x")


def test_ranks():
    assert on_ranks(3, work) == [(2, [0, 1, 2], "x")] * 3
