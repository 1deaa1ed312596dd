r"""Multiple choice: which option does the answer name, and is it the expected one?

The row says where to look: `template_metadata.output_regex` (its group, in the last match) if it
has one, else `grading_mode`:
    strict_single_letter_boxed   the last \boxed{}: one capital letter, LaTeX and brackets aside
    lenient_boxed                the last \boxed{}: a letter, "B. text", or an option's text in it
    lenient_answer_colon         the last "Answer: ..." line: the same, an option's text alone
An answer that fits two options is a 0, "ambiguous answer": naming several must never pay.
"""

import re

from nanocascade.rewards.base import Reward
from nanocascade.rewards.math import last_boxed
from nanocascade.sandbox.worker import TookTooLong, worker

MODES = ("strict_single_letter_boxed", "lenient_boxed", "lenient_answer_colon")
TAIL = 20_000  # characters that are looked at, from the end: where a final choice stands
MARKUP = re.compile(r"\\(?:boxed|text[a-z]*|math[a-z]+|rm|bf)(?![a-z])|[\\${}*_`]")
ANSWER_LINE = re.compile(r"answer[*_]{0,2}[ \t]*:([^\n]*)", re.IGNORECASE)
# Another option's letter after the first: "C)" and "(C)" anywhere, "or C" at the end, ", C" and
# "and C" right behind the first: further on they may be words of the option, "x = 2 and d = 3".
OTHERS = re.compile(r"(?:^|[\s,/])\(?([a-z])\s?[).:](?!\w)|\bor ([a-z])$")
JOINED = re.compile(r"\s*(?:or|and|[,/&])\s*\(?([a-z])\b(?!\s*[=\w])[).:]?")
ONE_CAPITAL = re.compile(r"[^A-Za-z0-9]*[A-Z][^A-Za-z0-9]*")


def plain(text):
    """For comparing option texts: no markup, lower case, one space between words, no full stop; a
    text of nothing else stays: "*" is an operation."""
    return " ".join(MARKUP.sub(" ", text).lower().split()).rstrip(".") or text.strip()


def named_options(text, options, anywhere):
    """The letters that `text` names; with `anywhere`, an option's text inside it names it too.

    {"a": "red", "b": "dark red"}: "(B)" -> {"b"}, "B: dark red" -> {"b"}, "A) or B" -> {"a", "b"}.
    """
    bare = plain(text)
    words = re.findall(r"\w+", bare)
    if words and all(word in options for word in words):
        return set(words)
    exact = {letter for letter, option in options.items() if option == bare}
    if exact:
        return exact
    label = re.match(r"\(?([a-z])\s?[).:]", bare)
    found = {label[1]} & set(options) if label else set()
    if found:  # what an option's own text says names no other: "B: both (a) and (c)"
        rest, own = bare[label.end() :], options[label[1]]
        same = "".join(rest.split()) == "".join(own.split())  # but for spaces
        rest = "" if same else rest.replace(own, " ")
        found.update(x for pair in OTHERS.findall(rest) for x in pair if x in options)
        while joined := JOINED.match(rest):
            found, rest = found | {joined[1]} & set(options), rest[joined.end() :]
    if found or anywhere:  # "B: 17" where option C is "17" names both
        inside = {
            letter: option
            for letter, option in options.items()
            if re.search(rf"(?<!\w){re.escape(option)}(?!\w)", bare)
        }
        longest = max(inside.values(), key=len, default="")
        found.update(x for x in inside if options[x] == longest or options[x] not in longest)
    return found


def last_match(pattern, text):
    """The last match of a row's own pattern; in the helper, as it may backtrack forever."""
    matches = list(re.finditer(pattern, text, re.IGNORECASE))
    return matches[-1][1 if matches[-1].re.groups else 0] if matches else None


def verify_choice(row, message):
    """1 if the answer names the expected option and no other."""
    options = {k.lower(): plain(v) for entry in row["options"] for k, v in entry.items()}
    pattern = (row.get("template_metadata") or {}).get("output_regex")
    mode = "pattern" if pattern else row.get("grading_mode", MODES[0])
    text, reason = message["content"][-TAIL:], "asked form not found"
    if mode == "pattern":
        try:
            answer = worker.run(last_match, "re", pattern, text)
        except TookTooLong:
            return Reward(0.0, "search took too long")
    elif mode == "lenient_answer_colon":
        answer = (ANSWER_LINE.findall(text) or [None])[-1]
    else:
        answer, reason = last_boxed(text)
    if answer is None:
        return Reward(0.0, reason)
    if mode == MODES[0] and not ONE_CAPITAL.fullmatch(MARKUP.sub(" ", answer)):
        return Reward(0.0, "not a single letter")
    found = named_options(answer, options, anywhere=mode == "lenient_boxed")
    if len(found) != 1:
        return Reward(0.0, "ambiguous answer" if found else "not an option")
    correct = found == {row["expected_answer"].strip().lower()}
    return Reward(1.0, "correct") if correct else Reward(0.0, "wrong answer")


def check_choice_row(row):
    """ValueError unless options, expected answer, mode and pattern belong together."""
    letters = [letter.lower() for entry in row["options"] for letter in entry]
    if any(len(letter) != 1 for letter in letters) or len(set(letters)) != len(letters):
        raise ValueError(f"options must have distinct single letters, got {letters}")
    if blank := [
        entry
        for entry in row["options"]
        for text in entry.values()
        if not isinstance(text, str) or not text.strip()
    ]:
        raise ValueError(f"an option must have a text, got {blank[0]!r:.80}")
    if row["expected_answer"].strip().lower() not in letters:
        raise ValueError(f"expected_answer {row['expected_answer']!r} is none of {letters}")
    if row.get("grading_mode", MODES[0]) not in MODES:
        raise ValueError(f"grading_mode {row['grading_mode']!r} is none of {MODES}")
    re.compile((row.get("template_metadata") or {}).get("output_regex") or "")
