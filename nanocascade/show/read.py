"""The files of a run or a cascade, read into the JSON object that the page shows.

Everything is bounded: MAX_POINTS of a curve, MAX_BYTES of all rollouts, MAX_CHARS of a prompt or a
response. Where something is left out the page says so.
"""

import json
import math
import re
from collections import defaultdict
from itertools import count, groupby
from pathlib import Path

from nanocascade.files import read_text
from nanocascade.run.read import UNKNOWN, main_chain, read_lines, read_runs

MAX_POINTS = 1000  # steps of a run in its curves: every k-th step of a longer run
MAX_BYTES = 8_000_000  # JSON text of all rollouts: every k-th group of a larger cascade
MAX_CHARS = 8000  # of a prompt, and of a response
# A turn starts at its header, a thought at <think>, an answer after </think> and its newline.
TURN_STARTS = r"(?=<\|im_start\|>)|(?<!assistant\n)(?=<think>)|(?<=</think>\n)|(?<=</think>)(?!\n)"
NUMBER = r"[\d.]+(?:e-?\d+)?"


def read_page(path: Path) -> dict:
    """{"title", "metrics": the table, "runs": [...]} of a run's directory, or of one of runs."""
    runs = read_runs(path)
    runs = [page_run(x) for x in runs + outside_runs(runs)]
    bound_groups(runs, MAX_BYTES)
    place_runs(runs)
    names = {name for run in runs for name in run["curves"]}
    title = "/".join(path.resolve().parts[-2:])
    return {"title": title, "metrics": metric_rows(names), "runs": runs}


def metric_rows(names: set[str]) -> list[dict]:
    """The rows of the metric table that have curves, with the "names" of these."""
    table = {x["name"]: x | {"names": []} for x in metric_table()}
    for name in sorted(names):
        patterns = (x for x in table if re.fullmatch(re.sub("DOMAIN|TEACHER", "[^/]+", x), name))
        # outcome/drawn is no domain: it has a row of its own
        row = name if name in table else next(patterns, name)
        unknown = {"name": name, "meaning": "not in docs/metrics.md", "healthy": "", "names": []}
        table.setdefault(row, unknown)["names"].append(name)
    return [x for x in table.values() if x["names"]]


def metric_table() -> list[dict]:
    """The table of docs/metrics.md from its copy beside this file: name, meaning, healthy range."""
    table = []
    for row in read_text(Path(__file__).with_name("metrics.md")).splitlines()[2:]:
        name, meaning, healthy = (x.strip() for x in row.strip("|").split("|"))
        low, high = healthy_range(healthy)
        fields = {"name": name, "meaning": meaning, "healthy": healthy, "low": low, "high": high}
        table.append(fields)
    return table


def healthy_range(text: str) -> tuple[float | None, float | None]:
    """Bounds that the text begins with: "below 3" -> (None, 3.0), "0.9 to 1.1" -> (0.9, 1.1)."""
    if found := re.match(f"({NUMBER}) to ({NUMBER})", text):
        return float(found[1]), float(found[2])
    if found := re.match(f"(below|above) ({NUMBER})", text):
        bound = float(found[2])
        return (None, bound) if found[1] == "below" else (bound, None)
    return None, None


def page_run(run: dict) -> dict:
    """A run as the page shows it: its facts, curves and rollouts."""
    metrics = run["metrics"]
    groups = [] if run["outside"] else read_groups(run["path"] / "rollouts.jsonl")
    stride = -(-len(metrics) // MAX_POINTS) or 1
    shown = metrics[::stride]
    names = dict.fromkeys(name for x in shown for name in x if name != "step")
    facts = ("name", "stage", "parent", "teachers", "evaluation", "seed", "seconds", "finished")
    return {key: run[key] for key in (*facts, "outside")} | {
        "trained": sorted(x.split("/")[2] for x in names if x.startswith("reward/mean/")),
        "num_steps": run["config"].get("steps") or len(metrics),
        "done": len(metrics),
        "commit": run["commit"][:10],
        "stride": stride,
        "steps": [x["step"] for x in shown],
        "curves": {name: [curve_value(x.get(name)) for x in shown] for name in names},
        "groups": groups,
        "num_groups": len(groups),
    }


def curve_value(x) -> float | None:
    """Four significant digits; of one number a rank the largest. None for NaN, which JSON lacks."""
    x = max(x) if isinstance(x, list) else x
    return float(f"{x:.4g}") if x is not None and math.isfinite(x) else None


# ---- Rollouts ------------------------------------------------------------------------------------


def read_groups(path: Path) -> list[dict]:
    """The logged rollouts by group: neighbours in the file with the same step and prompt."""
    groups = []
    records = read_lines(path, lambda _: None)  # NaN is not JSON: a browser would refuse the page
    for _, group in groupby(records, lambda x: [x["step"], x["prompt"], x.get("group")]):
        first, *others = group
        groups.append(
            {
                "step": first["step"],
                "domain": first["domain"],
                "prompt": cut(split_turns(first["prompt"], "user")),
                "rollouts": [show_rollout(x) for x in (first, *others)],
            }
        )
    return groups


def show_rollout(record: dict) -> dict:
    keys = ("reward", "reason", "advantage", "stop_reason", "tokens")
    opened = record["prompt"].rstrip().endswith("<think>")
    turns = split_turns(record["response"], "thought" if opened else "answer")
    return {key: record[key] for key in keys if key in record} | {"turns": cut(turns)}


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
    strides = range(1, len(groups) + 1)
    stride = next((k for k in strides if sum(sizes[::k]) <= max_bytes), len(groups) or 1)
    return groups[::stride]


# ---- The diagram ---------------------------------------------------------------------------------


def place_runs(runs: list[dict]) -> None:
    """Give each run a column and a lane, and sort them: lane 0 is the main chain, the cascade.

    A side run stands right of its parent and teachers, in the first lane that is free up to the
    last run it teaches.
    """
    by_name = {run["name"]: run for run in runs}
    main = main_chain(by_name)
    columns = {name: i for i, name in enumerate(main)}
    side = sorted(by_name.keys() - columns.keys())
    for _ in side:  # no path through them is longer
        for name in side:
            sources = {by_name[name]["parent"], *by_name[name]["teachers"].values()} - {name}
            column = max((columns.get(x, -1) for x in sources), default=-1) + 1
            columns[name] = min(column, len(runs))  # runs that teach each other
    lanes, taken = dict.fromkeys(main, 0), defaultdict(set)
    for name in sorted(side, key=columns.get):
        pupils = [x for x, run in by_name.items() if name in run["teachers"].values()]
        span = {*range(columns[name], max(columns[x] for x in [name, *pupils]) + 1)}
        lanes[name] = next(i for i in count(1) if not span & taken[i])
        taken[lanes[name]] |= span
    for name, run in by_name.items():
        run |= {"col": columns[name], "lane": lanes[name]}
    runs.sort(key=lambda run: (run["lane"], run["col"], run["name"]))


def outside_runs(runs: list[dict]) -> list[dict]:
    """Stand-ins for parents and teachers whose directories are not shown, with what is known: the
    scores that their children began with."""
    scores = {name: {} for run in runs for name in run["teachers"].values()}
    for run in runs:
        before = {d: {"after": x.get("before")} for d, x in run["evaluation"].items()}
        scores[run["parent"]] = before
    outside = sorted(scores.keys() - {run["name"] for run in runs} - {""})
    return [UNKNOWN | {"name": x, "evaluation": scores[x], "outside": True} for x in outside]
