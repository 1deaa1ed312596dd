"""The toy's own tasks: seeded problems for every stage, in the row form of the released data.

Each generator draws one problem and returns (row, good, slip): the row has the fields of its
verifier and none that only the toy knows, `good` is a correct solution with a short thought, `slip`
a wrong one. An SFT row takes the slip with the domain's probability, so that the model scores
between 0.2 and 0.8 after SFT and RL can improve it.
# OURS: a share of the SFT solutions is wrong on purpose; the report filters its data.

A hash of its text makes a problem a training or a test problem, so the two splits never overlap,
whatever the seeds. Only preference asks the same questions in both.
"""

import hashlib
import json
import random
import re
from itertools import zip_longest
from pathlib import Path

from nanocascade.data.rows import question_of
from nanocascade.environments.base import make_tool
from nanocascade.rewards import checked_row
from nanocascade.rollouts import strategies
from nanocascade.toy.programs import PROGRAMS, agentic, code, program, repair
from nanocascade.toy.words import (
    ANIMALS,
    CATEGORIES,
    CLOSING,
    COLORS,
    FACTS,
    FOODS,
    LETTERS,
    NAMES,
    NOUNS,
    THINGS,
    assistant,
    call_tool,
    user_row,
)

LONG_SENTENCES = 30  # filler sentences of a long-context row

# Share of SFT solutions that are the slip. RL has to remove these mistakes.
SLIPS = {
    "math": 0.1,
    "if": 0.3,
    "mcqa": 0.35,
    "structured": 0.3,
    "tools": 0.3,
    "preference": 0.0,
    "long_context": 0.35,
    "code": 0.4,
    "swe": 0.4,
    "swe_agentic": 0.4,
    "verify": 0.1,
    "revise": 0.2,
}
OUTSIDE = ("swe_agentic", "verify", "revise")  # domains that no stage of the toy's cascade trains
DOMAINS = tuple(x for x in SLIPS if x not in OUTSIDE)
# Domains of SFT, among them the prompts that strategies.py uses.
SFT_SHARES = dict.fromkeys((*DOMAINS, "verify", "revise"), 1.0) | {
    "mcqa": 1.5,
    "structured": 1.3,
    "long_context": 0.7,
    "revise": 0.5,
}


SHOP_TOOLS = [
    make_tool("lookup", "Count an item.", item="string"),
    make_tool("order", "Order an item.", item="string", count="integer"),
]


# --- One generator a domain: rng -> (row, good messages, slip messages) ---------------------------


def sum_of_two(rng) -> tuple[int, int]:
    return rng.randint(10, 99), rng.randint(10, 99)


def math(rng, problem=None):
    """Two-digit sums; the thought adds ones, then tens with the carry."""
    a, b = problem or sum_of_two(rng)
    question = f"What is {a}+{b}?"
    ones = a % 10 + b % 10
    carry = "+1" if ones > 9 else ""
    wrong = a + b + rng.choice((-10, -1, 1, 10))
    thought = f"{a % 10}+{b % 10}={ones}, {a // 10}+{b // 10}{carry}={(a + b) // 10}"
    slip_thought = f"{a % 10}+{b % 10}={wrong % 10}, {a // 10}+{b // 10}={wrong // 10}"
    row = user_row(question, question=question, expected_answer=str(a + b))
    answer = "\\boxed{%d}"
    return row, [assistant(thought, answer % (a + b))], [assistant(slip_thought, answer % wrong)]


def instructions(rng):
    """A line of words under two or three verifiable instructions (real ids and kwargs)."""
    first, last, key, banned, *fill = rng.sample(NOUNS, 10)
    times = rng.randint(2, 3)
    begins, ends = "first_word:first_word_answer", "last_word:last_word_answer"
    repeats, forbids = "keywords:frequency", "keywords:forbidden_words"
    frequency = {"keyword": key, "frequency": times, "relation": "at least"}
    known = {  # id -> (its wording in the prompt, kwargs)
        begins: (f" Start with {first}.", {"first_word": first}),
        ends: (f" End with {last}.", {"last_word": last}),
        repeats: (f" Use {key} at least {times} times.", frequency),
        forbids: (f" Do not use {banned}.", {"forbidden_words": [banned]}),
    }
    ids = sorted(rng.sample(list(known), rng.randint(2, 3)))
    rng.shuffle(ids)
    words = fill[: rng.randint(2, 3)]
    for _ in range(times if repeats in ids else 0):
        words.insert(rng.randint(0, len(words)), key)
    other_first, other_last = rng.sample(fill, 2)
    good = [first if begins in ids else other_first, *words, last if ends in ids else other_last]
    slip = list(good)
    broken = rng.choice(ids)  # the slip breaks one instruction and follows the others
    if broken == begins:
        slip[0] = other_first
    elif broken == ends:
        slip[-1] = other_last
    elif broken == repeats:
        slip.remove(key)
    else:
        slip[rng.randint(1, len(slip) - 2)] = banned
    wordings, kwargs = zip(*(known[x] for x in ids), strict=True)
    prompt = "Write a line." + "".join(wordings)
    row = user_row(prompt, prompt=prompt, instruction_id_list=ids, kwargs=list(kwargs))
    return row, *([assistant(f"{x[0]}, {x[-1]}", " ".join(x))] for x in (good, slip))


def choice(rng):
    """Four options, one of each category; the thought names their categories until one fits."""
    kinds = rng.sample(list(CATEGORIES), 4)
    wanted = rng.choice(kinds)
    options = [
        {letter: rng.choice(CATEGORIES[x])} for letter, x in zip(LETTERS, kinds, strict=True)
    ]
    right = kinds.index(wanted)
    wrong = rng.choice([i for i in range(4) if i != right])
    mistaken = list(kinds)  # the slip misses the right option and takes a wrong one
    mistaken[right] = rng.choice([x for x in kinds if x != wanted])
    mistaken[wrong] = wanted
    listed = "".join(f"\n{x}: {y}" for option in options for x, y in option.items())
    row = user_row(
        f"Which is {wanted}?" + listed,
        expected_answer=LETTERS[right],
        options=options,
        grading_mode="strict_single_letter_boxed",
    )

    def solution(sorted_as: list[str], last: int) -> list[dict]:
        thought = ", ".join(f"{LETTERS[i]}: {sorted_as[i]}" for i in range(last + 1))
        return [assistant(thought, "\\boxed{%s}" % LETTERS[last])]

    return row, solution(kinds, right), solution(mistaken, wrong)


def structured(rng):
    """Turn a sentence into JSON; the schema fixes the values, so they must be copied exactly."""
    record = {
        "name": rng.choice(NAMES),
        "age": rng.randint(10, 99),
        "color": rng.choice(COLORS),
        "food": rng.choice(FOODS),
    }
    keys = rng.sample(list(record), rng.randint(2, 3))
    schema = {
        "type": "object",
        "properties": {key: {"const": record[key]} for key in keys},
        "required": keys,
        "additionalProperties": False,
    }
    text = "Meet {name}, who is {age} and likes {color} and {food}.".format(**record)
    good = {key: record[key] for key in keys}
    slip = dict(good)
    broken = rng.choice(keys)
    if rng.random() < 0.5:
        age = record["age"]
        values = {"name": NAMES, "age": (age - 1, age + 1), "color": COLORS, "food": FOODS}[broken]
        slip[broken] = rng.choice([x for x in values if x != record[broken]])
    else:
        del slip[broken]
    prompt = f"JSON with {', '.join(keys)}: {text}"
    row = user_row(prompt, schema_str=json.dumps(schema), schema_type="json")
    return row, *([assistant(", ".join(x), json.dumps(x))] for x in (good, slip))


def tools(rng):
    """Call the tools of a small shop; half of the orders need a look-up first, so two turns."""
    item, other = rng.sample(FOODS + THINGS, 2)
    count, stock = sorted((rng.randint(2, 9), rng.randint(2, 9)))
    state = {"stock": {item: stock, other: rng.randint(2, 9)}, "orders": []}
    kind = rng.choice(("count", "order", "order all", "order all"))
    wrong = rng.choice([x for x in range(2, 10) if x not in (stock, count)])
    looked, mistaken = ("lookup", {"item": item}), ("order", {"item": item, "count": wrong})
    if kind == "count":
        prompt, good, slip = f"How many {item} are there?", [looked], [("lookup", {"item": other})]
    elif kind == "order":
        good, slip = [("order", {"item": item, "count": count})], [mistaken]
        prompt = f"Order {count} {item}."
    else:
        good = [looked, ("order", {"item": item, "count": stock})]
        slip = [mistaken] if rng.random() < 0.5 else [looked, mistaken]
        prompt = f"Order all {item}."
    row = user_row(prompt, category="shop", environment={"name": "shop", "state": state})
    row["ground_truth"] = [{"name": n, "arguments": json.dumps(x)} for n, x in good]
    row["responses_create_params"]["tools"] = SHOP_TOOLS

    def solution(calls: list[tuple[str, dict]]) -> list[dict]:
        results = {"lookup": str(stock), "order": "done"}
        turns = [turn for name, x in calls for turn in call_tool(name, results[name], name, **x)]
        return [*turns, assistant("done", "Done.")]

    return row, solution(good), solution(slip)


def preference(rng):
    """An open question. SFT answers differ in quality; the judge is rule_judge."""
    topic, other = rng.sample(NOUNS, 2)
    subject = topic if rng.random() < 0.7 else other
    facts = [rng.choice(FACTS) for _ in range(rng.randint(1, 4))]  # repeats happen
    text = f"The {subject} {facts[0]}." + "".join(f" It {fact}." for fact in facts[1:])
    if rng.random() < 0.3:
        text += CLOSING
    judge = {"type": "responses_api_agents", "name": "genrm_simple_agent"}
    row = user_row(f"Tell me about the {topic}.", agent_ref=judge)
    answer = [assistant(topic, text)]
    return row, answer, answer


def long_context(rng):
    """Find a code by its key in a long text; two rows in five hold a second code and key."""
    key, other = rng.sample(COLORS, 2)
    code, decoy = map(str, rng.sample(range(10, 100), 2))
    filler = [f"The {rng.choice(ANIMALS)} {rng.choice(FACTS)}." for _ in range(LONG_SENTENCES)]
    for k, c in [(key, code), (other, decoy)][: 1 + (rng.random() < 0.4)]:
        filler.insert(rng.randint(0, len(filler)), f"The {k} code is {c}.")
    question = f"What is the {key} code?"
    fields = {"question": question, "expected_answer": code, "problem_type": "retrieval"}
    row = user_row(" ".join(filler) + "\n" + question, **fields)
    return row, [assistant(key, code)], [assistant(key, decoy)]


def attempted(rng):
    """A sum or a function: (row, right solution, two wrong ones). The split depends on the problem
    that the attempt shows: row["problem"]."""
    if rng.random() < 0.5:
        domain, task, problem = "math", math, sum_of_two(rng)
    else:
        domain, task, problem = "code", code, program(rng)
    (row, [good], [slip]), (_, _, [other]) = task(rng, problem), task(rng, problem)
    return row | {"problem": (domain, question_of(row))}, good, slip, other


def compared(own: str, tried: str) -> str:
    """Compare two texts up to the first different character: "140", "130" -> "11= 43/"."""
    pieces = [re.findall(r"max\(x, |min\(x, |.", x) for x in (own, tried)]
    comparisons = []
    for a, b in zip_longest(*pieces, fillvalue="."):
        comparisons.append(a + b + ("=" if a == b else "/"))
        if a != b:
            break
    return " ".join(comparisons)


def analysis(own: dict, tried: dict, flip=False) -> str:
    """The text of a check: two answers compared, then the verdict (`flip`: the wrong verdict)."""
    inner = re.compile(r"boxed.(.*)}|return (.*)")  # the part of an answer that is compared
    own, tried = ("".join(inner.search(x["content"]).groups("")) for x in (own, tried))
    return compared(own, tried) + "\n\\boxed{%d}" % ((own == tried) != flip)


def verify(rng):
    """Judge an attempt: the thought solves the problem again, the answer compares the results."""
    row, good, slip, _ = attempted(rng)
    tried = good if rng.random() < 0.5 else slip
    prompt = strategies.verification_prompt(question_of(row), tried["content"])
    fields = {"question": prompt, "expected_answer": str(int(tried is good))}
    check = user_row(prompt, problem=row["problem"], **fields)
    thought = good["reasoning_content"]
    return check, *([assistant(thought, analysis(good, tried, flip))] for flip in (False, True))


def revise(rng):
    """Improve an attempt, given checks of it of which some are wrong (refine), or given attempts
    and their scores (submit). The slip repeats the last attempt."""
    row, good, slip, other = attempted(rng)
    tried = good if rng.random() < 0.3 else slip
    if rng.random() < 0.6:
        checkers = [other if rng.random() < 0.2 else good for _ in range(rng.randint(1, 2))]
        texts = sorted((analysis(x, tried) for x in checkers), key=lambda x: x[-2])
        prompt = strategies.refinement_prompt(question_of(row), tried["content"], texts)
    else:
        past = [(other, 0), (slip, 0)] if rng.random() < 0.5 else [(tried, int(tried is good))]
        tried = past[-1][0]
        submissions = [(x["content"], score) for x, score in past]
        prompt = strategies.submission_prompt(question_of(row), submissions)
    return row | user_row(prompt), [good], [tried]


GENERATORS = {
    "math": math,
    "if": instructions,
    "mcqa": choice,
    "structured": structured,
    "tools": tools,
    "preference": preference,
    "long_context": long_context,
    "code": code,
    "swe": repair,
    "swe_agentic": agentic,
    "verify": verify,
    "revise": revise,
}


def make_rows(
    domain: str, count: int, split: str = "train", seed: int | str = 0, sft: bool = False
) -> list[dict]:
    """`count` rows of a domain, with `solutions` {"on", "off"} for SFT (slips included). Rows are
    as read_rows yields them: with sft=True not checked for grading.

    split: "train" or "test", which share no problem: a problem whose text hashes to 0 modulo 8 is a
    test problem. Raises ValueError for an unknown domain or split.
    """
    if domain not in GENERATORS or split not in ("train", "test"):
        raise ValueError(f"no toy task {domain!r} ({split!r}); have {', '.join(GENERATORS)}")
    rng = random.Random(f"{domain} {split} {seed}")
    rows = []
    while len(rows) < count:
        row, good, slip = GENERATORS[domain](rng)
        chosen = slip if rng.random() < SLIPS[domain] else good
        problem = " ".join(row.pop("problem", (domain, question_of(row))))
        digest = hashlib.sha256(problem.encode()).digest()[0]
        # Preference has a small set of questions and no right answers, so training and test share
        # them. Every other domain is split by problem.
        if domain != "preference" and (digest % 8 == 0) != (split == "test"):
            continue
        row |= {"id": f"{domain}-{split}-{seed}-{len(rows)}", "domain": domain}
        plain = [x | {"reasoning_content": None} if x["role"] == "assistant" else x for x in chosen]
        row["solutions"] = {"on": chosen, "off": plain}
        rows.append(row if sft else checked_row(row))
    return rows


def vocabulary() -> list[str]:
    """Words and phrases that are one token each in the toy's tokenizer: those of the generators,
    and of the chat template's text on tools."""
    words = [*NOUNS, *NAMES, *FACTS, "lookup", "order"]
    requests = [request.split("{a}")[0].rstrip() for request in PROGRAMS]
    phrases = json.loads(Path(__file__).with_name("phrases.json").read_text("utf-8"))
    return [*words, *(" " + x for x in words), *CATEGORIES, *requests, *phrases]
