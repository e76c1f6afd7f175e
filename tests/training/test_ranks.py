from ranks import Job, on_ranks
from runs import options, records, shrink_nano

from acceleron.distributed import Ranks


def work(ranks: Ranks):
    return ranks.max(ranks.rank), ranks.gather(ranks.rank), ranks.from_first(lambda: "x")


def test_ranks():
    assert on_ranks(3, work) == [(2, [0, 1, 2], "x")] * 3


def test_job(data_dir, tmp_path):
    job = Job(options(data_dir, tmp_path / "run", batch_size=2), 2, tmp_path / "out", shrink_nano)
    assert job.statuses() == [0, 0], job.output()
    assert len(records(tmp_path / "run")) == 12
    assert job.children[1].output.read_text() == ""
