"""Describe files of rows and list unusable rows, or split a file into training and test rows.

    python -m nanocascade.data ROWS.jsonl ...
    python -m nanocascade.data ROWS.jsonl --split 0.1     ROWS.jsonl.train and ROWS.jsonl.test

A row is a test row if the first 32 bits of the SHA-256 of its prompt, as a share of 2^32, are below
the share of --split. So equal prompts stay together, and a row keeps its side as a file grows.
"""

import hashlib
import json
import re
import sys
from collections import Counter, defaultdict

from nanocascade.cli import run_main
from nanocascade.data.rows import conversation, read_rows
from nanocascade.files import write_text_atomic


def is_test_row(row: dict, share: float) -> bool:
    """Whether a row belongs to the test split, by the hash of its prompt's messages."""
    prompt = json.dumps([[x["role"], x["content"]] for x in conversation(row)[0]])
    digest = hashlib.sha256(prompt.encode()).digest()
    return int.from_bytes(digest[:4], "big") < share * 2**32


def describe(paths: list[str]) -> None:
    """Print rows by domain, prompt lengths in characters, and unusable rows with the reason."""
    lengths, problems = defaultdict(list), []
    for row in read_rows(paths, sft=None, problems=problems):
        lengths[row["domain"]].append(sum(len(x["content"]) for x in conversation(row)[0]))
    for domain, sizes in sorted(lengths.items()):
        middle, longest = sorted(sizes)[len(sizes) // 2], max(sizes)
        print(f"{domain}: {len(sizes)} rows, prompts of {middle} characters (at most {longest})")
    servers = Counter(re.findall(r"is for (\S+), which is no verifier", "\n".join(problems)))
    for name, count in servers.most_common():
        print(f"{count} rows are for {name}, which is no verifier of ours")
    print(f"{len(problems)} rows cannot be used", *problems, sep="\n  ")


def split(path: str, share: float) -> None:
    """Write the usable rows of a file, in one form, to PATH.train and PATH.test."""
    if not 0 < share < 1:
        raise ValueError(f"--split {share}: expected a share between 0 and 1")
    parts, problems = {False: [], True: []}, []
    for row in read_rows(path, sft=None, problems=problems):
        line = json.dumps(row, ensure_ascii=False) + "\n"
        parts[is_test_row(row, share)].append(line)
    for test, name in ((False, "train"), (True, "test")):
        write_text_atomic(f"{path}.{name}", "".join(parts[test]))
        print(f"{path}.{name}: {len(parts[test])} rows")
    print(f"{len(problems)} rows cannot be used", *problems, sep="\n  ")


def main(arguments: list[str]) -> None:
    paths = [str(x) for x in arguments]
    if "--split" not in paths:
        describe(paths)
        return
    place = paths.index("--split")
    try:
        share = float(paths[place + 1])
    except (IndexError, ValueError):
        raise ValueError("--split needs a share, as in --split 0.1") from None
    for path in paths[:place] + paths[place + 2 :]:
        split(path, share)


if __name__ == "__main__":
    run_main(lambda: main(sys.argv[1:]))
