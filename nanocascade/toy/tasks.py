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
from nanocascade.tokenizer.chat import MARKUP, TEMPLATE
from nanocascade.tokenizer.messages import tools_form
from nanocascade.tokenizer.template import markup_pattern, render_template, split_markup
from nanocascade.toy.programs import PROGRAMS, agentic, code, repair
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
    tool_call,
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


def math(rng, problem=None):
    """Two-digit sums; the thought adds ones, then tens with the carry."""
    a, b = problem or (rng.randint(10, 99), rng.randint(10, 99))
    question = f"What is {a}+{b}?"
    ones = a % 10 + b % 10
    carry = "+1" if ones > 9 else ""
    tens = a // 10 + b // 10 + (ones > 9)
    wrong = a + b + rng.choice((-10, -1, 1, 10))
    thought = f"{a % 10}+{b % 10}={ones}, {a // 10}+{b // 10}{carry}={tens}"
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
    prompt = "Write a line." + "".join(known[x][0] for x in ids)
    kwargs = [known[x][1] for x in ids]
    row = user_row(prompt, prompt=prompt, instruction_id_list=ids, kwargs=kwargs)
    return row, *([assistant(f"{x[0]}, {x[-1]}", " ".join(x))] for x in (good, slip))


def choice(rng):
    """Four options, one of each category; the thought names their categories until one fits."""
    kinds = rng.sample(list(CATEGORIES), 4)
    wanted = rng.choice(kinds)
    options = [rng.choice(CATEGORIES[kind]) for kind in kinds]
    right = kinds.index(wanted)
    wrong = rng.choice([i for i in range(4) if i != right])
    mistaken = [
        rng.choice([x for x in kinds if x != wanted]) if i == right else kind
        for i, kind in enumerate(kinds)
    ]  # the slip misses the right option and takes a wrong one
    mistaken[wrong] = wanted
    listed = "".join(f"\n{x}: {y}" for x, y in zip(LETTERS, options, strict=True))
    row = user_row(f"Which is {wanted}?" + listed, expected_answer=LETTERS[right])
    row["options"] = [{x: y} for x, y in zip(LETTERS, options, strict=True)]
    row["grading_mode"] = "strict_single_letter_boxed"

    def solution(sorted_as: list[str], last: int) -> list[dict]:
        thought = ", ".join(f"{LETTERS[i]}: {sorted_as[i]}" for i in range(last + 1))
        return [assistant(thought, "\\boxed{%s}" % LETTERS[last])]

    return row, solution(kinds, right), solution(mistaken, wrong)


def structured(rng):
    """Turn a sentence into JSON; the schema fixes the values, so they must be copied exactly."""
    name = rng.choice(NAMES)
    age = rng.randint(10, 99)
    color = rng.choice(COLORS)
    food = rng.choice(FOODS)
    record = {"name": name, "age": age, "color": color, "food": food}
    keys = rng.sample(list(record), rng.randint(2, 3))
    schema = {
        "type": "object",
        "properties": {k: {"const": record[k]} for k in keys},
        "required": keys,
        "additionalProperties": False,
    }
    text = f"Meet {name}, who is {age} and likes {color} and {food}."
    prompt = "JSON with " + ", ".join(keys) + ": " + text
    slip = {k: record[k] for k in keys}
    broken = rng.choice(keys)
    if rng.random() < 0.5:
        values = {"name": NAMES, "age": (age - 1, age + 1), "color": COLORS, "food": FOODS}[broken]
        slip[broken] = rng.choice([x for x in values if x != record[broken]])
    else:
        del slip[broken]
    row = user_row(prompt, schema_str=json.dumps(schema), schema_type="json")
    good = json.dumps({k: record[k] for k in keys})
    return row, [assistant(", ".join(keys), good)], [assistant(", ".join(slip), json.dumps(slip))]


def tools(rng):
    """Call the tools of a small shop; half of the orders need a look-up first, so two turns."""
    item, other = rng.sample(FOODS + THINGS, 2)
    count, stock = sorted((rng.randint(2, 9), rng.randint(2, 9)))
    state = {"stock": {item: stock, other: rng.randint(2, 9)}, "orders": []}
    kind = rng.choice(("count", "order", "order all", "order all"))
    wrong = rng.choice([x for x in range(2, 10) if x not in (stock, count)])

    def look_up(name: str) -> dict:
        return assistant("lookup", "", [tool_call("lookup", item=name)])

    def order(number: int) -> dict:
        return assistant("order", "", [tool_call("order", item=item, count=number)])

    stock_known = [look_up(item), {"role": "tool", "content": str(stock)}]
    looks, orders = {"item": item}, {"item": item, "count": stock}
    if kind == "count":
        prompt, truth = f"How many {item} are there?", [("lookup", looks)]
        good, slip = [look_up(item)], [look_up(other)]
    elif kind == "order":
        prompt, truth = f"Order {count} {item}.", [("order", orders | {"count": count})]
        good, slip = [order(count)], [order(wrong)]
    else:
        prompt, truth = f"Order all {item}.", [("lookup", looks), ("order", orders)]
        good = [*stock_known, order(stock)]
        slip = [order(wrong)] if rng.random() < 0.5 else [*stock_known, order(wrong)]
    row = user_row(prompt, category="shop", environment={"name": "shop", "state": state})
    row["ground_truth"] = [{"name": n, "arguments": json.dumps(x)} for n, x in truth]
    row["responses_create_params"]["tools"] = SHOP_TOOLS
    result = str(stock) if kind == "count" else "done"
    closing = [{"role": "tool", "content": result}, assistant("done", "Done.")]
    return row, good + closing, slip + closing


def preference(rng):
    """An open question. SFT answers differ in quality; the judge is rule_judge."""
    topic, other = rng.sample(NOUNS, 2)
    subject = topic if rng.random() < 0.7 else other
    facts = [rng.choice(FACTS) for _ in range(rng.randint(1, 4))]  # repeats happen
    text = f"The {subject} {facts[0]}." + "".join(f" It {fact}." for fact in facts[1:])
    if rng.random() < 0.3:
        text += CLOSING
    row = user_row(f"Tell me about the {topic}.")
    row["agent_ref"] = {"type": "responses_api_agents", "name": "genrm_simple_agent"}
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
    row = user_row(" ".join(filler) + "\n" + question, question=question)
    row |= {"problem_type": "retrieval", "expected_answer": code}
    return row, [assistant(key, code)], [assistant(key, decoy)]


def attempted(rng):
    """A sum or a function: (its domain, row, right solution, two wrong ones)."""
    if rng.random() < 0.5:
        domain, task, problem = "math", math, (rng.randint(10, 99), rng.randint(10, 99))
    else:
        domain, task = "code", code
        problem = (*rng.sample(range(2, 10), 2), rng.choice(list(PROGRAMS)))
    (row, good, slip), (_, _, other) = task(rng, problem), task(rng, problem)
    row["problem"] = (
        domain,
        question_of(row),
    )  # the split depends on the problem that the attempt shows
    return row, good[0], slip[0], other[0]


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
    check = user_row(prompt, question=prompt, expected_answer=str(int(tried is good)))
    answers = [
        [assistant(good["reasoning_content"], analysis(good, tried, x))] for x in (False, True)
    ]
    return check | {"problem": row["problem"]}, *answers


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
        prompt = strategies.submission_prompt(
            question_of(row), [(x["content"], score) for x, score in past]
        )
    row["responses_create_params"] = user_row(prompt)["responses_create_params"]
    return row, [good], [tried]


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
        without = [
            m | {"reasoning_content": None} if m["role"] == "assistant" else m for m in chosen
        ]
        row["solutions"] = {"on": chosen, "off": without}
        rows.append(row if sft else checked_row(row))
    return rows


def vocabulary() -> list[str]:
    """Words and phrases that are one token each in the toy's tokenizer, in a fixed order."""
    nouns = [*NOUNS, *NAMES, "lookup", "order"]
    words = [*nouns, *(" " + x for x in nouns), *FACTS]
    words += [" " + x for x in FACTS] + [k for k in CATEGORIES]
    words += [x.split("{a}")[0].rstrip() for x in PROGRAMS]
    words += json.loads(Path(__file__).with_name("phrases.json").read_text("utf-8"))
    # The chat template's fixed text on the call format: one token for each part between markup.
    question = [{"role": "user", "content": ""}]
    text = render_template(TEMPLATE, question, tools_form(SHOP_TOOLS))
    texts = [x.text for x in split_markup(text, markup_pattern(MARKUP)) if not x.special]
    return words + [x[max(x.find("\n</tools>"), 0) :] for x in texts if len(x) > 20]
