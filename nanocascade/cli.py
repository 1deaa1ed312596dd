"""Command lines from dataclasses: a field is a flag, the comment at its line's end is its help.

`lr: float = 1e-4  # peak learning rate` makes the flag --lr. A type may also hold a condition:
Literal["zero", "clamp"] is a choice, Annotated[int, 1] is 1 or more, Annotated[float, 0, 1] is
between 0 and 1. Wrong input prints one line and exits with code 2 (with
NANOCASCADE_DEBUG=1 in the environment: a traceback).
"""

import difflib
import inspect
import math
import os
import re
import sys
from dataclasses import MISSING, asdict, fields
from itertools import takewhile
from typing import Annotated, Literal, get_args, get_origin, get_type_hints

Positive = Annotated[int, 1]
Count = Annotated[int, 0]
NonNegative = Annotated[float, 0]
Share = Annotated[float, 0, 1]


def run_main(main) -> None:
    """Run a script's main(). A user's error (a wrong value, a missing file) prints one line and
    exits with code 2; a broken invariant (assert) keeps its traceback."""
    try:
        try:
            main()
        finally:
            sys.stdout.flush()
    except BrokenPipeError:  # the reader has closed the pipe: `--help | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(1) from None
    except KeyboardInterrupt:  # Ctrl-C
        print("\ninterrupted; a training run goes on with --resume", file=sys.stderr)
        raise SystemExit(130) from None
    except (ValueError, OSError) as error:  # OSError: missing file, no permission, disk full
        if os.environ.get("NANOCASCADE_DEBUG"):
            raise
        print("error:", *str(error).split(), file=sys.stderr)
        raise SystemExit(2) from None


def parse_args(*groups, preset=None, doc=None, argv=None, positional="") -> list:
    """One instance of each dataclass of `groups`, from argv: ["--lr", "3e-6", "--data=a,b"].

    doc: first text of --help (default: the docstring of the first group's module).
    preset(values): the fields that --config and --stage set; a flag overrides a preset, a preset a
    default. A bool's flag without a value means true. The last of a repeated flag counts, so that
    a shell script can end in "$@". positional: the field that the words before the first flag set.
    """
    argv = sys.argv[1:] if argv is None else argv
    words = [*takewhile(lambda x: positional and not x.startswith("--"), argv)]
    if words:
        argv = [f"--{positional}", ",".join(words), *argv[len(words) :]]
    hints = {name: x for group in groups for name, x in _hints(group).items()}
    flags = _read_flags([word for word in argv if word != "--help"], hints)
    known = [field for group in groups for field in fields(group)]
    defaults = {field.name: field.default for field in known if field.default is not MISSING}
    values = defaults | flags
    if preset:
        values |= preset(values) | flags
    if "--help" in argv:
        print(inspect.cleandoc(doc or sys.modules[groups[0].__module__].__doc__ or ""))
        print(_help_text(groups, hints, values))
        raise SystemExit(0)
    return [group(**{x.name: values[x.name] for x in fields(group)}) for group in groups]


def merge(*settings) -> dict:
    """The fields of several dataclass instances as one dict."""
    return {name: value for group in settings for name, value in asdict(group).items()}


def describe(*settings) -> str:
    """The resolved run, one `name = value` a line."""
    return "\n".join(f"{name:<20} = {value}" for name, value in merge(*settings).items())


def _hints(group) -> dict:
    return get_type_hints(group, include_extras=True)


def _read_flags(words: list[str], hints: dict) -> dict:
    """["--lr", "1", "--dry_run"] -> {"lr": 1.0, "dry_run": True}."""
    flags = {}
    while words:
        flag, equals, text = words.pop(0).partition("=")
        name = flag.removeprefix("--")
        if name == flag or name not in hints:
            near = difflib.get_close_matches(name, hints, n=3, cutoff=0.5)
            hint = f"did you mean --{' or --'.join(near)}?" if near else "--help lists the flags"
            raise ValueError(f"unknown flag {flag}: {hint}")
        read, expected = _reader(hints[name])
        if not equals:
            alone = not words or words[0].startswith("--")
            if alone and hints[name] is not bool:
                raise ValueError(f"--{name} needs a value: {expected}")
            text = "true" if alone else words.pop(0)
        try:
            flags[name] = read(text)
        except (ValueError, KeyError):
            raise ValueError(f"--{name} {text}: expected {expected}") from None
    return flags


def _reader(hint):
    """A field's type -> (function from the flag's text to its value, what is expected)."""
    parts = get_args(hint)
    if get_origin(hint) is Annotated:
        kind, low, high = (*parts, math.inf)[:3]

        def bounded(text):
            value = kind(text)
            if not low <= value <= high:  # nor is a NaN
                raise ValueError
            return value

        below = f" and <= {high}" if high < math.inf else ""
        return bounded, f"{kind.__name__} >= {low}{below}"
    if get_origin(hint) is Literal:
        return {x: x for x in parts}.__getitem__, " or ".join(parts)
    if get_origin(hint) is tuple:  # tuple[str, ...], or of one length: tuple[float, float]
        read, expected = _reader(parts[0])
        length = None if parts[-1] is Ellipsis else len(parts)

        def several(text):
            values = tuple(read(x.strip()) for x in text.split(",") if x)
            if length not in (None, len(values)):
                raise ValueError
            return values

        return several, ",".join([expected] * (length or 1)) + ("" if length else ",...")
    if hint is bool:  # bool("false") is True
        return {"true": True, "1": True, "false": False, "0": False}.__getitem__, "true or false"
    return hint, hint.__name__


def _help_text(groups, hints: dict, values: dict) -> str:
    """The flags under headings: the docstring of their dataclass, or a `# ---- heading ----` inside
    it. "Advanced" comes last."""
    sections = {}
    for group in groups:
        for name, (heading, comment) in _comments(group).items():
            expected = _reader(hints[name])[1]
            line = f"  --{name} ({expected}; now {values[name]!r})\n        {comment}"
            sections.setdefault(heading, []).append(line)
    headings = sorted(sections, key=lambda heading: heading == "Advanced")
    return "\n".join("\n".join(["", f"{x}:", *sections[x]]) for x in headings)


def _comments(group) -> dict[str, tuple[str, str]]:
    """{"lr": (heading, "peak learning rate")}: the comment after each field, base classes first."""
    found = {}
    for base in reversed(group.__mro__[:-1]):
        heading = inspect.cleandoc(group.__doc__).split("\n")[0].rstrip(".:")
        for line in inspect.getsource(base).splitlines():
            if ruler := re.match(r" *# -+ (.*?) -+$", line):
                heading = ruler[1]
            elif field := re.match(r" *(\w+): .*?  # (.*)", line):
                found[field[1]] = (heading, field[2])
    return found
