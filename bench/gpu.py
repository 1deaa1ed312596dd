"""Check on a GPU that the program is right, how fast it is, and whether the plan holds.

    python -m bench.gpu                          every section, at most 8 minutes on one GPU
    python -m bench.gpu --only models decode     some of them
    python -m bench.gpu --device cpu --small     toy sizes on a CPU: every line runs, in a minute

Needs torch and transformers, no download; run it from the root of the repository. It prints a
Markdown table and writes gpu.json (--out). The sections, and the seconds each may take:

    models, training, runs     right: against the CPU, fp32 with TF32 off and bf16; limits stated
    decode, rollouts, steps    fast: against transformers on the same random weights
    memory, blocks             true: peak memory and seconds against the plan (--dry_run)

Each section is a process of its own, so that one that crashes the card's context or hangs leaves
the others their turn; a check that raises is a row of the table. The exit code is 1 if a check of
what is right failed or did not end.
"""

import argparse
import datetime
import json
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path

import torch

from bench import common, gpu_fast, gpu_right, gpu_true
from bench.gpu_common import Check, Row, Setup

BUDGET = {  # seconds of each section; 480 in all
    "models": 60,
    "training": 50,
    "runs": 90,
    "decode": 90,
    "rollouts": 60,
    "steps": 60,
    "memory": 35,
    "blocks": 35,
}
RIGHT = ("models", "training", "runs")
CHECKS: dict[str, tuple[Check, ...]] = {
    "models": gpu_right.MODELS,
    "training": gpu_right.TRAINING,
    "runs": gpu_right.RUNS,
    "decode": gpu_fast.DECODE,
    "rollouts": gpu_fast.ROLLOUTS,
    "steps": gpu_fast.STEPS,
    "memory": gpu_true.MEMORY,
    "blocks": gpu_true.BLOCKS,
}


def run_section(name: str, setup: Setup, out: Path) -> None:
    """Run the checks of a section and append a line to `out` for each finding, at once."""
    started = time.perf_counter()

    def write(row: Row, **more) -> None:
        with out.open("a") as file:
            file.write(json.dumps(row._asdict() | more) + "\n")
        print(f"  {row.section}: {row.check}: {row.result} {row.limit} {row.status}", flush=True)

    for check in CHECKS[name]:
        title = check.__name__.replace("_", " ")
        began = time.perf_counter()
        if began - started > BUDGET[name]:
            write(Row(name, title, f"not begun after {BUDGET[name]} s", "", "FAILED"))
            continue
        try:
            for found in check(setup):
                status = {None: "measured", True: "ok", False: "FAILED"}[found.good]
                seconds = time.perf_counter() - began
                write(Row(name, found.check, found.result, found.limit, status), seconds=seconds)
        except Exception as error:  # whatever it is, the others have their turn
            first = (str(error).strip().splitlines() or [""])[0][:150]
            row = Row(name, title, f"{type(error).__name__}: {first}", "", "FAILED")
            write(row, traceback=traceback.format_exc())
        if setup.is_cuda:
            torch.cuda.empty_cache()


def in_own_process(name: str, args: argparse.Namespace, out: Path) -> None:
    """run_section in a child, ended when half as much again as its budget has passed."""
    command = [sys.executable, "-m", "bench.gpu", "--only", name, "--rows", str(out)]
    command += ["--device", args.device] + ["--small"] * args.small
    limit, reason = 1.5 * BUDGET[name], ""
    try:
        code = subprocess.run(command, cwd=Path(__file__).parents[1], timeout=limit).returncode
        reason = f"its process ended with {code}" if code else ""
    except subprocess.TimeoutExpired:
        reason = f"ended after {limit:.0f} s"
    if reason:
        with out.open("a") as file:
            file.write(json.dumps(Row(name, "the section", reason, "", "FAILED")._asdict()) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description="what the program does on a GPU")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--small", action="store_true", help="toy sizes, in this process")
    parser.add_argument("--only", nargs="*", default=list(CHECKS), choices=list(CHECKS))
    parser.add_argument("--out", default="gpu.json", help="where the rows go as JSON")
    parser.add_argument("--rows", default="", help=argparse.SUPPRESS)  # of a child
    args = parser.parse_args()
    if args.device == "cuda":
        args.device = "cuda:0"
    setup = Setup(args.device, args.small)
    torch.set_float32_matmul_precision("highest")  # no TF32
    if args.rows:
        return run_section(args.only[0], setup, Path(args.rows))
    date = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC")
    print(f"{setup.describe()}\n{common.machine()}, {date}\n", flush=True)
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "rows.jsonl"
        out.touch()
        for name in args.only:
            if args.small:
                run_section(name, setup, out)
            else:
                in_own_process(name, args, out)
            rows = [json.loads(line) for line in out.read_text().splitlines()]
            seconds = time.perf_counter() - began
            about = {"machine": common.machine(), "device": setup.describe(), "date": date}
            about |= {"small": setup.small, "seconds": seconds, "rows": rows}
            Path(args.out).write_text(json.dumps(about, indent=1) + "\n")  # after each section
    report(rows, seconds)


def report(rows: list[dict], seconds: float) -> None:
    """The Markdown table and the exit code."""
    columns = Row._fields
    print(f"\n| {' | '.join(columns)} |\n|{' --- |' * len(columns)}")
    for row in rows:
        print(f"| {' | '.join(row[x].replace('|', '/') for x in columns)} |")
    failed = [x for x in rows if x["status"] == "FAILED"]
    wrong = [x for x in failed if x["section"] in RIGHT]
    counts = f"{len(rows)} rows, {len(failed)} failed, {len(wrong)} of them of what must be right"
    print(f"\n{counts}; {seconds:.0f} s")
    if wrong:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
