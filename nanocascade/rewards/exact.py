r"""Exact values of LaTeX terms, without floats: r"\frac{2^{9}+1}{3\cdot 2^{9}}" -> 171/512.

A value is a quotient of polynomials. A polynomial is {monomial: coefficient}; a monomial is a
sorted tuple of (name, exponent). Names are letters, or primes whose exponent is a proper fraction:

    x^2/3 - 2\sqrt{6}  ->  {(("x", 2),): 1/3, ((2, 1/2), (3, 1/2)): -2} / {(): 1}

Roots of primes, and i as the root of -1, are linearly independent over the rationals, so two values
are equal exactly if their cross products are. pi and e are letters. Whatever is not read here
(functions, letters as exponents, absolute values) or is too large is Unknown.
"""

import math
import re
from decimal import Context, Decimal
from fractions import Fraction

MAX_BITS, MAX_PAIRS, MAX_PRODUCT, MAX_WORK, MAX_DEPTH = 40_000, 1500, 2_000_000, 200_000, 40
FACTORS = 1000  # numbers under a root are divided by primes up to here
ONE = {(): Fraction(1)}
CALLED = {*"fghFGHPQT", "\\phi", "\\psi", "\\Gamma", "\\zeta"}  # f(x) is no product
WORDS = {"pi": "\\pi", "sqrt": "\\sqrt"}  # written without a backslash
FUNCTIONS = re.compile(r"(?<!\\)(?:a?sin|a?cos|a?tan|cot|sec|log|ln|exp|lim|max|min|gcd|lcm|mod)h?")
TOKEN = re.compile(
    r"(?P<space>\s+)|(?P<mixed>\d+\s*\\frac\s*(?:\{\d+\}\s*\{\d+\}|\d\d)|\d+\s+\d+/\d+)"
    r"|(?P<number>(?:\d{1,3}(?:[ ,]\d{3})+(?![\d,])|\d+)(?:\.\d*)?|\.\d+)"
    r"(?P<ring>\\(?:overline|bar|dot)\s*(?:\{\d+\}|\d)|\(\d+\)(?!\s*[(\w\\]))?"
    r"(?P<power>[eE][+-]?\d+)?"
    r"|(?P<letter>(?:[A-Za-z]|\\[a-zA-Z]+)(?:_(?:\{\w+\}|\w))?|\\.)|(?P<sign>.)"
)
SIGNS = {"\\times": "*", "\\cdot": "*", "\\ast": "*", "\\div": "/", "\\%": "%"}
GREEK = re.compile(
    r"\\(?:alpha|beta|gamma|delta|(?:var)?epsilon|eta|(?:var)?theta|kappa|lambda|mu|nu|xi|pi|rho|"
    r"sigma|tau|omega|chi|Delta|Omega)(?:_.*)?"
)


class Unknown(Exception):
    """The term cannot be evaluated exactly here."""


class Value:
    """num / den, both polynomials."""

    def __init__(self, num, den=ONE):
        if len(den) == 1 and () in den:
            num, den = {m: c / den[()] for m, c in num.items()}, ONE
        self.num, self.den = num, den

    def __eq__(self, other):
        if not isinstance(other, Value):
            return NotImplemented
        return times(self.num, other.den) == times(other.num, self.den)

    def __add__(self, other):
        if self.den == other.den:
            return Value(plus(self.num, other.num), self.den)
        top = plus(times(self.num, other.den), times(other.num, self.den))
        return Value(top, times(self.den, other.den))

    def __mul__(self, other):
        return Value(times(self.num, other.num), times(self.den, other.den))

    def inverse(self):
        if not self.num:
            raise Unknown("division by zero")
        return Value(self.den, self.num)

    @property
    def rational(self):
        """The value as a Fraction; None if letters or roots are in it."""
        if self.den != ONE or self.num.keys() - {()}:
            return None
        return self.num.get((), Fraction(0))

    @property
    def letters(self):
        names = {name for part in (self.num, self.den) for m in part for name, _ in m}
        return {name for name in names if isinstance(name, str)} - {"\\pi"}

    def __pow__(self, exponent):
        whole, base = exponent.denominator == 1, self.rational
        if base is not None and whole and (base or exponent >= 0):
            if abs(exponent) * bits({(): base}) > 2 * MAX_BITS and abs(base) not in (0, 1):
                raise Unknown("too large")
            return constant(base ** int(exponent))
        if not whole:
            return self.root(exponent)
        if exponent < 0:
            return self.inverse() ** -exponent
        result, square, rest = constant(1), self, int(exponent)
        while rest:
            if rest & 1:
                result = result * square
            rest >>= 1
            square = square * square if rest else square
        return result

    def root(self, exponent):
        """A power that is no whole number, of a single term: (12x)^{1/2} = 2 * 3^{1/2} * x^{1/2}"""
        if len(self.num) != 1 or self.den != ONE:
            raise Unknown("root of a sum")
        ((monomial, number),) = self.num.items()
        if any(power != 1 for _, power in monomial):
            raise Unknown("root of a power")
        if number < 0 and exponent.denominator != 2:
            raise Unknown("root of a negative number")
        result = Value({tuple((name, exponent) for name, _ in monomial): Fraction(1)})
        primes = [(-1, 1)] if number < 0 else []
        primes += factorize(abs(number.numerator))
        primes += [(prime, -power) for prime, power in factorize(number.denominator)]
        for prime, power in primes:
            result = result * Value(times({((prime, exponent * power),): Fraction(1)}, ONE))
        return result


def constant(number):
    return Value({(): Fraction(number)} if number else {})


def factorize(number):
    """[(prime, power)] of a positive integer; Unknown if a large factor is left."""
    factors = []
    for prime in (2, *range(3, FACTORS, 2)):
        power = 0
        while number % prime == 0:
            number, power = number // prime, power + 1
        if power:
            factors.append((prime, power))
    if number >= FACTORS**2:
        raise Unknown("a large factor under a root")
    return factors + ([(number, 1)] if number > 1 else [])


def plus(a, b):
    sums = {m: a.get(m, 0) + b.get(m, 0) for m in {**a, **b}}
    return {monomial: number for monomial, number in sums.items() if number}


def times(a, b):
    """The product of polynomials; a prime's exponent is brought below 1: 2^{3/2} = 2 * 2^{1/2}."""
    pairs = len(a) * len(b)
    if pairs > MAX_PAIRS or pairs * (bits(a) + bits(b)) > MAX_PRODUCT:
        raise Unknown("too large")
    out = {}
    for left, x in a.items():
        for right, y in b.items():
            number, powers = x * y, dict(left)
            for name, power in right:
                powers[name] = powers.get(name, 0) + power
            for name, power in powers.items():
                if isinstance(name, int):
                    whole = math.floor(power)
                    if name > 1 and abs(whole) * name.bit_length() > MAX_BITS:
                        raise Unknown("too large")
                    number *= Fraction(name) ** (whole if name > 1 else whole % 2)
                    powers[name] = power - whole
            monomial = tuple(sorted(((n, p) for n, p in powers.items() if p), key=str))
            out[monomial] = out.get(monomial, 0) + number
    return {monomial: number for monomial, number in out.items() if number}


def bits(polynomial):
    sizes = [x.numerator.bit_length() + x.denominator.bit_length() for x in polynomial.values()]
    return max(sizes, default=0)


PI = Decimal("3.14159265358979323846264338327950288419716939937510582097494459")
DIGITS = Context(prec=60)


def approximate(value):
    """A value without letters, but pi and e, to 50 digits or so; None for others."""
    sums = []
    for polynomial in (value.num, value.den):
        total = Decimal(0)
        for monomial, factor in polynomial.items():
            term = DIGITS.divide(Decimal(factor.numerator), Decimal(factor.denominator))
            for name, power in monomial:
                if name == -1 or isinstance(name, str) and name not in ("\\pi", "e"):
                    return None
                base = {"\\pi": PI, "e": DIGITS.exp(Decimal(1))}.get(name) or Decimal(name)
                power = DIGITS.divide(Decimal(power.numerator), Decimal(power.denominator))
                if abs(power) > 10_000:
                    return None
                term = DIGITS.multiply(term, DIGITS.power(base, power))
            total = DIGITS.add(total, term)
        sums.append(total)
    return DIGITS.divide(*sums) if sums[1] else None


class Reader:
    """A recursive-descent parser that computes while it reads. `scientific`: 2e-3 is 0.002."""

    def __init__(self, text, scientific=True):
        if FUNCTIONS.search(text):
            raise Unknown("a function")
        self.tokens, self.place, self.depth, self.work = list(tokenize(text, scientific)), 0, 0, 0
        self.bound = {}  # values of the letters that a sum runs over

    def value(self):
        result = self.sum()
        if self.place < len(self.tokens):
            raise Unknown(f"{self.tokens[self.place]!r} is left")
        return result

    def peek(self):
        return self.tokens[self.place] if self.place < len(self.tokens) else ""

    def take(self, wanted=None):
        token = self.peek()
        if token == "" or wanted not in (None, token):
            raise Unknown(f"{wanted} expected")
        self.place += 1
        return token

    def sum(self):
        result = self.product()
        while self.peek() in ("+", "-"):
            sign = self.take()
            term = self.product()
            result = result + (term * constant(-1) if sign == "-" else term)
            self.count(result)
        return result

    def count(self, value):
        """Bounds the work, so that no answer costs more than some hundredths of a second."""
        self.work += 100 * len(value.num) - 90 + bits(value.num) // 64
        if self.work > MAX_WORK or bits(value.num) > 2 * MAX_BITS:
            raise Unknown("too much work")

    def product(self):
        result, divided = self.factor(), False
        while self.peek() in ("*", "/") or self.starts_factor():
            implicit = self.peek() not in ("*", "/")
            if implicit and (divided or isinstance(self.peek(), Fraction)):
                raise Unknown("1/2x, or a number behind a factor")
            divided = not implicit and self.take() == "/"
            term = self.factor()
            result = result * (term.inverse() if divided else term)
            self.count(result)
        return result

    def starts_factor(self):
        token = self.peek()
        return isinstance(token, Fraction) or bool(re.match(r"[A-Za-z({]|\\[a-zA-Z]", token))

    def factor(self):
        sign = 1
        while self.peek() in ("+", "-"):
            sign *= -1 if self.take() == "-" else 1
        result = self.atom()
        while self.peek() in ("^", "!", "%"):
            mark = self.take()
            if mark == "^":
                power = self.exponent().rational
                if power is None:
                    raise Unknown("a letter in an exponent")
                result = result**power
                if self.peek() == "^":
                    raise Unknown("a power of a power")
            elif mark == "%":
                result = result * constant(Fraction(1, 100))
            else:
                number = result.rational
                if number is None or number.denominator != 1 or not 0 <= number <= 3000:
                    raise Unknown("a factorial")
                result = constant(math.factorial(int(number)))
                if self.peek() == "!":
                    raise Unknown("a double factorial")
            self.count(result)
        return result * constant(sign) if sign < 0 else result

    def exponent(self):
        sign = self.take() if self.peek() in ("+", "-") else "+"
        result = self.atom()
        return result * constant(-1) if sign == "-" else result

    def group(self):
        """What stands in braces, or the next single thing: the 3 and 72 of \\frac3{72}."""
        return self.atom() if self.peek() == "{" else self.atom(single=True)

    def atom(self, single=False):
        self.depth += 1
        if self.depth > MAX_DEPTH:
            raise Unknown("too deep")
        result = self.simple(self.take(), single)
        self.depth -= 1
        return result

    def simple(self, token, single):
        if isinstance(token, Fraction):
            if single and token.denominator == 1 and token >= 10:  # the 1 of \frac12
                self.place -= 1
                self.tokens[self.place : self.place + 1] = map(Fraction, str(token))
                token = self.take()
            return constant(token)
        if token in ("(", "{", "["):
            result = self.sum()
            self.take({"(": ")", "{": "}", "[": "]"}[token])
            return result
        if token == "\\frac":
            return self.group() * self.group().inverse()
        if token == "\\sqrt":
            degree = constant(2)
            if self.peek() == "[":
                degree = self.atom()
            inside, degree = self.group(), degree.rational
            if not degree or degree.denominator != 1 or not 0 < degree < 100:
                raise Unknown("a root's degree")
            return inside ** (1 / degree)
        if token == "\\binom":
            above, below = (self.group().rational for _ in range(2))
            if None in (above, below) or above.denominator * below.denominator != 1:
                raise Unknown("a binomial of letters")
            if not 0 <= below <= above <= 3000:
                raise Unknown("a large binomial")
            return constant(math.comb(int(above), int(below)))
        if token in ("\\sum", "\\prod"):
            return self.series(token)
        if token in self.bound:
            return self.bound[token]
        if token == "i":
            return Value({((-1, Fraction(1, 2)),): Fraction(1)})
        if not re.fullmatch(r"[A-Za-z](_.*)?", token) and not GREEK.fullmatch(token):
            raise Unknown(f"{token!r}")
        if token.partition("_")[0] in CALLED and self.peek() == "(":
            raise Unknown("a function's value")
        return Value({((token, Fraction(1)),): Fraction(1)})

    def series(self, token):
        r"""\sum_{k=0}^{9} k^2, of one product for each k."""
        self.take("_")
        self.take("{")
        name = self.take()
        self.take("=")
        first = self.sum().rational
        self.take("}")
        self.take("^")
        last = self.group().rational
        if None in (first, last) or first.denominator * last.denominator != 1 or last < first:
            raise Unknown("the bounds of a sum")
        result, start = constant(token == "\\prod"), self.place
        for number in range(int(first), int(last) + 1):
            self.place, self.bound[name] = start, constant(number)
            term = self.product()
            result = result * term if token == "\\prod" else result + term
            self.count(result)
        self.bound.pop(name, None)  # a sum inside may run over the same letter
        return result


def tokenize(text, scientific):
    """Fractions for numbers, texts for the rest; "12,345.5", "1 1/2", "0.\\overline{3}" are one."""
    for word, command in WORDS.items():
        text = re.sub(rf"(?<![A-Za-z\\]){word}(?![A-Za-z])", lambda _, x=command: x, text)
    for match in TOKEN.finditer(text):
        if match["mixed"]:
            whole, above, below = _three(match["mixed"])
            if not 0 < above < below:
                raise Unknown("a whole number beside an improper fraction")
            yield whole + above / below
        elif match["number"]:
            yield from _number(match, scientific)
        elif match["letter"]:
            yield SIGNS.get(match["letter"], match["letter"])
        elif match["sign"]:
            yield match["sign"]


def _three(text):
    """The numbers of "1 1/2", r"1\\frac{1}{2}" and r"1\\frac12"."""
    whole, rest = re.match(r"(\d+)(.*)", text, re.DOTALL).groups()
    parts = re.findall(r"\d+", rest)
    return [Fraction(x) for x in (whole, *(parts if len(parts) == 2 else parts[0]))]


def _number(match, scientific):
    digits = re.sub("[ ,]", "", match["number"])
    if digits == ".":
        raise Unknown("a lone point")
    value = Fraction(digits if digits[-1] != "." else digits[:-1])
    if match["ring"]:  # 0.1\overline{6} = 0.1 + 0.6 / 9
        if "." not in digits:
            yield value
            for part in re.findall(r"\\[a-z]+|\d+|[^\s\d]", match["ring"]):
                yield Fraction(part) if part.isdigit() else part
            return
        ring = re.sub(r"\D", "", match["ring"])
        shift = 10 ** len(digits.partition(".")[2])
        value += Fraction(int(ring), (10 ** len(ring) - 1) * shift)
    power = match["power"]
    if power and (scientific or "." in digits or "E" in power):
        if abs(int(power[1:])) > 4000:
            raise Unknown("a large power of ten")
        yield value * Fraction(10) ** int(power[1:])
    else:
        yield value
        for part in re.findall(r"\d+|\D", power or ""):
            yield Fraction(part) if part.isdigit() else part
