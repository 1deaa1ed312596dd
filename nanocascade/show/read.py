"""The files of a run or a cascade, read into the JSON object that the page shows.

Everything is bounded: MAX_POINTS of a curve, MAX_BYTES of all rollouts, MAX_CHARS of a prompt or a
response. Where something is left out the page says so.
"""

import json
import re
from itertools import groupby
from pathlib import Path

from nanocascade.files import read_json, read_text

MAX_POINTS = 1000  # steps of a run in its curves: every k-th step of a longer run
MAX_BYTES = 8_000_000  # JSON text of all rollouts: every k-th group of a larger cascade
MAX_CHARS = 8000  # of a prompt, and of a response
# A turn starts at its header, a thought at <think>, an answer after </think> and its newline.
TURN_STARTS = r"(?=<\|im_start\|>)|(?<!assistant\n)(?=<think>)|(?<=</think>\n)|(?<=</think>)(?!\n)"
NUMBER = r"[\d.]+(?:e-?\d+)?"


def read_page(path: Path) -> dict:
    """{"title", "metrics": the table, "runs": [...]} of a run's directory, or of one of runs."""
    places = [path] if (path / "metrics.jsonl").exists() else sorted(path.glob("*/"))
    places = [x for x in places if (x / "metrics.jsonl").exists()]
    if not places:
        raise ValueError(f"{path}: no metrics.jsonl here or one directory below")
    runs = [read_run(x) for x in places]
    bound_groups(runs, MAX_BYTES)
    place_runs(runs)
    table = metric_table()
    names = {name for run in runs for name in run["curves"]}
    own_rows = {metric["name"] for metric in table}
    for metric in table:
        pattern = re.compile(re.sub("DOMAIN|TEACHER", "[^/]+", metric["name"]))
        metric["names"] = sorted(x for x in names if pattern.fullmatch(x))
        if len(metric["names"]) > 1:  # outcome/drawn is no domain: it has a row of its own
            metric["names"] = [x for x in metric["names"] if x not in own_rows]
    known = {x for metric in table for x in metric["names"]}
    table += [
        {"name": x, "meaning": "not in docs/metrics.md", "healthy": "", "names": [x]}
        for x in sorted(names - known)
    ]
    return {
        "title": "/".join(path.resolve().parts[-2:]),
        "metrics": [x for x in table if x["names"]],
        "runs": runs,
    }


def metric_table() -> list[dict]:
    """The table of docs/metrics.md from its copy beside this file: name, meaning, healthy range."""
    rows = read_text(Path(__file__).with_name("metrics.md")).splitlines()[2:]
    table = []
    for row in rows:
        name, meaning, healthy = (x.strip() for x in row.strip().strip("|").split("|"))
        low, high = healthy_range(healthy)
        table.append(
            {"name": name, "meaning": meaning, "healthy": healthy, "low": low, "high": high}
        )
    return table


def healthy_range(text: str) -> tuple[float | None, float | None]:
    """Bounds that the text begins with: "below 3" -> (None, 3.0), "0.9 to 1.1" -> (0.9, 1.1)."""
    if found := re.match(f"({NUMBER}) to ({NUMBER})", text):
        return float(found[1]), float(found[2])
    if found := re.match(f"(below|above) ({NUMBER})", text):
        bound = float(found[2])
        return (None, bound) if found[1] == "below" else (bound, None)
    return None, None


# ---- One run -------------------------------------------------------------------------------------


def read_run(path: Path) -> dict:
    """One run, finished (manifest.json) or not (state/run.json, if it is still there)."""
    finished = (path / "manifest.json").exists()
    note = path / ("manifest.json" if finished else "state/run.json")
    about = read_json(note) if note.exists() else {}
    config = about.get("config", about) if finished else about
    parent = (about.get("parent") or {}).get("path", "") if finished else about.get("init", "")
    records = read_lines(path / "metrics.jsonl")
    stride = -(-len(records) // MAX_POINTS) or 1
    shown = records[::stride]
    names = dict.fromkeys(name for x in shown for name in x if name != "step")
    groups = read_groups(path / "rollouts.jsonl")
    trained = {m[1] for name in names if (m := re.fullmatch("reward/mean/(.+)", name))}
    return {
        "name": path.resolve().name,
        "stage": about.get("stage", ""),
        "parent": Path(parent).name if parent else "",
        "teachers": {d: Path(x["path"]).name for d, x in about.get("teachers", {}).items()},
        "trained": sorted(trained),
        "finished": finished,
        "seconds": about.get("seconds", records[-1].get("time/elapsed", 0) if records else 0),
        "num_steps": config.get("steps") or len(records),
        "done": len(records),
        "seed": config.get("seed"),
        "commit": about.get("commit", "")[:10],
        "evaluation": about.get("evaluation", {}),
        "stride": stride,
        "steps": [x["step"] for x in shown],
        "curves": {name: [curve_value(x.get(name)) for x in shown] for name in names},
        "groups": groups,
        "num_groups": len(groups),
    }


def read_lines(path: Path) -> list[dict]:
    """The objects of a JSONL file. A run that is being written may end in half a line."""
    if not path.exists():
        return []
    lines = read_text(path).split("\n")[:-1]
    try:
        # NaN and Infinity are not JSON: a browser would refuse the page.
        return [json.loads(x, parse_constant=lambda _: None) for x in lines if x]
    except json.JSONDecodeError as error:
        raise ValueError(f"cannot read {path}: {error}") from None


def curve_value(x) -> float | None:
    """Four significant digits; of one number a rank the largest."""
    x = max(x) if isinstance(x, list) else x
    return None if x is None else float(f"{x:.4g}")


# ---- Rollouts ------------------------------------------------------------------------------------


def read_groups(path: Path) -> list[dict]:
    """The logged rollouts by group: neighbours in the file with the same step and prompt."""
    groups = []
    for key, records in groupby(read_lines(path), key=group_key):
        records = list(records)
        step, domain, prompt, _ = key
        groups.append(
            {
                "step": step,
                "domain": domain,
                "prompt": cut(split_turns(prompt, "user")),
                "rollouts": [show_rollout(x) for x in records],
            }
        )
    return groups


def group_key(record: dict) -> tuple:
    return record["step"], record["domain"], record["prompt"], record.get("group")


def show_rollout(record: dict) -> dict:
    kept = ("reward", "reason", "advantage", "stop_reason", "tokens")
    shown = {key: record[key] for key in kept if key in record}
    opened = record["prompt"].rstrip().endswith("<think>")
    turns = split_turns(record["response"], "thought" if opened else "answer")
    return shown | {"turns": cut(turns)}


def cut(turns: list[list[str]]) -> list[list[str]]:
    """The first MAX_CHARS characters of the turns' texts."""
    left, out = MAX_CHARS, []
    for kind, text in turns:
        if len(text) > left:
            return [*out, [kind, text[:left]], ["cut", f"{len(text) - left} characters more"]]
        out.append([kind, text])
        left -= len(text)
    return out


def split_turns(text: str, kind: str) -> list[list[str]]:
    """[[kind, text], ...] whose texts add up to `text`: system, user, tool, thought or answer.

    kind: of the first turn. Reads the markup of the chatml family (Nemotron, Qwen, SmolLM); under
    another chat template the whole text is one turn.
    """
    turns = []
    for part in re.split(TURN_STARTS, text):
        role = re.match(r"<\|im_start\|>(\w+)", part)
        if role:
            kind = {"assistant": "answer"}.get(role[1], role[1])
            kind = "tool" if "<tool_response>" in part else kind
        if re.match(r"(<\|im_start\|>assistant\n)?<think>", part):
            kind = "thought"
        if part:
            turns.append([kind, part])
        if part.rstrip("\n").endswith("</think>"):
            kind = "answer"
    return turns


def bound_groups(runs: list[dict], max_bytes: int) -> None:
    """Share out max_bytes, small runs first: what they leave is for the larger ones."""
    runs = sorted(runs, key=lambda run: len(json.dumps(run["groups"])))
    for i, run in enumerate(runs):
        run["groups"] = sample_groups(run["groups"], max_bytes // (len(runs) - i))
        max_bytes -= len(json.dumps(run["groups"]))


def sample_groups(groups: list[dict], max_bytes: int) -> list[dict]:
    """Every k-th group, with the smallest k whose JSON fits; at least one."""
    sizes = [len(json.dumps(x)) for x in groups]
    stride = 1
    while stride < len(groups) and sum(sizes[::stride]) > max_bytes:
        stride += 1
    return groups[::stride]


# ---- The diagram ---------------------------------------------------------------------------------


def place_runs(runs: list[dict]) -> None:
    """Give each run a column and a lane: lane 0 is the longest chain of parents, the cascade.

    Parents and teachers outside of the directory join as runs without curves. A side run stands
    right of its parent and teachers, in the first lane that is free up to the last run it teaches.
    """
    runs += outside_runs(runs)
    by_name = {run["name"]: run for run in runs}

    def column(run, above=()):
        sources = {run["parent"], *run["teachers"].values()} & by_name.keys() - {*above}
        here = (*above, run["name"])
        return max((column(by_name[x], here) + 1 for x in sources if x not in here), default=0)

    def chain(run):
        names = [run["name"]]
        while (run := by_name.get(run["parent"])) and run["name"] not in names:
            names.append(run["name"])
        return names[::-1]

    main = max((chain(run) for run in runs), key=len)
    for run in runs:
        on_main = run["name"] in main
        run["col"] = main.index(run["name"]) if on_main else column(run)
        run["lane"] = 0
    taken: dict[int, set] = {}
    for run in sorted(runs, key=lambda x: (x["col"], x["name"])):
        if run["name"] in main:
            continue
        pupils = [x["col"] for x in runs if run["name"] in x["teachers"].values()]
        columns = set(range(run["col"], max([run["col"], *pupils]) + 1))
        run["lane"] = next(i for i in range(1, len(runs) + 1) if not columns & taken.get(i, set()))
        taken.setdefault(run["lane"], set()).update(columns)
    runs.sort(key=lambda x: (x["lane"], x["col"], x["name"]))


def outside_runs(runs: list[dict]) -> list[dict]:
    """Stand-ins for parents and teachers whose directories are not shown, with what is known: the
    scores that their children began with."""
    names = {run["name"] for run in runs}
    found = {}
    for run in runs:
        for name in {run["parent"], *run["teachers"].values()} - names - {""}:
            found.setdefault(name, {})
        if run["parent"] in found:
            scores = {d: {"after": x.get("before")} for d, x in run["evaluation"].items()}
            found[run["parent"]] = scores
    empty = {"stage": "", "parent": "", "teachers": {}, "trained": [], "steps": [], "curves": {}}
    empty |= {"groups": [], "num_groups": 0, "finished": True, "outside": True}
    return [empty | {"name": name, "evaluation": x} for name, x in sorted(found.items())]
