"""Runs read back from their directories: manifest, metrics, the chain of parents."""

import json
from pathlib import Path

from nanocascade.files import read_json, read_text

UNKNOWN = {  # a run of which nothing is known
    "stage": "",
    "parent": "",
    "teachers": {},
    "config": {},
    "evaluation": {},
    "seed": None,
    "commit": "",
    "seconds": 0,
    "metrics": [],
    "finished": True,
    "outside": False,
}


def read_runs(path: Path) -> list[dict]:
    """The run in `path`, or those in its directories."""
    places = [path] if (path / "metrics.jsonl").exists() else sorted(path.glob("*/"))
    runs = [read_run(x) for x in places if (x / "metrics.jsonl").exists()]
    if not runs:
        raise ValueError(f"{path}: no metrics.jsonl here or one directory below")
    return runs


def read_run(path: Path) -> dict:
    """A run, finished or not: the fields of its manifest, but parent and teachers by name; "path",
    "finished", and "metrics", a dict for each step."""
    finished = is_finished(path)
    note = path / ("manifest.json" if finished else "state/run.json")
    known = read_json(note) if note.exists() else {}
    parent = known.get("parent") or {"path": known.get("init", "")}
    metrics = read_lines(path / "metrics.jsonl")
    elapsed = max((x.get("time/elapsed", 0) for x in metrics), default=0)
    return {
        **(UNKNOWN | {"seconds": elapsed} | known),
        "name": path.resolve().name,
        "path": path,
        "parent": Path(parent["path"]).name,
        "teachers": {d: Path(x["path"]).name for d, x in known.get("teachers", {}).items()},
        "config": known.get("config", known),  # of an unfinished run the note is its settings
        "finished": finished,
        "metrics": metrics,
    }


def is_finished(path: Path) -> bool:
    """Whether `path` is a finished run. A directory of several runs is not one."""
    return (path / "manifest.json").exists()


def read_lines(path: Path, parse_constant=None) -> list[dict]:
    """The objects of a JSONL file. A run that is being written may end in half a line.
    parse_constant: see json.loads."""
    if not path.exists():
        return []
    lines = read_text(path).split("\n")[:-1]
    try:
        return [json.loads(x, parse_constant=parse_constant) for x in lines if x]
    except json.JSONDecodeError as error:
        raise ValueError(f"cannot read {path}: {error}") from None


def chain(runs: dict[str, dict], name: str) -> list[str]:
    """The names of a run's parents, the first one first, and its own."""
    names = [name]
    while (parent := runs[names[0]]["parent"]) in runs and parent not in names:
        names.insert(0, parent)
    return names


def main_chain(runs: dict[str, dict]) -> list[str]:
    """The longest chain: the cascade without its side branches."""
    return max((chain(runs, name) for name in runs), key=len)
