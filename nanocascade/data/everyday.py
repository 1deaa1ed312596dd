"""Rows in plain English for a small pretrained model: four domains, generated, none downloaded.

    python -m nanocascade.data.everyday DIR --rows 1500     DIR/train.jsonl, sft.jsonl, test.jsonl

    if           one or two verifiable instructions (released ids) on an everyday topic
    math         a word problem of one or two steps with small numbers
    mcqa         a question about words, numbers or the calendar with four options
    structured   a sentence to JSON with given keys

A row is held out by a hash of its prompt, so that no test prompt is a training prompt, whatever the
seed. Every domain but `if` has a solution for SFT. A pretrained model writes sentences already;
SFT has to teach the format of the answer.
"""

import hashlib
import json
import random
import string
from dataclasses import dataclass
from pathlib import Path

from nanocascade.cli import parse_args, run_main
from nanocascade.data.forms import asking
from nanocascade.data.rows import question_of
from nanocascade.files import write_text_atomic

TEST_SHARE = 8  # one prompt in 8 is held out
WORDS = json.loads(Path(__file__).with_suffix(".json").read_text("utf-8"))
NEEDS_LENGTH = ("startend:end_checker", "keywords:existence", "detectable_format:title")
BOXED = " Put the final answer in \\boxed{}."


def instruction(rng) -> dict:
    """One instruction, or two of different slots, each in one of several wordings.

    Two instructions of one slot may contradict each other (upper and lower case, a first word and a
    bullet). An instruction that a short phrase satisfies comes with a minimum number of words, or
    the model would learn to write the phrase alone.
    """
    word, other = rng.sample(WORDS["words"], 2)
    values = {
        "word": word,
        "other": other,
        "least": rng.randint(6, 15),
        "most": rng.randint(12, 30),
        "bullets": rng.randint(2, 4),
        "places": rng.randint(1, 3),
        "ending": rng.choice(WORDS["endings"]),
    }
    *known, length = WORDS["instructions"]
    first = rng.choice(known)
    partners = [x for x in known if x["slot"] not in (first["slot"], "words", "edges")]
    chosen = [first]
    if first["id"] in NEEDS_LENGTH:
        chosen.append(length)
    elif rng.random() < 0.5:
        chosen.append(rng.choice(partners))
    asked = [rng.choice(x["wordings"]).format(**values) for x in chosen]
    task = rng.choice(WORDS["tasks"]).format(rng.choice(WORDS["topics"]))
    prompt = " ".join([task, *asked])

    def fill(value):
        return [fill(x) for x in value] if isinstance(value, list) else values.get(value, value)

    kwargs = [{name: fill(value) for name, value in x["kwargs"].items()} for x in chosen]
    ids = [x["id"] for x in chosen]
    return asking({}, prompt, prompt=prompt, instruction_id_list=ids, kwargs=kwargs)


def word_problem(rng) -> dict:
    """A story of one or two steps; the solution writes each step down."""
    name, other = rng.sample(WORDS["names"], 2)
    goods, problem = rng.choice(WORDS["goods"]), rng.choice(WORDS["problems"])
    a, b, c = rng.randint(2, 20), rng.randint(2, 20), rng.randint(2, 9)
    values = {
        "name": name,
        "other": other,
        "goods": goods,
        "a": a,
        "b": b,
        "c": c,
        "a_and_b": a + b,
        "b_and_c": b + c,
        "total": a + b + c,
        "a_times_c": a * c,
        "in_all": a * c + b,
    }
    story, work = (problem[x].format(**values) for x in ("story", "work"))
    result = work.rpartition(" = ")[2]
    fields = {"question": story, "expected_answer": result}
    return asking(fields, story + BOXED, f"\\boxed{{{result}}}", work)


def choice(rng) -> dict:
    """Four options and one letter: a kind of thing, the largest number, a weekday, the alphabet."""
    kind = rng.randrange(4)
    if kind == 0:
        chosen = rng.sample(list(WORDS["kinds"]), 4)
        right, *wrong = (rng.choice(WORDS["kinds"][x]) for x in chosen)
        asked = chosen[0]
        question, work = f"Which of these is {asked}?", f"The {right} is {asked}."
    elif kind == 1:
        largest = rng.random() < 0.5
        numbers = sorted(rng.sample(range(10, 100), 4), reverse=largest)
        right, *wrong = map(str, numbers)
        extreme = "largest" if largest else "smallest"
        question, work = f"Which number is the {extreme}?", f"{right} is the {extreme}."
    elif kind == 2:
        day, step = rng.randrange(7), rng.choice((1, 2, 3, -1, -2))
        when = f"{abs(step)} day{'s' * (abs(step) > 1)} {'after' if step > 0 else 'before'}"
        right = WORDS["days"][(day + step) % 7]
        wrong = rng.sample([x for x in WORDS["days"] if x != right], 3)
        question = f"Which day is {when} {WORDS['days'][day]}?"
        work = f"{when[0].upper()}{when[1:]} {WORDS['days'][day]} is {right}."
    else:
        pool = rng.sample([x for words in WORDS["kinds"].values() for x in words], 4)
        right, *wrong = sorted(pool)
        question, work = "Which word comes first in the alphabet?", f"{right} comes first."
    values = [right, *wrong]
    rng.shuffle(values)
    letters = string.ascii_uppercase[:4]
    letter = letters[values.index(right)]
    listed = "".join(f"\n{x}: {value}" for x, value in zip(letters, values, strict=True))
    return asking(
        {},
        question + listed + "\nPut the letter of the right option in \\boxed{}.",
        f"\\boxed{{{letter}}}",
        work,
        options=[{x: value} for x, value in zip(letters, values, strict=True)],
        expected_answer=letter,
        grading_mode="lenient_boxed",
    )


def record(rng) -> dict:
    """Facts of a sentence as JSON; the schema fixes the values, so they must be copied exactly."""
    facts = {
        "name": rng.choice(WORDS["names"]),
        "age": rng.randint(18, 90),
        "city": rng.choice(WORDS["cities"]),
        "job": rng.choice(WORDS["jobs"]),
    }
    keys = rng.sample(list(facts), rng.randint(2, 3))
    text = "{name} is {age} years old, lives in {city} and works as a {job}.".format(**facts)
    prompt = f"{text}\nAnswer with a JSON object with the keys {', '.join(keys)} and nothing else."
    schema = {
        "type": "object",
        "properties": {key: {"const": facts[key]} for key in keys},
        "required": keys,
        "additionalProperties": False,
    }
    answer = json.dumps({key: facts[key] for key in keys})
    return asking({}, prompt, answer, "", schema_str=json.dumps(schema), schema_type="json")


GENERATORS = {"if": instruction, "math": word_problem, "mcqa": choice, "structured": record}


def make_rows(domain: str, count: int, test: bool, seed: int = 0) -> list[dict]:
    """`count` rows with different prompts, of the training or of the held-out prompts."""
    rng, rows, seen = random.Random(f"{domain} {seed}"), [], set()
    for _ in range(200 * count):
        row = GENERATORS[domain](rng)
        prompt = question_of(row)
        held_out = hashlib.sha256(prompt.encode()).digest()[0] % TEST_SHARE == 0
        if held_out == test and prompt not in seen:
            seen.add(prompt)
            rows.append({"id": f"{domain}-{len(rows)}", "domain": domain} | row)
            if len(rows) == count:
                return rows
    raise ValueError(f"--rows {count}: the generator of {domain} has {len(rows)} different prompts")


@dataclass
class Config:
    """Flags of the command."""

    out: str = ""  # directory for the three files
    rows: int = 1500  # training rows of each domain
    test_rows: int = 200  # held-out rows of each domain
    seed: int = 0  # seed of the generator


def main() -> None:
    (cfg,) = parse_args(Config, positional="out")
    if not cfg.out:
        raise ValueError("--out DIR is needed: where the rows go")
    train = [x for d in GENERATORS for x in make_rows(d, cfg.rows, False, cfg.seed)]
    test = [x for d in GENERATORS for x in make_rows(d, cfg.test_rows, True, cfg.seed)]
    sft = [row for row in train if "solutions" in row]
    for name, rows in (("train", train), ("sft", sft), ("test", test)):
        path = Path(cfg.out) / f"{name}.jsonl"
        write_text_atomic(path, "".join(json.dumps(row) + "\n" for row in rows))
        domains = dict.fromkeys(row["domain"] for row in rows)
        print(f"{path}: {len(rows)} rows of {', '.join(domains)}")


if __name__ == "__main__":
    run_main(main)
