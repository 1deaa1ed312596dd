"""The unit_tests of a row, read and checked before a run; code.py runs them.

Refused is what cannot run here, what every program would pass and what none could: values of other
types, test code that never gets to an assertion, imports that the sandbox has not.
"""

import ast
import builtins
import json
import math
import re
import sys

DEFINITIONS = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)


def read_calls(tests):
    """Function tests: [(arguments, another reading of them or None)] and [accepted values].

    Lists are the arguments themselves. Text is JSON, an argument a line: "[1, 2]\n3". If all tests'
    is one line with a list of one length, that list may be the arguments: "[3, 4]" is f(3, 4) if
    f can be called so. Where every expected value is a list of one, as in APPS, that one will do.
    """
    inputs, outputs = tests["inputs"], tests["outputs"]
    if all(isinstance(item, str) for item in inputs):
        outputs = [json.loads(item) if isinstance(item, str) else item for item in outputs]
        inputs = [[json.loads(line) for line in x.splitlines() if line.strip()] for x in inputs]
        sizes = {len(x[0]) if len(x) == 1 and isinstance(x[0], list) else -1 for x in inputs}
        if len(sizes) == 1 and sizes != {-1}:
            return [(x[0], x) for x in inputs], [[value] for value in outputs]
    elif all(isinstance(x, list) and len(x) == 1 for x in outputs):
        return [(x, None) for x in inputs], [[value, value[0]] for value in outputs]
    return [(x, None) for x in inputs], [[value] for value in outputs]


def foreign_names(tests, source):
    """(names that test code has from the program, standard modules that it has from nowhere).

    The program's are all that Python does not know; if there is none, the one built-in function
    that the program defines anew: `assert sum(4, 6) == 3`. Of several none, since a program could
    then bend the functions that the tests compare with.
    """
    nodes = [node for test in tests for node in ast.walk(ast.parse(test))]
    names = {node.id for node in nodes if isinstance(node, ast.Name)}
    owners = {
        node.value.id
        for node in nodes
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name)
    }
    modules, known = names & owners & sys.stdlib_module_names, names & set(dir(builtins))
    if not names - modules - known and len(known) == 1:
        known -= set(re.findall(r"^def (\w+)", source, re.MULTILINE))
    return names - modules - known, modules


def reaches_assertion(trees):
    """Whether running test code may assert something: at its top level, or in what that names.

    ["def test(): assert f(2) == 4", "test()"] does, and without the call it does not; unittest.main
    runs every class, and the failure is lost with exit=False. sys.exit may tell as well.
    """
    defined = {x.name: x for tree in trees for x in tree.body if isinstance(x, DEFINITIONS)}
    running = [x for tree in trees for x in tree.body if not isinstance(x, DEFINITIONS)]
    while running:
        for node in ast.walk(running.pop()):
            called = ast.unparse(node.func) if isinstance(node, ast.Call) else ""
            asserts = called in ("exit", "quit", "sys.exit") or re.search(r"\.assert\w+$", called)
            if asserts or isinstance(node, ast.Assert | ast.Raise):
                return True
            if isinstance(node, ast.Name) and node.id in defined:
                running.append(defined.pop(node.id))
            silent = called and "exit=False" in map(ast.unparse, node.keywords)
            every = ("globals", "locals", "vars") + (() if silent else ("unittest.main", "main"))
            if called in every:
                running += defined.values()
                defined = {}
    return False


def check_asserts(tests, entry):
    """ValueError unless test code asserts something and finds what it imports: the library, and by
    `from entry import` the program."""
    if not isinstance(tests, list) or not all(isinstance(x, str) for x in tests):
        raise ValueError(f"asserts must be a list of texts, got {tests!r:.200}")
    try:
        trees = [ast.parse(test) for test in tests]
    except SyntaxError as error:
        raise ValueError(f"test code that is no Python: {error}") from error
    if not reaches_assertion(trees):
        raise ValueError(f"no assertion is ever run by the asserts {tests!r:.200}")
    nodes = [x for tree in trees for x in ast.walk(tree)]
    tried = {
        x for node in nodes if isinstance(node, ast.Try) and node.handlers for x in node.body
    }  # an import that may fail
    for node in (x for x in nodes if x not in tried):
        names = [x.name for x in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom) and (node.level or node.module != entry):
            names = ["." * node.level + (node.module or "")]
        for name in names:
            if name.split(".")[0] not in sys.stdlib_module_names and [name] != entry.split("."):
                raise ValueError(f"the asserts import {name}, which the sandbox has not")


def check_unit_tests(tests, entry):
    """ValueError for tests of no form, or whose values are of other types; `entry`: the program's
    module."""
    if "asserts" in tests:
        check_asserts(tests["asserts"], entry)
        return
    inputs, outputs, name = tests["inputs"], tests["outputs"], tests.get("fn_name")
    if not (isinstance(inputs, list) and isinstance(outputs, list) and inputs):
        raise ValueError(f"inputs and outputs must be lists, got {inputs!r:.80}, {outputs!r:.80}")
    if len(inputs) != len(outputs):
        raise ValueError(f"{len(inputs)} inputs and {len(outputs)} outputs")
    if not isinstance(name or "", str):
        raise ValueError(f"fn_name must be a text, got {name!r:.80}")
    given = [x for x, _ in read_calls(tests)[0]] if name else inputs + outputs
    kind, what = (list, "lists of arguments") if name else (str, "texts, as there is no fn_name")
    for value in given:
        if not isinstance(value, kind):
            raise ValueError(f"inputs and outputs must be {what}, got {value!r:.80}")


def check_seconds(metadata):
    """ValueError unless cpu_seconds, where a row sets it, is a time."""
    seconds = metadata.get("cpu_seconds", 1)
    if type(seconds) not in (int, float) or not 0 < seconds < math.inf:
        raise ValueError(f"cpu_seconds must be a number above 0, got {seconds!r:.80}")
