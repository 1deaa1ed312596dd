"""Renew the line numbers of docs/equations.md.

    python -m bench.equations

A link there is [file:line](path#Lline), and the text in backticks behind it stands in that line.
"""

import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "equations.md"
LINK = re.compile(r"\[[\w.]+:\d+\]\(\.\./([\w./]+)#L(\d+)\) `([^`]+)`")


def link(path: str, text: str) -> str:
    """The link to the first line of a file that contains a text; ValueError if none does."""
    for number, line in enumerate((ROOT / path).read_text("utf-8").splitlines(), 1):
        if text in line:
            return f"[{Path(path).name}:{number}](../{path}#L{number}) `{text}`"
    raise ValueError(f"{path} has no line with {text!r}")


def main():
    text = PAGE.read_text("utf-8")
    PAGE.write_text(LINK.sub(lambda x: link(x[1], x[3]), text), "utf-8")


if __name__ == "__main__":
    main()
