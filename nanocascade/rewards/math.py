r"""Mathematics: the last \boxed{...} of the answer against `expected_answer`.

The last box counts, whatever stands in earlier ones. No box is a 0, and so is an empty one and one
that is never closed (earlier boxes do not help then). Nested braces are followed; \{, \} are text.

Two answers are equal as text once LaTeX's spacing is gone, or as numbers (integers, decimals,
fractions, exactly, as Python's rationals). The rest is for math-verify (extra), in the helper
process. Without it only rows that expect a plain number are accepted, and other answers are wrong.
"""

import re
from fractions import Fraction
from importlib.util import find_spec

from nanocascade.rewards.base import Reward
from nanocascade.sandbox.worker import TookTooLong, require, worker

MAX_BOX = 2_000  # characters, and so digits of a number
BOX = "\\boxed{"
# Boxes that form one list stand apart by spaces, delimiters, commas, an "and", also in \text, and
# the name of what the next box is: "\boxed{1} \text{ for (a) and } y_2 = \boxed{2}".
FILL = r"(?:[\s$]|\\[,;: ()\[\]]|\\q?quad)*"
JOINER = re.compile(
    rf"{FILL}(?:(?:[,;]|and|\\text\{{[\w ()]{{0,30}}\band\s*\}}){FILL})+"
    rf"(?:[A-Za-z](?:_\{{?\w+\}}?)?{FILL}={FILL})?"
)
SPACING = re.compile(  # not the space before a digit in "1 1/2" and "32, 349"
    r"\\left\b|\\right\b|\\displaystyle\b|\\[,;:! ]|(?<![0-9,])\s+|\s+(?![0-9])"
)
INTEGER = r"(?:[0-9]{1,3}(?:,[0-9]{3})+|[0-9]+)"
NUMBER = re.compile(  # \frac{1}{2}, \frac12, 1/2, 1,234.5, 1 234.5
    rf"([+-]?)(?:\\frac\{{([+-]?{INTEGER})\}}\{{({INTEGER})\}}|\\frac([0-9])([0-9])"
    rf"|({INTEGER})/({INTEGER})"
    rf"|(?=\.?[0-9])((?:[0-9]{{1,3}}(?: [0-9]{{3}})+|{INTEGER})?(?:\.[0-9]*)?))"
)


def boxed(rest):
    """(content of the box that opened just before `rest`, what follows it), or None."""
    depth = 1
    for match in re.finditer(r"(?s)\\.|[{}]", rest[: MAX_BOX + 1]):
        depth += {"{": 1, "}": -1}.get(match[0], 0)
        if depth == 0:
            return rest[: match.start()].strip(), rest[match.end() :]
    return None


def last_boxed(text):
    r"""(content, None) of the last box, or (None, reason): r"\boxed{x^{2}}." -> ("x^{2}", None).

    Boxes joined by nothing but "," or "and" are one list: r"\boxed{1} and \boxed{2}" -> "1, 2".
    """
    before, found, rest = text.rpartition(BOX)
    if not found:
        return None, "no boxed answer"
    if not (box := boxed(rest)):
        return None, "answer too long" if len(rest) > MAX_BOX else "unfinished box"
    content, before = box[0], before[-MAX_BOX:]
    while content:
        before, found, rest = before.rpartition(BOX)
        box = boxed(rest) if found else None
        if not box or not JOINER.fullmatch(box[1]):
            return content, None
        content = f"{box[0]}, {content}"
    return None, "empty box"


def undelimited(latex):
    r"""Without the mathematics delimiters around it: r"\(x\)" and "$x$." -> "x"."""
    text = latex.strip().rstrip(".").strip()
    inside = re.fullmatch(r"(?s)(\\[(\[]|\$\$?)(.+?)(\\[)\]]|\$\$?)", text)
    return inside[2].strip() if inside else text


def normalize(latex):
    r"""Drop what changes no value: r"\( \dfrac{1}{ 2 } \)." -> r"\frac{1}{2}"."""
    text = re.sub(r"\\[dt]frac(?![a-zA-Z])", r"\\frac", undelimited(latex).replace("{,}", ","))
    return SPACING.sub("", re.sub(r"^\\(?:boxed|text|mathrm|mathbf)\{([^{}]*)\}$", r"\1", text))


def rational(text):
    r"""Exact value of a normalized plain number, else None: "-1,234.50", r"\frac{3}{4}", "3/4"."""
    if not (match := NUMBER.fullmatch(text)):
        return None
    parts = [Fraction(re.sub("[ ,]", "", x)) for x in match.groups()[1:] if x is not None]
    above, below = [*parts, 1][:2]
    return above / below * (-1 if match[1] == "-" else 1) if below else None


def latex_equal(gold, answer):
    """math-verify's verdict, in the helper, whose clock replaces the library's SIGALRM.

    Both go in as boxes: that is where the library reads lists, sets and units best.
    """
    from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse, verify

    latex, plain = LatexExtractionConfig(), ExprExtractionConfig()
    gold, given = (
        parse(text if BOX in text else f"{BOX}{text}}}", targets, parsing_timeout=None)
        for text, targets in ((gold, [latex]), (answer, [latex, plain]))
    )
    return verify(gold, given, timeout_seconds=None)


def verify_math(row, message):
    """1 if the last box holds the expected answer."""
    answer, reason = last_boxed(message["content"])
    if answer is None:
        return Reward(0.0, reason)
    gold, given = normalize(str(row["expected_answer"])), normalize(answer)
    values = rational(gold), rational(given)
    if None in values and "." in gold + given:  # beside "1.5" the other's "1,5" is a decimal too
        values = [
            rational(re.sub(r"^([+-]?[0-9]+),([0-9]+)$", r"\1.\2", x)) if v is None else v
            for x, v in zip((gold, given), values, strict=True)
        ]
    if gold == given or (None not in values and values[0] == values[1]):
        return Reward(1.0, "correct")
    whole = None not in values and values[0].denominator == values[1].denominator == 1
    if whole or find_spec("math_verify") is None:  # of two integers nobody else needs asking
        return Reward(0.0, "not a plain number" if values[1] is None else "wrong answer")
    try:  # decimals come here too: the library compares them to six places (0.333333 is 1/3)
        gold = undelimited(str(row["expected_answer"]))
        equal = worker.run(latex_equal, "math_verify", gold, answer)
    except TookTooLong:
        return Reward(0.0, "comparison took too long")
    except ValueError:
        return Reward(0.0, "answer not understood")
    return Reward(1.0, "correct") if equal else Reward(0.0, "wrong answer")


def check_math_row(row):
    """ValueError unless the expected answer is something this machine can compare with."""
    expected = row["expected_answer"]
    if not isinstance(expected, (str, int, float)) or not 0 < len(str(expected)) <= MAX_BOX:
        raise ValueError(f"expected_answer must be a number or short text, got {expected!r:.80}")
    if rational(normalize(str(expected))) is None:
        require("math_verify", "math-verify", f"expected_answer {expected!r:.80}")
