r"""Mathematics: what an answer in a box says, kind by kind, and that no second reading of it pays.

Every table is of (expected answer, right answers, wrong ones). All of it is decided by our own
reading, exactly and without an extra; the last table says what we leave to the library.
"""

import pytest

from nanocascade.rewards import score
from nanocascade.rewards.compare import equal
from nanocascade.rewards.math import last_boxed

KINDS = {
    "numbers written otherwise": [
        ("1500", ["1,500", "1 500", r"1\,500", "1{,}500", "1.5e3", "1.5E+3", "15*10^2"], ["1.500"]),
        (
            "0.00072",
            [r"7.2\times10^{-4}", "7.2e-4", r"72\cdot 10^{-5}", "7.2\u00d710\u207b\u2074"],
            [],
        ),
        ("1234567", ["1.234.567", "12,34,567", "1'234'567"], ["1234.567"]),
        (r"\frac{3}{4}", ["0.75", "75\\%", "\u00be", r"\tfrac34", "3/4", "6/8"], ["4/3", "34"]),
        ("7/2", ["3 1/2", r"3\frac12", r"3\tfrac{1}{2}", "3\u00bd", "3.5"], ["31/2", "3/2"]),
        ("-4 1/3", ["-13/3"], ["-11/3", "-4"]),
        ("1 1/2", ["3/2"], ["11/2", "1"]),
        (r"0.1\overline{6}", ["1/6", "0.1(6)", r"\frac16"], ["0.16"]),
        ("8", ["\\text{eight}", "2^3", r"\sqrt{64}", "+8.0", "\u200b8", "8,", "x = 8"], ["-8"]),
        ("-3", ["\u22123", "\u20133"], ["3"]),
    ],
    "decimals do not round": [
        ("2.7182818", [], ["2.7182819", "2.718282"]),
        (r"1.38\times10^{-23}", ["1.380e-23"], [r"1.60\times10^{-19}", "0.00000001", "0"]),
        ("0.0000012", [], ["0.000001", "0.0000013"]),
        (r"\frac{2}{3}", ["0.666667", "0.666666"], ["0.6667", "0.666668"]),
        (r"\sqrt{3}", ["1.732051"], ["1.7321", "1.732052"]),
    ],
    "tiny differences are differences": [
        (r"\frac{1}{90!}", [r"\frac{90}{90\cdot 90!}"], [r"\frac{1}{91!}", "0"]),
        (r"\frac{2^{99}+1}{2^{100}}", [r"\frac12+2^{-100}"], [r"\frac{1}{2}"]),
        (r"10^{-40}", [], [r"10^{-41}"]),
    ],
    "roots, letters and series": [
        (r"\frac{1}{\sqrt{5}}", [r"\frac{\sqrt5}{5}", r"\sqrt{\frac15}"], [r"\frac{\sqrt5}{4}"]),
        ("x^2-9", ["(x-3)(x+3)", "x\u00b2 - 9"], ["(x-3)^2"]),
        ("3-2i", ["3.0 + -2.0i", "-2i+3"], ["3+2i"]),
        (r"2^{12}-1", [r"\sum_{k=0}^{11} 2^k", "4095"], [r"\sum_{k=0}^{12} 2^k"]),
        (r"(1+\sqrt2)^{50}", [r"(3+2\sqrt2)^{25}"], [r"(3+2\sqrt2)^{26}"]),
        (r"1+\sqrt2", [r"\sqrt{3+2\sqrt2}"], [r"\sqrt{3-2\sqrt2}"]),
        ("0", [r"(\sqrt3+1)(\sqrt3-1)-2", "i^2+1", "x-x"], [r"\sqrt3\cdot 10^{-2000}"]),
        (r"\sqrt{xy}", [r"\sqrt{x}\sqrt{y}"], [r"\sqrt{x}+\sqrt{y}"]),
        ("g(t)=3t-1", ["3t-1", "h(x)=3x-1"], ["g(t)=3t+1"]),
        ("12pi", [r"12\pi"], [r"11\pi"]),
    ],
    "several values for one": [
        (
            "17",
            ["x=17", r"\approx 17", "16+1=17", r"\text{Total: }17"],
            [
                r"16 \text{ or } 17",
                "16, 17",
                "16; 17",
                "16 17",
                r"16\\17",
                r"16 \lor 17",
                r"16 \vee 17",
                "16 | 17",
                r"16 \to 17",
                r"16 \Leftrightarrow 17",
                r"16 \cup 17",
                r"16 \& 17",
                r"16 \dots 17",
                "16 = 17",
                r"17 \approx 16",
                r"\le 17",
                "x > 17",
                r"x \ne 17",
                r"\pm 17",
                r"\{16,17\}",
                "[16,17]",
                "16 \u2013 17",
                r"\text{not } 17",
                r"17 \text{ (and not 16)}",
                r"\text{between 16 and 18}",
                r"16 \oplus 17",
                r"16 \text{ (or } 17)",
                "16 @ 17",
                "16 \u27f9 17",
                "16 \u0438\u043b\u0438 17",
                r"\not= 17",
                r"x \not\approx 17",
                r"17 \text{ at most}",
            ],
        ),
        ("3, 8", ["8, 3", r"3 \text{ and } 8", r"\{3,8\}", "x=3 or x=8"], ["3", "38", "3, 8, 9"]),
        ("2,7", ["2, 7", "7,2"], ["2.7", "27"]),
        ("2.7", ["2,7"], ["2, 7"]),
    ],
    "letters in their order": [
        ("DBCA", ["D B C A", r"\text{DBCA}"], ["ABCD", "BDCA"]),
        ("stone", [r"\text{Stone}"], ["notes", "onset"]),
        (r"(1\ 4\ 2)", [r"(4\ 2\ 1)"], [r"(1\ 2\ 4)"]),
        (r"u \times v", ["u\\times v"], [r"v \times u"]),
        ("PQ^T", ["PQ^{T}"], ["QP^T", "P^TQ"]),
        ("A^{-1}B", [], ["BA^{-1}"]),
        ("3pq", ["3qp"], ["3p"]),
        ("(1 2)(2 3)", [], ["(2 3)(1 2)"]),
        ("(1 2)(3 4)", ["(4 3)(1 2)"], ["(1 3)(2 4)"]),
        (r"\vec{a} \times \vec b", [r"\vec a\times\vec b"], [r"\vec{b} \times \vec{a}"]),
        (r"\angle PQR", ["PQR"], [r"\angle QPR"]),
    ],
    "bases": [
        ("201_3", ["201_{3}", "19_{10}", "201", "(201)_3", "201_{(3)}"], ["201_4", "19"]),
        (r"65_{\text{eight}}", ["65_8"], [r"65_{\text{nine}}", "65_9"]),
        ("12.3_5", ["12.30_5"], ["12.3_6"]),
        ("0x1F", ["1F_{16}"], ["0x2F", "0"]),
    ],
    "units and marks": [
        ("6 \\text{ kg}", ["6", "6\\,\\mathrm{kg}", "6000 g"], ["6 \\text{ g}", "6 \\text{ lb}"]),
        ("45", ["45^\\circ", "45\u00b0", "\\$45", "45 \\text{ men}"], ["45\\%"]),
        ("45\\%", ["0.45", "45", "45 \\text{ percent}"], ["4.5", "45 \\text{ dollars}"]),
        ("\u20ac12", ["12", "12 \\text{ euros}"], ["\\$12"]),
        ("8{:}15 \\text{ AM}", ["8:15 \\text{ AM}"], ["8{:}15 \\text{ PM}"]),
        ("3 \\text{ mW}", ["0.003 W"], ["3 \\text{ MW}"]),
        ("6 \\text{ gallons}", ["6", "24 \\text{ quarts}"], ["6 \\text{ pints}", "6 \\text{ L}"]),
        ("7 \\text{ bar}", ["7"], ["7 \\text{ atm}"]),
        ("8:15 \\text{ AM}", ["8:15 a.m.", "8:15"], ["8:15 \\text{ PM}", "8:16 AM"]),
        ("90 \\text{ km/h}", ["90", "25 m/s"], ["90 \\text{ mph}"]),
        ("4 \\text{ cm}^2", ["4"], ["4 \\text{ cm}"]),
        ("h''(x)", [], ["h'(x)", "h(x)"]),
        (r"\SI{3}{\milli\meter}", ["3", "3 mm"], ["3 \\text{ m}"]),
        (r"5\,\mu\text{m}", ["5", "0.005 \\text{ mm}"], ["5 \\text{ m}"]),
        (
            r"20^\circ\text{C}",
            ["20", "20^\\circ", r"\text{20 degrees}"],
            [r"20^\circ\text{F}", "20 \\text{ m}"],
        ),
        ("5 \\text{ million dollars}", ["5000000", "\\$5,000,000"], ["5", "\u20ac5000000"]),
        ("10:30", [], [r"\frac13", "1:3"]),
        ("2:3", ["4:6", r"\frac23"], ["3:2"]),
    ],
    "dates and ranges": [
        ("2021-11-04", [], ["2006", "2021-04-11"]),
        ("4-9", ["4\u20139"], ["-5"]),
        ("4-9 \\text{ km}", ["4-9"], ["-5 \\text{ km}", "4-9 \\text{ m}"]),
        ("1.5-4", ["1.50\u20134"], ["-2.5"]),
    ],
    "order and relations": [
        ("a=2, b=9", ["b=9, a=2", "2, 9", "(2,9)"], ["9, 2", "a=9, b=2", "(9,2)", r"\{2,9\}"]),
        ("(x,y)=(4,1)", ["(4,1)"], ["(y,x)=(4,1)"]),
        ("(4,1)", ["(4, 1)"], ["(1,4)", r"\{4,1\}"]),
        ("m+n=12", [], ["12"]),
        ("(1,2]", ["1<x\\le 2", "]1,2]"], ["(1,2)", "[1,2]"]),
        (r"(-\infty,5]", [r"x \le 5", "]-\u221e,5]", r"\{x \mid x \leq 5\}"], ["x<5", "5"]),
        (r"x<0 \text{ or } x \ge 2", [r"(-\infty,0)\cup[2,\infty)"], [r"(-\infty,0)"]),
        (r"\begin{pmatrix}1&0\\2&3\end{pmatrix}", [], [r"\begin{pmatrix}1&2\\0&3\end{pmatrix}"]),
    ],
    "words": [
        (r"\text{No solution}", [r"\varnothing", r"\{\}", "no solutions"], ["0"]),
        (r"\infty", ["\u221e", r"\text{infinity}"], [r"-\infty", "0"]),
        (r"\textbf{(B)}\ 12", ["12", "B", r"\text{(B)}"], ["13", "C"]),
        (r"3 \pmod{8}", ["3"], ["5", r"3 \pmod{9}"]),
        (r"\mathbb{R}", [r"(-\infty,\infty)", r"\text{all real numbers}"], [r"(0,\infty)"]),
        ("Tuesday", [r"\text{tuesday}"], ["Thursday"]),
    ],
}


@pytest.mark.parametrize("kind", KINDS)
def test_kinds(kind):
    """Right answers of a kind are a certain yes and wrong ones a certain no."""
    for expected, right, wrong in KINDS[kind]:
        for answer in [expected, *right]:
            assert equal(expected, answer) is True, (expected, answer)
        for answer in wrong:
            assert equal(expected, answer) is False, (expected, answer)


@pytest.mark.parametrize(
    "between",
    [
        " or ",
        "$ or $x = ",
        " (or ",
        r" \lor ",
        r"\n",
        "\n\n",
        " / ",
        " | ",
        " and ",
        r" \text{ or possibly } ",
        ", alternatively ",
        " oder ",
        "<br>",
        ", or else ",
        ". Alternative answer: ",
        " vs ",
        ". It could also be ",
        "",
        " = ",
    ],
)
def test_boxes_that_only_or_joins_are_one_list(between):
    """Two boxes are two values, whatever joins them; the same value twice is one; a word that takes
    the first back leaves the last."""
    both = rf"\boxed{{6}}{between}\boxed{{7}}"
    assert last_boxed(both) == ("6, 7", None)
    assert score({"expected_answer": "7"}, both).value == 0
    assert score({"expected_answer": "7, 6"}, both).value == 1
    assert last_boxed(both.replace("6", "7")) == ("7", None)
    assert last_boxed(r"\boxed{6} no, I mean \boxed{7}") == ("7", None)
    assert last_boxed(r"\fbox{6} or \boxed{7}") == ("6, 7", None)


@pytest.mark.parametrize(
    "response, reward",
    [
        ("<think>7</think>\\boxed{7}", 1),
        ("<think></think><think>\\boxed{7}</think> Who knows.", 0),
        ("Let me see. <think>\\boxed{7}</think> No idea.", 0),
        ("<think>a <think>b</think> \\boxed{7}</think> No.", 0),
        ("<think>a</think> \\boxed{7} </think> No.", 0),
        ("<think>a</think> Well, <think>\\boxed{7}", 0),
        ("<think>a</think> Well, <think>b</think> \\boxed{7}", 1),
    ],
)
def test_only_what_stands_outside_every_thought_is_graded(response, reward):
    """A second, late, nested or unclosed thought earns nothing, in mathematics and in programs."""
    assert score({"expected_answer": "7"}, response).value == reward


@pytest.mark.parametrize(
    "text", ["9^{9^{9}}", "(x+1)(x+2)" * 90, "3000!" + "+3000!" * 200, "((" * 500]
)
def test_what_is_too_large_is_left_alone(text):
    """No term costs more than a bounded number of operations: then the verdict is the library's."""
    assert equal("7", text) is not True


def test_what_is_left_to_the_library():
    """Functions, powers of letters and equations are not ours: None, never a guess."""
    for expected, answer in (
        (r"\log_3 9", "2"),
        ("2^n", r"2\cdot 2^{n-1}"),
        ("x+y=3", "y=3-x"),
        ("9", "b+c=9"),
        (r"\sin 30^\circ", "0.5"),
        (r"\sqrt{x^2}", "x"),
        ("1", "(-1)^n"),
        ("e^{-9000}", "e^{-9001}"),
    ):
        assert equal(expected, answer) is None, (expected, answer)


def test_a_yes_of_the_library_must_hold_to_its_digits():
    """math-verify compares six decimals: what is smaller than that is compared to 50 digits."""
    pytest.importorskip("math_verify")
    for expected, right, wrong in (
        ("e^{-50}", r"\exp(-50)", "e^{-51}"),
        (r"\ln 2", r"\frac{\ln 4}{2}", r"\ln 3"),
        (r"\sin(10^{-9})", r"-\sin(-10^{-9})", r"\sin(10^{-10})"),
        (r"\sin(10^{-10})", r"-\sin(-10^{-10})", "10^{-10}"),
    ):
        assert score({"expected_answer": expected}, rf"\boxed{{{right}}}").value == 1, right
        assert score({"expected_answer": expected}, rf"\boxed{{{wrong}}}").value == 0, wrong
