"""The documents agree with the code, and with each other."""

import re
import runpy
from dataclasses import fields
from pathlib import Path

from acceleron.training.options import TrainOptions

ROOT = Path(__file__).parents[1]


def test_the_flags_page_is_what_help_prints():
    page = runpy.run_path(str(ROOT / "docs" / "flags.py"))["page"]()
    assert re.findall(r"^\| `--(\w+)", page, re.MULTILINE) == [field.name for field in fields(TrainOptions)]
    assert (ROOT / "docs" / "flags.md").read_text() == page, "run `python docs/flags.py`"


def test_links_between_documents_lead_somewhere():
    documents = [path for path in ROOT.rglob("*.md") if not any(part.startswith(".") for part in path.parts)]
    for document in documents:
        for target in re.findall(r"\]\((?!https?:)([^)#]+)", document.read_text()):
            assert (document.parent / target).exists(), f"{document}: {target}"
    assert len(documents) > 5
