r"""Mathematics: the last \boxed{...} of the answer against `expected_answer`.

The last box counts, whatever stands in earlier ones. No box is a 0, and so is an empty one and one
that is never closed (earlier boxes do not help then). Nested braces are followed; \{, \} are text.
Boxes with no words between them but "or" and the like are one list: naming two values is not an
answer, unless two are expected.

answers.py reads both and says yes or no, exactly, for numbers, terms, lists, intervals and words.
What it cannot read is for math-verify (extra), in the helper process, whose floats have no say in
what differs by more than their rounding. Without it only rows that expect something readable are
accepted, and answers that are not are wrong.
"""

import re
from importlib.util import find_spec

from nanocascade.rewards.base import Reward
from nanocascade.rewards.compare import equal, readings
from nanocascade.sandbox.worker import TookTooLong, require, worker

MAX_BOX = 2_000  # characters, and so digits of a number
BOX = "\\boxed{"
# What may stand between boxes of one list: signs, commands, "x_1 =", "(a)" and these words, one of
# them JOINING: "or it could be", but not "answer:".
JOINING = set(
    "and or also either as well maybe perhaps possibly for alternatively alternative respectively "
    "part case else otherwise vs versus option guess another und oder et ou".split()
)
FILLING = set("answer is it the could can might may be".split())
WORD = re.compile(r"\\[A-Za-z]+|<\w+ */?>|[^\W\d_]{2,}")  # a command, a tag, a word


def boxed(rest):
    """(content of the box that opened just before `rest`, what follows it), or None."""
    depth = 1
    for match in re.finditer(r"(?s)\\.|[{}]", rest[: MAX_BOX + 1]):
        depth += {"{": 1, "}": -1}.get(match[0], 0)
        if depth == 0:
            return rest[: match.start()].strip(), rest[match.end() :]
    return None


def joins(between):
    """Whether a text between two boxes makes them one list: "} or y = " does, "} no, " does not."""
    words = {x.lower() for x in WORD.findall(between) if x[0] not in "\\<"}
    joined = words <= JOINING | FILLING and (not words or words & JOINING)
    return len(between) <= 100 and bool(joined)


def worded_list(between):
    """The same for an expected answer, where the values may be explained: "} papers and "."""
    return joins(between) or bool(re.search(r",|;|\b(?:and|or)\b", between[:100]))


def last_boxed(text, joins=joins):
    r"""(content, None) of the last box, or (None, reason): r"\boxed{x^{2}}." -> ("x^{2}", None).

    Boxes that are joined are one list: r"\boxed{1} and \boxed{2}" -> "1, 2".
    """
    before, mark, rest = text.replace("\\fbox{", BOX).rpartition(BOX)
    if not mark:
        return None, "no boxed answer"
    if not (box := boxed(rest)):
        return None, "answer too long" if len(rest) > MAX_BOX else "unfinished box"
    content, before = box[0], before[-MAX_BOX:]
    while content:
        before, mark, rest = before.rpartition(BOX)
        box = boxed(rest) if mark else None
        if not box or not joins(box[1]):
            return content, None
        content = f"{box[0]}, {content}" if box[0] != content else content
    return None, "empty box"


def expected(row):
    """The row's answer as text; of a worded one what is in its last boxes."""
    text = str(row["expected_answer"])
    return last_boxed(text, worded_list)[0] or text


def apart(one, two, decimals):
    """Whether two sympy values differ by more than rounding: the library compares six decimals."""
    import sympy

    if not all(isinstance(x, sympy.Expr) and not x.free_symbols for x in (one, two)):
        return False
    one, two = (sympy.N(x, 60) for x in (one, two))
    if not (one.is_number and two.is_number):
        return False
    return bool(abs(one - two) > (1e-6 if decimals else 1e-50) * abs(one))


def latex_equal(gold, answer):
    """math-verify's verdict, in the helper, whose clock replaces the library's SIGALRM.

    Both go in as boxes: that is where the library reads lists, sets and units best.
    """
    from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse, verify

    latex, plain = LatexExtractionConfig(), ExprExtractionConfig()
    wanted, given = (
        parse(text if BOX in text else f"{BOX}{text}}}", targets, parsing_timeout=None)
        for text, targets in ((gold, [latex]), (answer, [latex, plain]))
    )
    if not verify(wanted, given, timeout_seconds=None):
        return False
    return not apart(wanted[0], given[0], "." in gold + answer)


def verify_math(row, message):
    """1 if the last box holds the expected answer."""
    answer, reason = last_boxed(message["content"])
    if answer is None:
        return Reward(0.0, reason)
    verdict = equal(expected(row), answer)
    if verdict is None and find_spec("math_verify"):
        try:
            gold = str(row["expected_answer"])
            verdict = worker.run(latex_equal, "math_verify", gold, answer)
        except TookTooLong:
            return Reward(0.0, "comparison took too long")
        except ValueError:
            return Reward(0.0, "answer not understood")
    if verdict is None:
        return Reward(0.0, "answer not understood")
    return Reward(1.0, "correct") if verdict else Reward(0.0, "wrong answer")


def check_math_row(row):
    """ValueError unless the expected answer is something this machine can compare with."""
    wanted = row["expected_answer"]
    if not isinstance(wanted, (str, int, float)) or not 0 < len(str(wanted)) <= MAX_BOX:
        raise ValueError(f"expected_answer must be a number or short text, got {wanted!r:.80}")
    if any(node.kind in ("other", "equation") for node in readings(expected(row), True)):
        require("math_verify", "math-verify", f"expected_answer {wanted!r:.80}")
