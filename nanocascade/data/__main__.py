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
from dataclasses import dataclass

from nanocascade.cli import Share, parse_args, run_main
from nanocascade.data.rows import conversation, read_rows
from nanocascade.files import write_text_atomic


@dataclass
class Config:
    """Flags"""

    files: tuple[str, ...] = ()  # JSONL files of rows
    split: Share = 0.0  # share of test rows (0 = describe the files)


def is_test_row(row: dict, share: float) -> bool:
    """Whether a row belongs to the test split, by the hash of its prompt's messages."""
    prompt = json.dumps([[x["role"], x["content"]] for x in conversation(row)[0]])
    digest = hashlib.sha256(prompt.encode()).digest()
    return int.from_bytes(digest[:4], "big") < share * 2**32


def describe(paths: tuple[str, ...], problems: list[str]) -> None:
    """Print rows by domain, prompt lengths in characters, and the servers of unusable rows."""
    lengths = defaultdict(list)
    for row in read_rows(paths, sft=None, problems=problems):
        lengths[row["domain"]].append(sum(len(x["content"]) for x in conversation(row)[0]))
    for domain, sizes in sorted(lengths.items()):
        middle, longest = sorted(sizes)[len(sizes) // 2], max(sizes)
        print(f"{domain}: {len(sizes)} rows, prompts of {middle} characters (at most {longest})")
    servers = Counter(re.findall(r"is for (\S+), which is no verifier", "\n".join(problems)))
    for name, count in servers.most_common():
        print(f"{count} rows are for {name}, which is no verifier of ours")


def split(path: str, share: float, problems: list[str]) -> None:
    """Write the usable rows of a file, in one form, to PATH.train and PATH.test."""
    parts = {"train": [], "test": []}
    for row in read_rows(path, sft=None, problems=problems):
        name = "test" if is_test_row(row, share) else "train"
        parts[name].append(json.dumps(row, ensure_ascii=False) + "\n")
    for name, lines in parts.items():
        write_text_atomic(f"{path}.{name}", "".join(lines))
        print(f"{path}.{name}: {len(lines)} rows")


def main(argv: list[str]) -> None:
    (cfg,) = parse_args(Config, argv=[str(x) for x in argv], positional="files")
    if not cfg.files:
        raise ValueError("no file: python -m nanocascade.data ROWS.jsonl ...")
    problems: list[str] = []
    for path in cfg.files if cfg.split else ():
        split(path, cfg.split, problems)
    if not cfg.split:
        describe(cfg.files, problems)
    print(f"{len(problems)} rows cannot be used", *problems, sep="\n  ")


if __name__ == "__main__":
    run_main(lambda: main(sys.argv[1:]))
