r"""One spelling of a mathematical answer: what is written differently and means the same.

r"\dfrac12\text{ km or }\tfrac{1}{3}" -> r'\frac{1}{2} "km" ; \frac{1}{3}': words stand in double
quotes, signs outside ASCII have their command, sizes are gone, "or" is ";" and "and" ",".
"""

import re
import unicodedata

from nanocascade.rewards.exact import FUNCTIONS
from nanocascade.rewards.units import find_unit

SPELLING = """- \u2212\u2013\u2014\u2010
' \u2019\u2032
\\Omega \u03a9
\\mu \u03bc
\\times \u00d7
\\cdot \u00b7\u22c5
\\div \u00f7
\\infty \u221e
\\pi \u03c0
\\sqrt \u221a
^\\circ \u00b0
\\le \u2264
\\ge \u2265
\\ne \u2260
\\approx \u2248
\\cup \u222a
\\cap \u2229
\\emptyset \u2205
\\in \u2208
\\pm \u00b1
\\to \u2192
\\Rightarrow \u21d2
\\lor \u2228
\\land \u2227
/ \u2044\u2215
; \u2022
"euro" \u20ac
"sterling" \u00a3
"yen" \u00a5
"rupee" \u20b9"""
SPELLING = {  # signs outside ASCII, after NFKC; a command ends with a space
    ord(sign): f"{line.split()[0]} " if "\\" in line else line.split()[0]
    for line in SPELLING.splitlines()
    for sign in line.split()[1]
}
RAISED = "\u2070\u00b9\u00b2\u00b3\u2074\u2075\u2076\u2077\u2078\u2079\u207b"
LOWERED = "\u2080\u2081\u2082\u2083\u2084\u2085\u2086\u2087\u2088\u2089"
VOCABULARY = """zero 0 one 1 two 2 three 3 four 4 five 5 six 6 seven 7 eight 8 nine 9 ten 10
eleven 11 twelve 12 thirteen 13 fourteen 14 or ; oder ; ou ; and , und , et ,
percent % pct % percentage % hundred *100 thousand *1000 million *10^6 billion *10^9 dozen *12
infinity \\infty infinite \\infty pi \\pi sqrt \\sqrt"""
VOCABULARY = dict(zip(VOCABULARY.split()[::2], VOCABULARY.split()[1::2], strict=True))
QUOTED = re.compile(
    r"\\(text(?:bf|it|rm|sf|tt|normal|up)?|mathrm|[mh]box|operatorname\*?|rm)\s*\{([^{}]*)\}"
)
BARE = re.compile(r"\\(?:begin|end)\{\w+\*?\}|_\{[^{}]*\}|\\[A-Za-z]+|([A-Za-z]{2,}(?:'t)?)")
SIUNITX = re.compile(r"\\(?:SI|qty)\s*\{([^{}]*)\}\s*\{([^{}]*)\}")
CURRENCY = re.compile(r'^([+-]?)\s*"(euro|sterling|yen|rupee|dollar)s?"\s*(?=[\d.])(.+)$')
GROUPS = re.compile(  # 12,34,567 and 1.234.567: nothing else is written so
    r"(?<![\d.,])(?:\d{1,2}(?:,\d\d)+,\d{3}|\d{1,3}(?:\.\d{3}){2,}|\d{1,3}(?:'\d{3})+)(?![\d.,])"
)
REPLACED = [
    (r"(?i)^(?:\\mathbb\s*\{?R\}?|(?:\\text\{)?all real(?: number)?s\}?)$", r"(-\\infty,\\infty)"),
    (r",\\!\s*|\{,\}", ","),
    (r"\{:\}", ":"),
    (r"\\\$", '"dollar"'),
    (r"\\%", "%"),
    (  # delimiters and sizes, which change no value
        r"\\(?:left|right)\s*\.|\\(?:left|right|[bB]igg?[lrm]?|(?:display|text)style|(?:no)?limits)"
        r"(?![a-zA-Z])|(?<!\\)\\[()\[\]]|\\!|\\(?:text)?color\s*\{[^{}]*\}|\*\*|`|\\label\{[^{}]*\}"
        r"|\\(?:math(?:bf|it|sf|cal|bb)|bm|boldsymbol|underline|boxed|fbox|angle)(?![a-zA-Z])",
        "",
    ),
    (r"(?<!\\)\\[,;:> ]|\\q?quad(?![a-zA-Z])|~|\\(?:thin|med|thick)space(?![a-zA-Z])", " "),
    (r"\\[dtc]frac(?![a-zA-Z])", r"\\frac"),
    (r"\\frac\s*(\d)\s*(\d)", r"\\frac{\1}{\2}"),
    (r"<=|\\leqq|\\leqslant|\\leq(?![a-zA-Z])", r"\\le "),
    (r">=|\\geqq|\\geqslant|\\geq(?![a-zA-Z])", r"\\ge "),
    (r"\\vec\s*(?:\{(\w)\}|(\w))", r"\1\2"),
    (r"\\not\s*(?:=|\\(?:approx|equiv|sim)(?![a-z]))", r"\\ne "),
    (r"\\neq(?![a-zA-Z])|(?<![\d)\s])!=|(?<=\s)!=", r"\\ne "),
    (r"\\lt(?![a-zA-Z])", "<"),
    (r"\\gt(?![a-zA-Z])", ">"),
    (r"->|\\(?:long)?rightarrow(?![a-zA-Z])", r"\\to "),
    (r"=>|\\implies(?![a-zA-Z])", r"\\Rightarrow "),
    (r"\.\.\.|\\[lc]?dots[a-z]?(?![a-zA-Z])", r"\\dots "),
    (r"\\(?:lor|vee)(?![a-zA-Z])", ";"),
    (r"\\&", ","),
    (r"\^\s*(?:\{\s*\\prime\s*\}|\\prime)", "'"),
    (r"\^\s*(?:\{\s*\\circ\s*\}|\\circ)", ' "degree"'),
    (r"\\varnothing", r"\\emptyset "),
    (r"\\sqrt\s+(\d+)", r"\\sqrt{\1}"),
]
REPLACED = [(re.compile(pattern), new) for pattern, new in REPLACED]


def quote(words):
    """Words as '"words"'; numbers and marks between them stay as they are, "or" joins a list."""

    def one(match):
        word = match[0].rstrip(".") if match[0].count(".") == 1 else match[0]
        return VOCABULARY.get(word.lower(), f'"{word}"')

    words = re.sub(r"(?i)\b([ap])\.m\b\.?", r"\1m", words.replace('"', ""))
    return f" {re.sub(r'[A-Za-z][A-Za-z.]*', one, words)} "


def quote_bare(match):
    """The same for a word that stands bare: one of four letters, or one that we know."""
    word = match[1]
    if not word or FUNCTIONS.fullmatch(word):
        return match[0]
    known = word.lower() in VOCABULARY or find_unit(word) or word.lower() in ("no", "not", "is")
    return quote(word) if known or len(word) > 3 else word


def clean(text):
    """The one spelling of a text; the docstring of this file has an example."""
    for mark, digits in (("^", RAISED), ("_", LOWERED)):
        plain = str.maketrans(digits, "0123456789-"[: len(digits)])
        text = re.sub(
            f"[{digits}]+", lambda x, m=mark, p=plain: f"{m}{{{x[0].translate(p)}}}", text
        )
    for sign in {x for x in text if "\u2044" in unicodedata.normalize("NFKC", x)}:  # one half
        above, _, below = unicodedata.normalize("NFKC", sign).partition("\u2044")
        text = text.replace(sign, rf"\frac{{{above}}}{{{below}}}")
    text = unicodedata.normalize("NFKC", text).replace('"', "").translate(SPELLING)
    text = "".join(x for x in text if unicodedata.category(x) != "Cf")
    for pattern, new in REPLACED:
        text = pattern.sub(new, text)
    if text.count("$") % 2:
        text = text.replace("$", '"dollar"', 1)
    text = text.replace("$", "")
    text = SIUNITX.sub(lambda x: f"{x[1]} {quote(x[2].replace(chr(92), ''))}", text)
    text = QUOTED.sub(lambda x: x[2] if x[1] == "mathrm" and x[2] in "eid" else quote(x[2]), text)
    if "\\begin" not in text:
        text = re.sub(r"\\\\|&|\n\s*\n", ";", text)
    parts = re.sub(r"(?i)(?<=\d)\s*([ap])\.m\b\.?", r" \1m", text).split('"')
    parts[::2] = [BARE.sub(quote_bare, part) for part in parts[::2]]
    text = re.sub(r'(?<=\w)"\s+"(?=\w)', " ", '"'.join(parts))
    text = re.sub(r"\s*\^", "^", re.sub(r"([\^_])\{(\w)\}", r"\1\2", text))
    text = GROUPS.sub(lambda x: re.sub("[,.']", "", x[0]), text)
    return CURRENCY.sub(r'\1\3 "\2"', text.rstrip(" .,;:\n").lstrip(" ,;:\n"))


def squeeze(text):
    """For comparison as text: no spaces but between digits, no braces, words in lower case."""
    text = re.sub(r"(?<![\d])\s+|\s+(?!\d)", "", text)
    return text.replace('"', "").casefold() if '"' in text else text
