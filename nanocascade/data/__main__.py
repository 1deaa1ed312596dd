"""`python -m nanocascade.data ROWS.jsonl`: what a file holds, and which rows cannot be used."""

import sys
from collections import defaultdict

from nanocascade.cli import run_main
from nanocascade.data.rows import conversation, read_rows


def main(paths: list[str]) -> None:
    """Print rows by domain, prompt lengths in characters, and what cannot be used and why."""
    lengths, problems = defaultdict(list), []
    for row in read_rows(paths, sft=None, problems=problems):
        lengths[row["domain"]].append(sum(len(x["content"]) for x in conversation(row)[0]))
    for domain, sizes in sorted(lengths.items()):
        middle, longest = sorted(sizes)[len(sizes) // 2], max(sizes)
        print(f"{domain}: {len(sizes)} rows, prompts of {middle} characters (at most {longest})")
    print(f"{len(problems)} rows cannot be used", *problems, sep="\n  ")


if __name__ == "__main__":
    run_main(lambda: main(sys.argv[1:]))
