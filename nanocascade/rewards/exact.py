r"""The value of a LaTeX term: r"\frac{2^{9}+1}{3\cdot 2^{9}}" -> Fraction(171, 512).

A term without roots is computed exactly, with a large random number for each letter in it: two
polynomials or quotients that agree there are equal, but for a chance of about 1e-17 (Schwartz and
Zippel). Roots, pi, e and i are numbers of 3,000 digits: a wrong sign in (1+\sqrt{3})^{4033} -
(1-\sqrt{3})^{4033} changes the 2,306th. Whatever is not read here (functions, letters as exponents,
absolute values) or is too large is Unknown.
"""

import math
import re
from fractions import Fraction
from random import Random

from mpmath import MPContext

HIGH = MPContext()  # mpmath (torch needs it, through sympy), with a precision of our own
HIGH.dps = 3000
TOLERANCE = HIGH.mpf(10) ** -2900
MAX_BITS, MAX_WORK, MAX_INTEGER = 40_000, 200_000, 10_000
MAX_MAGNITUDE = 9000  # of roots and pi, in binary digits: well inside their precision
CALLED = {*"fghFGHPQT", "\\phi", "\\psi", "\\Gamma", "\\zeta"}  # f(x) is no product
FUNCTIONS = re.compile(r"(?<!\\)(?:a?sin|a?cos|a?tan|cot|sec|log|ln|exp|lim|max|min|gcd|lcm|mod)h?")
TOKEN = re.compile(
    r"(?P<mixed>\d+\s*\\frac\s*\{\d+\}\s*\{\d+\}|\d+\s+\d+/\d+)"
    r"|(?=\.?\d)(?P<whole>\d{1,3}(?:[ ,]\d{3})+(?![\d,])|\d*)(?:\.(?P<decimals>\d*)"
    r"(?P<ring>\\(?:overline|bar|dot)\s*(?:\{\d+\}|\d)|\(\d+\)(?!\s*[(\w\\]))?)?"
    r"(?P<power>[eE][+-]?\d+)?"
    r"|(?:[A-Za-z]|\\[a-zA-Z]+)(?:_(?:\{\w+\}|\w))?|\\.|\S"
)
SIGNS = {"\\times": "*", "\\cdot": "*", "\\ast": "*", "\\div": "/"}
LETTER = re.compile(
    r"(?:[A-Za-z]|\\(?:alpha|beta|gamma|delta|(?:var)?epsilon|eta|(?:var)?theta|kappa|lambda|mu|nu|"
    r"xi|rho|sigma|tau|omega|chi|Delta|Omega))(?:_.*)?"
)
CONSTANTS = {"\\pi": +HIGH.pi, "i": HIGH.j}
CLOSING = {"(": ")", "{": "}", "[": "]"}


class Unknown(Exception):
    """The term cannot be evaluated here."""


def letter_value(name):
    """The number that a letter or a unit stands for, the same in every process."""
    return Fraction(Random(name).getrandbits(64))


def evaluate(text):
    """(value, the letters in it) of a term. e is a letter with a value, pi and i are no letters."""
    reader = Reader(text)
    try:
        value = reader.sum()
    except (ArithmeticError, ValueError, RecursionError) as error:  # 1/0, (-1)!, \frac\frac\frac...
        raise Unknown(str(error)) from error
    reader.take("")
    return value, frozenset(reader.letters)


def close(x, y):
    """Whether two values are equal: Fractions exactly, others to nearly all of their digits."""
    if x == y or isinstance(x, Fraction) and isinstance(y, Fraction):
        return x == y
    return HIGH.convert(abs(x + -y)) < TOLERANCE * max(1, HIGH.convert(abs(x)))


def size(value):
    """About how many binary digits a value has before or behind the point."""
    if isinstance(value, Fraction):
        return max(abs(value.numerator), value.denominator).bit_length() - 1
    return abs(HIGH.mag(value)) if value else 0


def power(base, exponent):
    """base ** exponent; the exponent is a Fraction."""
    if exponent.denominator > 1:
        base = root(base, exponent.denominator)
    if size(base) * abs(exponent) > MAX_BITS:
        raise Unknown("too large")
    return base ** int(exponent.numerator)


def root(base, degree):
    """The real root of a positive number, a Fraction where it is whole; a multiple of i of a
    negative number's square root."""
    if base.imag or not 0 < degree < 100:
        raise Unknown("a complex root")
    if base < 0:
        if degree != 2:
            raise Unknown("a root of a negative number")
        return HIGH.j * root(-base, 2)
    result = HIGH.root(base, degree)
    whole = Fraction(int(HIGH.nint(result)))
    return whole if whole**degree == base else result


class Reader:
    """A recursive-descent parser that computes while it reads."""

    def __init__(self, text):
        if FUNCTIONS.search(text):
            raise Unknown("a function")
        self.tokens, self.place, self.work = [*tokenize(text), ""], 0, 0
        self.letters = set()
        self.known = CONSTANTS  # and the letters that a sum runs over

    def peek(self):
        return self.tokens[self.place]

    def take(self, wanted=None):
        token = self.peek()
        if wanted not in (None, token):
            raise Unknown(f"{wanted!r} expected, not {token!r}")
        self.place += token != ""
        return token

    def letters_in(self, start, end):
        """The letters among some tokens, in order."""
        return [x for x in self.tokens[start:end] if x in self.letters]

    def limited(self, value):
        """The value. Bounds the work, so no answer costs more than some tenths of a second."""
        exact = isinstance(value, Fraction)
        self.work += 10 + size(value) // 64 if exact else 300
        if self.work > MAX_WORK or size(value) > (MAX_BITS if exact else MAX_MAGNITUDE):
            raise Unknown("too much work")
        return value

    def sum(self):
        result = self.product()
        while self.peek() in ("+", "-"):
            negative = self.take() == "-"
            term = -self.product() if negative else self.product()
            cancelled = close(result, -term)  # but for the last digits of a root
            result = Fraction(0) if cancelled else self.limited(result + term)
        return result

    def product(self):
        result, divided = self.factor(), False
        while self.peek() in ("*", "/") or self.starts_factor():
            implicit = self.peek() not in ("*", "/")
            if implicit and (divided or isinstance(self.peek(), Fraction)):
                raise Unknown("1/2x, or a number behind a factor")
            divided = not implicit and self.take() == "/"
            factor = self.factor()
            result = self.limited(result * (1 / factor if divided else factor))
        return result

    def starts_factor(self):
        token = self.peek()
        return isinstance(token, Fraction) or bool(re.match(r"[A-Za-z({]|\\[a-zA-Z]", token))

    def factor(self):
        negative = False
        while self.peek() in ("+", "-"):
            negative ^= self.take() == "-"
        start = self.place
        result = self.atom()
        while self.peek() in ("^", "!", "%"):
            mark = self.take()
            if mark == "^":
                result = self.raised(result, start)
            elif mark == "%":
                result = result / 100
            else:
                result = Fraction(math.factorial(self.integer(result)))
            if mark != "%" and self.peek() == mark:
                raise Unknown("a power of a power, or a double factorial")
            result = self.limited(result)
        return -result if negative else result

    def raised(self, base, start):
        """The power of a base that was read from `start` on."""
        place = self.place
        sign = self.take() if self.peek() in ("+", "-") else "+"
        exponent = self.atom()
        if not isinstance(exponent, Fraction) or self.letters_in(place, self.place):
            raise Unknown("a letter or a root in an exponent")
        if exponent.denominator > 1:
            self.check_radicand(start, place - 1)
        return power(base, -exponent if sign == "-" else exponent)

    def check_radicand(self, start, end):
        r"""Letters stand for positive numbers, so \sqrt{xy} is the product of roots; \sqrt{x^2}
        is not ours to decide."""
        letters = self.letters_in(start, end)
        if letters and (len({*letters}) < len(letters) or {*"+-^"} & {*self.tokens[start:end]}):
            raise Unknown("a root of letters that is no plain product")

    def integer(self, value):
        """A value that must be a small whole number, as an int."""
        if not isinstance(value, Fraction) or value.denominator > 1 or abs(value) > MAX_INTEGER:
            raise Unknown("no small whole number")
        return int(value)

    def argument(self):
        """What stands in braces, or the next single thing: the 3 and 72 of \\frac3{72}."""
        token = self.peek()
        if isinstance(token, Fraction) and token.denominator == 1:
            self.tokens[self.place : self.place + 1] = map(Fraction, str(token))
        return self.atom()

    def atom(self):
        token = self.take()
        if isinstance(token, Fraction):
            return token
        if token in CLOSING:
            result = self.sum()
            self.take(CLOSING[token])
            return result
        if token == "\\frac":
            return self.argument() * (1 / self.argument())
        if token == "\\sqrt":
            degree = self.integer(self.atom()) if self.peek() == "[" else 2
            start = self.place
            radicand = self.argument()
            self.check_radicand(start, self.place)
            return self.limited(root(radicand, degree))
        if token == "\\binom":
            above, below = self.integer(self.argument()), self.integer(self.argument())
            return Fraction(math.comb(above, below))
        if token in ("\\sum", "\\prod"):
            return self.series(token)
        if token in self.known:
            return self.known[token]
        if not LETTER.fullmatch(token):
            raise Unknown(f"{token!r}")
        if token.partition("_")[0] in CALLED and self.peek() == "(":
            raise Unknown("a function's value")
        self.letters.add(token)
        return HIGH.e if token == "e" else letter_value(token)

    def series(self, token):
        r"""\sum_{k=0}^{9} k^2, of one product for each k."""
        self.take("_")
        self.take("{")
        name = self.take()
        self.take("=")
        first = self.integer(self.sum())
        self.take("}")
        self.take("^")
        last = self.integer(self.argument())
        if last < first:
            raise Unknown("the bounds of a sum")
        result, start, known = Fraction(1 if token == "\\prod" else 0), self.place, self.known
        for number in range(first, last + 1):
            self.place, self.known = start, known | {name: Fraction(number)}
            term = self.product()
            result = self.limited(result * term if token == "\\prod" else result + term)
        self.known = known
        return result


def tokenize(text):
    """Fractions for numbers, texts for the rest; "12,345.5", "1 1/2", "0.\\overline{3}" are one."""
    for match in TOKEN.finditer(text):
        if match["mixed"]:
            whole, above, below = map(int, re.findall(r"\d+", match["mixed"]))
            if not 0 < above < below:
                raise Unknown("a whole number beside an improper fraction")
            yield whole + Fraction(above, below)
        elif match["whole"] is not None:
            yield number(match)
        else:
            yield SIGNS.get(match[0], match[0])


def number(match):
    """The Fraction of a number with its repeating decimals and its power of ten."""
    whole, decimals = re.sub("[ ,]", "", match["whole"]), match["decimals"] or ""
    value = Fraction(f"{whole}.{decimals}")
    if match["ring"]:  # 0.1\overline{6} = 0.1 + 0.6 / 9
        ring = re.sub(r"\D", "", match["ring"])
        value += Fraction(int(ring), (10 ** len(ring) - 1) * 10 ** len(decimals))
    exponent = int((match["power"] or "e0")[1:])
    if abs(exponent) > 4000:
        raise Unknown("a large power of ten")
    return value * Fraction(10) ** exponent
