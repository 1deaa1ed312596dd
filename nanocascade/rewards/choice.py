r"""Multiple choice: which option does the answer name, and is it the expected one?

The row says where to look: `template_metadata.output_regex` (the last group of its last match; one
pattern or several), and where that finds nothing, or there is none, its `grading_mode`:
    strict_single_letter_boxed   the last \boxed{}: a capital letter, with the option's text or not
    lenient_boxed                the last \boxed{}: a letter, "B. text", or an option's text
    lenient_answer_colon         the last "Answer: ..." line that names an option: the same
An answer that fits two options is a 0, "ambiguous answer": naming several must never pay. An option
that the answer names only to refuse it ("not B", "B is wrong") is not named.
"""

import re
import unicodedata
from string import ascii_lowercase

from nanocascade.rewards.base import Reward
from nanocascade.rewards.math import last_boxed
from nanocascade.sandbox.worker import TookTooLong, worker

MODES = ("strict_single_letter_boxed", "lenient_boxed", "lenient_answer_colon")
TAIL = 20_000  # characters that are looked at, from the end: where a final choice stands
MARKUP = re.compile(r"\\(?:boxed|text[a-z]*|math[a-z]+|rm|bf)(?![a-z])|[\\${}*_`]")
ANSWER_LINE = re.compile(r"answer[*_]{0,2}[ \t]*:[*_]{0,2}\s{0,9}([^\n]*)", re.IGNORECASE)
# Another option's letter after the first: "C)" and "(C)" anywhere, "or C" at the end, ", C" and
# "and C" right behind the first: further on they may be words of the option, "x = 2 and d = 3".
OTHERS = re.compile(
    r"(?:^|[\s,/])\(?([a-z])\s?[).:](?!\w)|\bor ([a-z])$"
    r"|\b(?:alternatively|maybe|perhaps|possibly|option|answer|choice|also|either|another is)"
    r"\W+([a-z])\b"
    r"|\b([a-z]) (?:is|may|might|could) (?:be )?(?:also|possible|correct|right|plausible)\b"
)
JOINED = re.compile(r"\s*(?:or|and|[,/&])\s*\(?([a-z])\b(?!\s*[=\w])[).:]?")
REFUSED = re.compile(  # "not B", "B is wrong", "unlike (C)"
    r"(?:\b(?:not|nor|isn't|unlike|except|rather than|instead of)\s+(?:option |answer )?"
    r"(?P<one>\(?[a-z]\b\)?))|(?P<two>\(?\b[a-z]\b\)?)\s+(?:is|was)\s+(?:not|wrong|incorrect|false)"
)
OPENING = re.compile(r"^(?:(?:the|my|final|correct|best|answer|option|choice|letter|is)\b[\s:]*)+")
AFTER_LABEL = r"\s?[).:](?!\w)|\)|\s*$|\s*[,;]|\s+-|\s+\(|\s+(?:because|since|as|is|due|or|and)\b"
AFTER_LABEL += r"|\s+(?:not|rather than|instead of)\s\(?[a-z]\b"
LABEL = re.compile(rf"\(?([a-z])(?={AFTER_LABEL})")  # "b", "(b)", "b: text"; not "a lot of"
CLOSING = re.compile(
    r"(?:^but|\b(?:is|be|choose|pick|select|option|answer|choice|letter|think|so|thus))"
    r"\W*\(?([a-z])\)?$"
)
FILLERS = set("it is the answer option choice so thus therefore be would must a an i think".split())


def plain(text):
    """For comparing option texts: no markup, lower case, one space between words, no full stop; a
    text of nothing else stays: "*" is an operation."""
    text = re.sub(r"\\[dt]frac", r"\\frac", unicodedata.normalize("NFKC", text))
    text = re.sub("[\u2010-\u2014\u2212]", "-", text)
    return " ".join(MARKUP.sub(" ", text).lower().split()).rstrip(".") or text.strip()


def named_options(text, options):
    """The letters that `text` names, by their label or by an option's text.

    {"a": "red", "b": "dark red"}: "(B)" -> {"b"}, "B: dark red" -> {"b"}, "A) or B" -> {"a", "b"}.
    """
    bare = plain(text)
    exact = {letter for letter, option in options.items() if option == bare}
    words = re.findall(r"\w+", bare)
    if words and bare[0] not in "!\u00ac" and all(word in options for word in words):
        return set(words)
    if exact:
        return exact
    bare = OPENING.sub("", bare)
    label = None if REFUSED.match(bare) else LABEL.match(bare)
    if label and label[1] in options:  # what an option's own text says names no other
        texts = named_texts(bare[label.end(1) :].lstrip("). :"), options)
        rest = bare[label.end(1) :].replace(options[label[1]] or "\0", " ").lstrip("). :")
        rest = REFUSED.sub(" ", rest)
        named = {label[1], *(x for letters in OTHERS.findall(rest) for x in letters)}
        while joined := JOINED.match(rest):
            named, rest = named | {joined[1]}, rest[joined.end() :]
        return named & options.keys() | texts
    bare = REFUSED.sub(" ", bare).strip(" ,.;")
    if closing := CLOSING.search(bare):  # "a safe choice would be b"
        return {closing[1]} & set(options)
    named = named_texts(bare, options)
    for letter in named:
        bare = bare.replace(options[letter], " ").replace(f"({letter})", " ")
    return named if {*re.findall(r"\S+", bare)} <= FILLERS | {"and", "or", ","} else set()


def named_texts(text, options):
    """Options whose text stands in `text`, the longest where one is part of another. A number that
    goes on, as 5 does in 1.5 or 5/7, is another number."""
    inside = {
        letter: option
        for letter, option in options.items()
        if option and re.search(rf"(?<![\w.,/-]){re.escape(option)}(?![\w/]|[.,]\d)", text)
    }
    longest = max(inside.values(), key=len, default="")
    return {x for x in inside if options[x] == longest or options[x] not in longest}


def last_match(pattern, text):
    """What the last match of a row's own pattern found, its last group, and what follows; in the
    helper, as it may backtrack forever."""
    named = None
    for match in re.finditer(pattern, text, re.IGNORECASE):
        named = match
    if not named:
        return None
    group = max((i for i, x in enumerate(named.groups(), 1) if x), default=0)
    return named[group], text[named.end(group) :][:20]


def by_pattern(patterns, text):
    """The answer that the row's patterns find, or None. "A lot of ..." is no answer A."""
    for pattern in patterns:
        if named := worker.run(last_match, "re", pattern, text):
            answer, after = named
            word = re.match(r"\s+([a-z]+)", after)
            article = word and word[1] not in ("because", "since", "as", "is", "due", "and", "or")
            if joined := JOINED.match(after.lower()):  # "B or C"
                return f"{answer}, {joined[1]}"
            return "" if answer in ("A", "a") and article else answer
    return None


def read_row(row):
    """([(letter, text)] of the options, the mode, the patterns). Options are a list of {letter:
    text}, or one dictionary; null is no text."""
    entries = row["options"] if isinstance(row["options"], list) else [row["options"]]
    options = [(k.lower(), v) for entry in entries for k, v in entry.items() if v is not None]
    mode = (row.get("grading_mode") or MODES[0]).removesuffix("_md")
    patterns = (row.get("template_metadata") or {}).get("output_regex") or []
    return options, mode, [patterns] if isinstance(patterns, str) else patterns


def verify_choice(row, message):
    """1 if the answer names the expected option and no other."""
    options, mode, patterns = read_row(row)
    options = {letter: plain(option) for letter, option in options}
    options = options or dict.fromkeys(ascii_lowercase, "")  # the pattern finds the letter
    text, strict, reason = message["content"][-TAIL:], False, "asked form not found"
    try:
        answer = by_pattern(patterns, text)
    except TookTooLong:
        return Reward(0.0, "search took too long")
    if answer is not None:
        answers = [answer]
    elif mode == "lenient_answer_colon":
        answers = ANSWER_LINE.findall(text)[-20:][::-1]
    else:
        answer, reason = last_boxed(text)
        answers, strict = [answer] if answer else [], mode == MODES[0]
    if not answers:
        return Reward(0.0, reason)
    named = next(filter(None, (named_options(x, options) for x in answers)), set())
    if strict and named and not is_capital_letter(answers[0], named, options):
        return Reward(0.0, "not a single letter")
    if len(named) != 1:
        return Reward(0.0, "ambiguous answer" if named else "not an option")
    correct = named == {row["expected_answer"].strip().lower()}
    return Reward(1.0, "correct") if correct else Reward(0.0, "wrong answer")


def is_capital_letter(answer, named, options):
    """Whether an answer is one capital letter, alone or before its own option's text."""
    bare = MARKUP.sub(" ", unicodedata.normalize("NFKC", answer))
    bare = re.sub(r"(?i)^\W*(?:(?:the|final|answer|option|choice|is)\b\W*)*", "", bare)
    letter, rest = bare[:1], plain(bare[1:]).lstrip("). :,]").removeprefix("- ")
    return letter.isupper() and {letter.lower()} == named and rest in ("", options[letter.lower()])


def check_choice_row(row):
    """ValueError unless options, expected answer, mode and pattern belong together."""
    options, mode, patterns = read_row(row)
    letters = [letter for letter, _ in options]
    if any(len(letter) != 1 for letter in letters) or len(set(letters)) != len(letters):
        raise ValueError(f"options must have distinct single letters, got {letters}")
    if blank := [pair for pair in options if not isinstance(pair[1], str) or not pair[1].strip()]:
        raise ValueError(f"an option must have a text, got {blank[0]!r:.80}")
    expected = row["expected_answer"].strip().lower()
    if expected not in letters and (letters or not patterns or len(expected) != 1):
        raise ValueError(f"expected_answer {row['expected_answer']!r} is none of {letters}")
    if mode not in MODES:
        raise ValueError(f"grading_mode {row['grading_mode']!r} is none of {MODES}")
    for pattern in patterns:
        re.compile(pattern)
