"""One dataclass is one command line: every field a flag, the comment that ends its line the help.

`lr: float = 1e-4  # peak learning rate` makes the flag --lr. Default < preset of --config < flag.
Wrong input is one line and exit code 2 (with NANOCASCADE_DEBUG=1 in the environment: a traceback).
"""

import ast
import difflib
import inspect
import io
import os
import sys
import textwrap
import tokenize
from dataclasses import fields
from typing import get_args, get_type_hints


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
    except (ValueError, OSError) as error:  # OSError: missing file, no permission, disk full
        if os.environ.get("NANOCASCADE_DEBUG"):
            raise
        print("error:", *str(error).split(), file=sys.stderr)
        raise SystemExit(2) from None


def parse_args(cls, argv=None, presets=None):
    """An instance of the dataclass `cls` from argv: ["--lr", "3e-6", "--dry_run", "--data=a,b"].

    presets: {value of --config: {field: value}}. A bool's flag alone means true, `none` clears an
    optional one; of a repeated flag the last counts, so that a shell script can end in "$@".
    """
    argv = sys.argv[1:] if argv is None else argv
    hints, comments = get_type_hints(cls), _comments(cls)
    flags = _read_flags([word for word in argv if word != "--help"], hints)
    values = {field.name: field.default for field in fields(cls)} | flags
    if presets:
        if values["config"] not in presets:
            raise ValueError(f"--config {values['config']}: expected one of {', '.join(presets)}")
        values |= presets[values["config"]] | flags
    if "--help" in argv:
        print(inspect.cleandoc(sys.modules[cls.__module__].__doc__ or ""))
        for name, value in values.items():
            kind = _reader(hints[name])[1]
            print(f"  --{name} ({kind}; now {value!r})\n        {comments[name]}")
        raise SystemExit(0)
    return cls(**values)


def describe(cfg) -> str:
    """The resolved run, one `name = value` a line."""
    return "\n".join(f"{field.name:<20} = {getattr(cfg, field.name)}" for field in fields(cfg))


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
    """A field's type -> (function from the flag's text to the value, the type's name)."""
    if type(None) in get_args(hint):
        read, name = _reader(next(part for part in get_args(hint) if part is not type(None)))
        return lambda text: None if text == "none" else read(text), name + " or none"
    if get_args(hint):  # tuple[str, ...]
        read, name = _reader(get_args(hint)[0])
        return lambda text: tuple(read(x.strip()) for x in text.split(",") if x), f"{name},..."
    if hint is bool:  # bool("false") is True
        return {"true": True, "1": True, "false": False, "0": False}.__getitem__, "true or false"
    return hint, hint.__name__


def _comments(cls) -> dict[str, str]:
    """{"lr": "peak learning rate"}: what follows # after each field, base classes first."""
    found = {}
    for base in reversed(cls.__mro__[:-1]):
        source = textwrap.dedent(inspect.getsource(base))
        tokens = tokenize.generate_tokens(io.StringIO(source).readline)
        ends = {t.start[0]: t.string.lstrip("# ") for t in tokens if t.type == tokenize.COMMENT}
        found |= {
            node.target.id: ends.get(node.end_lineno, "")
            for node in ast.parse(source).body[0].body
            if isinstance(node, ast.AnnAssign)
        }
    return found
