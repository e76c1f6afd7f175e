"""The documents agree with the code and with each other."""

import re
import runpy
from dataclasses import fields
from pathlib import Path

from acceleron.training.options import TrainOptions

ROOT = Path(__file__).parents[1]


def test_flags_page_matches_the_help_output():
    page = runpy.run_path(str(ROOT / "docs" / "flags.py"))["page"]()
    assert re.findall(r"^\| `--(\w+)", page, re.MULTILINE) == [field.name for field in fields(TrainOptions)]
    assert (ROOT / "docs" / "flags.md").read_text() == page, "run `python docs/flags.py`"


def test_links_between_documents_are_valid():
    documents = [path for folder in ("", "docs", "kernels", "bench") for path in (ROOT / folder).glob("*.md")]
    links = [(path, link) for path in documents for link in re.findall(r"\]\(([^)#]+)", path.read_text())]
    links = [link for link in links if not link[1].startswith(("https:", "../../actions"))]  # the website and CI badge
    assert len(links) > 20
    assert [link for link in links if not (link[0].parent / link[1]).exists()] == []
