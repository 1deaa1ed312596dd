"""A repository in memory: list, read, search, edit and test its files; apply an answer's patch."""

import re
from typing import NamedTuple

from nanocascade.environments.base import ERROR_TEXT, MAX_LATE, make_tool
from nanocascade.sandbox.sandbox import read_reply, shared_sandbox

TESTS = (
    ERROR_TEXT
    + """
import importlib, sys
passed = failed = 0
for name in %r:
    found = {name: lambda: importlib.import_module(name)}
    try:
        values = vars(importlib.import_module(name)).items()
        found = {k: v for k, v in values if k.startswith("test") and callable(v)}
        if unittest := sys.modules.get("unittest"):
            for case in [v for _, v in values if isinstance(v, type)]:
                if issubclass(case, unittest.TestCase):
                    suite = unittest.defaultTestLoader.loadTestsFromTestCase(case)
                    found.update({test.id(): test.debug for test in suite})
    except BaseException as error:
        pass  # importing it again fails again, as a test
    for test, run in found.items():
        try:
            run()
            passed += 1
        except BaseException as error:
            failed += 1
            print(f"FAILED {name}: {test}: {error_text(error)}")
print(f"{passed} passed, {failed} failed")
"""
)


# ---- Repositories --------------------------------------------------------------------------------


def list_files(files: dict, folder: str = "") -> str:
    sizes = {x: files[x].count("\n") + 1 for x in sorted(files) if x.startswith(folder)}
    return "\n".join(f"{path} ({n} lines)" for path, n in sizes.items()) or "no such files"


def read_file(files: dict, path: str = "", first: str = "1", last: str = "") -> str:
    if path not in files:
        return f"error: no file {path}"
    lines = files[path].split("\n")
    if not re.fullmatch(r"\d{1,9},\d{0,9}", f"{first},{last}"):
        return f"error: first and last are line numbers from 1 to {len(lines)}"
    return "\n".join(lines[max(int(first) - 1, 0) : int(last or len(lines))])


def search(files: dict, text: str = "") -> str:
    """Lines that contain a literal text. A model's regular expression could run forever."""
    found = [
        f"{path}:{i}: {line}"
        for path in sorted(files)
        if text in files[path] and text
        for i, line in enumerate(files[path].split("\n"), 1)
        if text in line
    ]
    return "\n".join(found) or "not found"


def run_tests(files: dict, late: int, path: str = ""):
    """Run functions named test* and unittest cases: of one file, or of every test file.

    late: programs of the episode that were stopped at their limit. Returns it and the output.
    """
    modules, names = modules_of(files)
    tests = [x for x in sorted(names) if re.search(r"(^|/)test_[^/]*$|_test\.py$", x)]
    if path and path not in names:
        return late, f"error: no Python file {path}"
    chosen = [names[x] for x in ([path] if path else tests)]
    if not chosen:
        return late, "no tests"
    if late == MAX_LATE:
        return late, "error: no time left"
    outcome = shared_sandbox().run_script({**modules, "run tests": TESTS % chosen}, "run tests")
    printed = outcome.stdout.decode(errors="replace").rstrip("\n")
    failed = outcome.ended or read_reply(outcome, 0)[1]
    text = "\n".join(filter(None, [printed, f"error: {failed}" if failed else ""])) or "no output"
    return late + (outcome.ended in ("time limit", "asleep")), text


LOOKING = {"list": list_files, "read": read_file, "search": search}
REPOSITORY_TOOLS = [
    make_tool("list", "Paths of the files.", ("folder",), folder="string"),
    make_tool(
        "read",
        "Lines of a file.",
        ("first", "last"),
        path="string",
        first="integer",
        last="integer",
    ),
    make_tool("search", "Lines that contain a text.", text="string"),
    make_tool(
        "edit",
        "Replace a text that occurs once; an empty old makes a new file.",
        path="string",
        old="string",
        new="string",
    ),
    make_tool("test", "Run the tests of a file, or all.", ("path",), path="string"),
]


def repository_step(state: tuple, name: str, arguments: dict):
    """((files, late) after a call, its result text). Only an edit changes the files."""
    files, late = state
    if name == "edit":
        files, text = edited(files, arguments)
        return (files, late), text
    functions = [tool["function"] for tool in REPOSITORY_TOOLS]
    declared = {x["name"]: x["parameters"]["properties"] for x in functions}
    if name not in declared:
        return state, "error: no such tool"
    known = {
        k: str(v) for k, v in arguments.items() if k in declared[name] and type(v) in (str, int)
    }
    if name == "test":
        late, text = run_tests(files, late, **known)
        return (files, late), text
    return state, LOOKING[name](files, **known)


HUNK = re.compile(r"^@@ -(\d{1,6})(?:,(\d{1,6}))? \+\d+(?:,(\d{1,6}))? @@", re.MULTILINE)
MARKER = re.compile(r"<{7} SEARCH|={7}\s*$|>{7} REPLACE")
MAX_PATCH = 1 << 16  # characters; Codeforces takes 65,536 bytes
PATH = re.compile(r"(?=.{1,200}$)\w[\w.-]*(/\w[\w.-]*)*")  # permitted path of a new file
MARKED = re.compile(
    r"[#>*`\s]*(?:(?:file|path|filename)\s*:)?[*`\s]*(\S+?)[*`:]*\s*", re.IGNORECASE
)


class Edit(NamedTuple):
    path: str
    old: list[str]  # lines to replace
    new: list[str]
    line: int = 0  # number of the first old line, from 1; 0 if the edit does not give it


def path_above(lines, start, files):
    """The path named above a block: bare, or as "### path", "**path**", "`path`:", with blank lines
    or a fence between; or the one file of ours in a line: "In path:", "```python path". Of several,
    the last that exists, else the last that is a valid path."""
    named = []
    for line in reversed(lines[max(start - 4, 0) : start]):
        if line.startswith(">>>>>>>"):
            break
        words = [x.rstrip(".") for x in re.findall(r"[\w./-]+", line)]
        ours = {y for x in words for y in (x, re.sub(r"^[ab.]?/", "", x)) if y in files}
        fence = re.match(r"\s*(`{3,}|~{3,})", line)
        if len(ours) == 1:
            named.append(ours.pop())
        elif match := not fence and MARKED.fullmatch(line):
            named.append(match[1].removeprefix("./").removeprefix("/"))
        elif line.strip() and not fence:
            break
    known = [path for path in named if path in files]
    return next(iter(known + named), "")


def block_edits(lines, files):
    """The blocks of an answer as Edits; None if one is not closed. Parts of a block:

    path, <<<<<<< SEARCH, old lines, =======, new lines, >>>>>>> REPLACE
    """
    edits, place = [], 0
    for _ in range(lines.count("<<<<<<< SEARCH")):
        try:
            start = lines.index("<<<<<<< SEARCH", place)
            middle = lines.index("=======", start)
            place = lines.index(">>>>>>> REPLACE", middle)
        except ValueError:
            return None
        path = path_above(lines, start, files)
        edits.append(Edit(path, lines[start + 1 : middle], lines[middle + 1 : place]))
    return edits


def diff_edits(lines, files):
    """The hunks of a unified diff as Edits; a hunk is as long as its header says. What a diff
    deletes (+++ /dev/null) stays as an empty file."""
    edits, path, rest = [], "", iter(lines)
    for line in rest:
        if line.startswith(("--- ", "+++ ")):
            given = re.split(r"\t| +\d{4}-\d\d-\d\d ", line[4:])[0].strip().strip('"')
            short = given if given in files else re.sub(r"^[abciow.]/", "", given)
            path = path if given == "/dev/null" else short
        elif head := HUNK.match(line):
            num_old, num_new = (int(count or 1) for count in head.groups()[1:])
            old, new = [], []
            while len(old) < num_old or len(new) < num_new:
                line = next(rest, "end")
                sign = line[:1]
                if sign not in ("", " ", "-", "+", "\\"):
                    return None
                if sign in ("", " ", "-"):  # editors strip a blank line's space
                    old.append(line[1:])
                if sign in ("", " ", "+"):
                    new.append(line[1:])
            edits.append(Edit(path, old, new, int(head[1])))
    return edits


def patched(files, text):
    """(files after the edits of an answer, None), or (None, reason). The old lines of an edit must
    occur exactly once, or at the line of its hunk. An edit without old lines makes a new file,
    fills an empty one, or adds below the line of its hunk."""
    if len(text) > MAX_PATCH:
        return None, "patch too long"
    before, lines = files, [x.rstrip("\r") for x in text.split("\n")]
    lines = [x.rstrip() if MARKER.match(x) else x for x in lines]
    edits = block_edits(lines, files) if "<<<<<<< SEARCH" in lines else diff_edits(lines, files)
    if not edits:
        return None, "unfinished patch" if edits is None else "no patch"
    files, moved = dict(files), {}
    for path, old, new, line in edits:
        if path not in files and not old and PATH.fullmatch(path):
            files[path] = "\n".join([*new, ""])
            continue
        if path not in files:
            return None, "patch of a file that is not there"
        end = "\r\n" if files[path].count("\r\n") == files[path].count("\n") > 0 else "\n"
        body = files[path].split(end)
        found = [k for k in range(len(body)) if old and body[k : k + len(old)] == old]
        place = line - 1 + moved.get(path, 0)  # earlier hunks shifted the lines below
        if line and place in found:
            found = [place]
        if not old and (line or not files[path]) and place + 1 < len(body):
            found = [place + 1]
        if len(found) != 1:
            return None, f"lines to replace found {len(found)} times"
        body[found[0] : found[0] + len(old)] = new
        files[path] = end.join(body)
        moved[path] = moved.get(path, 0) + len(new) - len(old)
    return (files, None) if files != before else (None, "patch that changes nothing")


def modules_of(files):
    """({dotted name: source} of the Python files, {path: dotted name})."""
    names = {
        path: re.sub(r"(/__init__)?\.py$", "", path).replace("/", ".")
        for path in files
        if path.endswith(".py")
    }
    modules = {name: files[path] for path, name in names.items()}
    for name in list(modules):  # folders are packages, with or without __init__.py
        for parent in (name[: dot.start()] for dot in re.finditer(r"\.", name)):
            modules.setdefault(parent, "")
    return modules, names


def edited(files, arguments):
    """Apply one call of the tool edit: (new files, result), or (files, error message).

    path, old, new: a text that occurs exactly once is replaced; an empty old makes a new file.
    """
    path, old, new = (arguments.get(key, "") for key in ("path", "old", "new"))
    if not all(isinstance(x, str) and len(x) <= MAX_PATCH for x in (path, old, new)):
        return files, f"error: path, old and new are texts of at most {MAX_PATCH} characters"
    if not old and path not in files and PATH.fullmatch(path):
        return {**files, path: new}, f"made {path}"
    if path not in files:
        return files, f"error: no file {path}"
    found = files[path].count(old) if old else 0
    if found != 1:
        return files, f"error: old was found {found} times in {path}, not once"
    return {**files, path: files[path].replace(old, new)}, f"edited {path}"
