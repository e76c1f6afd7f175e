"""python docs/flags.py writes docs/flags.md, a table of what `python train.py --help` prints."""

import re
from contextlib import redirect_stdout, suppress
from io import StringIO
from pathlib import Path
from unittest import mock

from acceleron.training.options import parse_options

PAGE = Path(__file__).with_suffix(".md")
HEAD = """# Flags of train.py

`python docs/flags.py` writes this page from `python train.py --help`.

| flag | |
| --- | --- |
"""


def page() -> str:
    with mock.patch.dict("os.environ", COLUMNS="1000"), redirect_stdout(StringIO()) as text, suppress(SystemExit):
        parse_options(["--help"])
    flags = re.findall(r"^  (--\w+(?: \{\S+\})?)(?: [A-Z_]+)?\s+(\S.*)$", text.getvalue(), re.MULTILINE)
    return HEAD + "".join(f"| `{flag}` | {meaning} |\n" for flag, meaning in flags)


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
