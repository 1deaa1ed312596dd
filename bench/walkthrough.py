"""Run the code of docs/walkthrough.md and store what it prints, in the page and as a notebook.

python -m bench.walkthrough
"""

import contextlib
import io
import json
import re
from pathlib import Path

PAGE = Path(__file__).parents[1] / "docs" / "walkthrough.md"
BLOCK = re.compile(r"```python\n(.*?)```\n(?:\n```text\n(.*?)```\n)?", re.DOTALL)


def read_parts(text: str) -> list[tuple[str, str]]:
    """[("text" | "code", content)] of the page in order; stored outputs are left out."""
    parts, place = [], 0
    for match in BLOCK.finditer(text):
        parts += [("text", text[place : match.start()].strip()), ("code", match[1].strip("\n"))]
        place = match.end()
    return [*parts, ("text", text[place:].strip())]


def run_code(parts: list[tuple[str, str]]) -> list[str]:
    """What each block prints, one after the other in one namespace."""
    namespace, printed = {"__name__": "walkthrough"}, []
    for kind, content in parts:
        if kind == "code":
            output = io.StringIO()
            with contextlib.redirect_stdout(output):
                exec(compile(content, PAGE.name, "exec"), namespace)
            printed.append(output.getvalue())
    return printed


def write_page(parts, printed: list[str]) -> str:
    outputs, pieces = iter(printed), []
    for kind, content in parts:
        if kind == "text":
            pieces.append(content)
        else:
            output = next(outputs)
            stored = f"\n\n```text\n{output}```" if output else ""
            pieces.append(f"```python\n{content}\n```{stored}")
    return "\n\n".join(pieces) + "\n"


def write_notebook(parts, printed: list[str]) -> str:
    outputs, cells = iter(printed), []
    for number, (kind, content) in enumerate(parts):
        cell = {"id": f"cell{number}", "metadata": {}, "source": content.splitlines(True)}
        if kind == "text":
            cells.append(cell | {"cell_type": "markdown"})
            continue
        stream = {"output_type": "stream", "name": "stdout", "text": next(outputs).splitlines(True)}
        stored = [stream] if stream["text"] else []
        cells.append(cell | {"cell_type": "code", "execution_count": None, "outputs": stored})
    # The blocks want the repository's root as working directory and on the path.
    start = ["import os\n", "import sys\n", 'os.chdir("..")\n', 'sys.path.insert(0, ".")']
    first = {"cell_type": "code", "id": "start", "metadata": {}, "source": start}
    cells.insert(0, first | {"execution_count": None, "outputs": []})
    kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
    book = {"cells": cells, "metadata": {"kernelspec": kernel}, "nbformat": 4, "nbformat_minor": 5}
    return json.dumps(book, indent=1) + "\n"


def main():
    parts = read_parts(PAGE.read_text("utf-8"))
    printed = run_code(parts)
    PAGE.write_text(write_page(parts, printed), "utf-8")
    PAGE.with_suffix(".ipynb").write_text(write_notebook(parts, printed), "utf-8")


if __name__ == "__main__":
    main()
