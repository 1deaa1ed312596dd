"""Runs untrusted programs and returns their output as plain data.

`Sandbox` gives each job of a thread one of jail.py's servers. Job, input, output and replies are
memory files that we create; we read them after the child is dead and can no longer change them.
Expected outputs are never passed in, so a program that forges replies has to know the right values.

Limits are CPU time, enforced by the kernel, so a loaded machine changes no verdict. Wall time is
only the backstop against programs that sleep: one that needs SLEEP_FACTOR times its CPU limit
without finishing a test is ended as "asleep".
"""

import ast
import json
import math
import os
import queue
import re
import select
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from typing import NamedTuple

from nanocascade.sandbox import jail

OPTIONS = "-P -s -S -X utf8"  # of a server's interpreter: no folder of site, user or script
PASSED_ON = ("LD_LIBRARY_PATH", "NANOCASCADE_UNCONFINED")  # environment of a server
# Nodes of the syntax tree of a plain program, beside comparisons and signs (see is_plain).
PLAIN = """Module FunctionDef arguments arg Return BinOp UnaryOp Compare IfExp Name Load Constant
Call Add Sub Mult Div FloorDiv Mod""".split()
SLEEP_FACTOR = 10  # wall time allowed for a test, in multiples of its CPU limit


class Limits(NamedTuple):
    """Resource limits of one child."""

    test_seconds: float = 4.0  # CPU time of one test
    total_seconds: float = 40.0  # CPU time of the child
    memory: int = 1 << 30  # bytes of address space
    output: int = 1 << 20  # bytes of standard output, and of replies


LIMITS = Limits()


class Outcome(NamedTuple):
    """The output of a child, and how it ended."""

    stdout: bytes
    replies: list  # of bytes: a line for each test; JSON unless the program has tampered with it
    ended: str  # "" for status 0, else "time limit", "exit status 3", "crashed: SIGSEGV", ...
    cpu_seconds: float


def memory_file(content):
    """An open file without a name that holds `content`, positioned at its start."""
    if hasattr(os, "memfd_create") and not os.environ.get("NANOCASCADE_UNCONFINED"):
        file = open(os.memfd_create("job"), "r+b", buffering=0)
    else:
        file = tempfile.TemporaryFile(buffering=0)
    file.write(content)
    file.seek(0)
    return file


def make_pipe():
    """The reading and the writing end of a new pipe."""
    reading, writing = os.pipe()
    return open(reading, "rb", 0), open(writing, "wb", 0)


def finishes(done, replies, limits):
    """Wait for the child to finish (`done` is readable). False if it seems to sleep instead: no new
    reply, or too few, in SLEEP_FACTOR times the CPU limit."""
    size = 0
    for _ in range(math.ceil(limits.total_seconds / limits.test_seconds)):
        if done.poll(1000 * SLEEP_FACTOR * limits.test_seconds):
            return True
        before, size = size, os.fstat(replies.fileno()).st_size
        if size == before:
            break
    return False


def is_plain(source):
    """Whether a program only defines functions of arithmetic, comparisons, abs, max and min. It has
    no attributes, imports, loops, strings or powers, so that it is harmless even unconfined."""
    try:
        nodes = list(ast.walk(ast.parse(source if len(source) < 1000 else "import too_long")))
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return False
    return all(
        (type(x).__name__ in PLAIN or isinstance(x, (ast.unaryop, ast.cmpop)))
        and (not isinstance(x, ast.Constant) or type(x.value) in (int, float))
        and (not isinstance(x, ast.Call) or getattr(x.func, "id", "") in ("abs", "max", "min"))
        and not getattr(x, "decorator_list", [])  # a decorator is a call
        for x in nodes
    )


class Server:
    """A fork server: runs one job at a time, and sessions beside it."""

    def __init__(self):
        self.control, control_of_server = socket.socketpair()
        self.process = subprocess.Popen(
            [sys.executable, *OPTIONS.split(), jail.__file__, str(control_of_server.fileno())],
            pass_fds=[control_of_server.fileno()],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            cwd="/",
            start_new_session=True,
            # With a fixed hash seed a set is printed in the same order when a run is resumed.
            env={x: os.environ[x] for x in PASSED_ON if x in os.environ} | {"PYTHONHASHSEED": "0"},
        )
        control_of_server.close()
        self.lines = self.control.makefile("r")
        self.lock, self.about = threading.Lock(), self.read_line()

    def read_line(self):
        """The server's next message."""
        line = self.lines.readline()
        if not line:
            raise ConnectionError("a sandbox server died; was it killed, or is memory short?")
        return json.loads(line)

    def start(self, files):
        """Start a child with its files, in the order of jail.STDIN and so on; its process id."""
        with self.lock:
            socket.send_fds(self.control, [b"start"], [file.fileno() for file in files])
            return self.read_line()

    def end(self, child):
        """Kill a child; its wait status and CPU seconds."""
        with self.lock:
            self.control.sendall(b"%d" % child)
            return self.read_line()

    def run(self, jobs, limits):
        """Run a child for each job (header, input, calls); their Outcomes, once the last is done.

        Two jobs are a program that answers calls and the tests that make them. The program's calls
        are then a pipe from the tests' standard output, its replies one to their standard input.
        """
        with ExitStack() as stack:
            null = stack.enter_context(open(os.devnull, "r+b", 0))
            pipes = [make_pipe() for _ in range(2 * len(jobs) - 1)]
            for file in sum(pipes, ()):
                stack.enter_context(file)
            children, left = [], []
            for header, *content in jobs:
                job = json.dumps({**header, **limits._asdict()}).encode()
                new = [stack.enter_context(memory_file(x)) for x in (b"", job, b"", *content)]
                stdout, job, replies, stdin, calls = new
                children.append([stdin, stdout, null, job, calls, replies, null])
                left.append((stdout, replies))
            if len(jobs) == 2:
                children[0][jail.CALLS], children[1][jail.STDOUT] = pipes[1]
                children[1][jail.STDIN], children[0][jail.REPLIES] = pipes[2]
            done, children[-1][jail.DONE] = pipes[0]
            running = [self.start(files) for files in children]
            for file in sum(pipes, ()):
                if file is not done:
                    file.close()  # now only the child holds it open
            waiting = select.poll()
            waiting.register(done)
            finished = finishes(waiting, left[-1][1], limits)
            return [
                outcome(*self.end(child), finished, limits, *files)
                for child, files in zip(running, left, strict=True)
            ]

    def close(self):
        self.lines.close()
        self.control.close()
        self.process.wait()  # it kills its children and exits


def outcome(status, cpu_seconds, finished, limits, stdout, replies):
    """The Outcome of a dead child, from its wait status and its files."""
    stdout, replies = (os.pread(file.fileno(), limits.output, 0) for file in (stdout, replies))
    code, ended = os.waitstatus_to_exitcode(status), ""
    used = cpu_seconds / limits.total_seconds
    if not finished:
        ended = "asleep" if cpu_seconds < limits.test_seconds else "time limit"
    elif code == -signal.SIGPROF or used > (0.9 if code == -signal.SIGKILL else 1):
        ended = "time limit"
    elif limits.output in (len(stdout), len(replies)):
        ended = "output limit"
    elif code:  # SIGKILL: the machine's memory ran out, or the child closed jail.DONE
        ended = f"exit status {code}" if code > 0 else f"crashed: {signal.Signals(-code).name}"
    return Outcome(stdout, replies.splitlines(), ended, cpu_seconds)


class Sandbox:
    """Runs programs from any thread, as many at a time as it has servers.

    Where the system cannot confine them: OSError, unless allow_unprotected is set, or plain_only,
    which then runs nothing but plain programs (`is_plain`).
    """

    def __init__(self, num_servers, *, allow_unprotected=False, plain_only=False):
        with ThreadPoolExecutor(num_servers) as threads:  # all at once, before the first verdict
            servers = list(threads.map(lambda _: Server(), range(num_servers)))
        first = servers[0]
        self.missing = sorted(set(jail.ATTACKS) - set(first.about["refused"]))
        self.plain_only = bool(self.missing) and plain_only and not allow_unprotected
        self.landlock, self.num_servers = first.about["landlock"], num_servers
        self.idle = queue.LifoQueue()  # of servers; None for one that died
        for server in servers:
            self.idle.put(server)
        if self.missing and not (allow_unprotected or plain_only):
            self.close()
            raise OSError(
                f"{self.describe()}. Programs written by a model are not run without that; "
                "--allow_unprotected runs them all the same."
            )

    def describe(self):
        """What is enforced on this system, as tried when the first server started."""
        if self.plain_only:
            return (
                f"Sandbox: this system cannot confine {', '.join(self.missing)}, so only plain "
                "expressions (numbers, arithmetic, comparisons, abs, max, min) are run; any other "
                "program earns 0"
            )
        if self.missing:
            return f"Sandbox: this system cannot confine {', '.join(self.missing)}"
        files = "Landlock" if self.landlock else "no opening of files"
        return f"Sandbox: seccomp, {files}, rlimits; tried and refused: {', '.join(jail.ATTACKS)}"

    def run_script(self, modules, entry, stdin=b"", limits=LIMITS):
        """Run modules[entry] as a program. modules: {dotted name: source}. One reply."""
        limits = limits._replace(total_seconds=min(limits.total_seconds, limits.test_seconds))
        header = {"modules": modules, "sources": [modules[entry]]}
        return self._run([(header, stdin, b"")], limits)[0]

    def run_calls(self, modules, entry, calls, limits=LIMITS):
        """Call functions of modules[entry] (see jail.answer_calls). One reply a call."""
        lines = "".join(json.dumps(call) + "\n" for call in calls)
        header = {"modules": modules, "entry": entry, "starter": True}
        return self._run([(header, b"", lines.encode())], limits)[0]

    def run_tests(self, modules, entry, tests, names, limits=LIMITS):
        """Run test code in a process of its own, where `names` are functions of modules[entry].

        The Outcomes of the program and of the tests. The latter has one reply a test, up to the
        first that failed, and the program cannot have tampered with it.
        """
        program = {"modules": modules, "entry": entry}
        checks = {"modules": {}, "entry": entry, "sources": tests, "names": names}
        return self._run([(program, b"", b""), (checks, b"", b"")], limits)

    def _run(self, jobs, limits):
        sources = [source for header, *_ in jobs for source in header["modules"].values()]
        if self.plain_only and not all(map(is_plain, sources)):
            return [Outcome(b"", [], "not run (no plain expression)", 0.0) for _ in jobs]
        for last_try in (False, False, True):
            server = self.idle.get()
            healthy = None
            try:
                server = server or Server()
                outcomes = server.run(jobs, limits)
                healthy = server
                return outcomes
            except ConnectionError:  # the server was killed: another one does the job
                if last_try:
                    raise
            finally:
                if server and not healthy:
                    server.close()  # dead, or we were interrupted: its children must not go on
                self.idle.put(healthy)

    def close(self):
        """Wait for running jobs, then end the servers. A later run starts new ones."""
        servers = [self.idle.get() for _ in range(self.num_servers)]
        for server in filter(None, servers):
            server.close()
        for _ in servers:
            self.idle.put(None)

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.close()


lock = threading.Lock()
shared = {}  # process id -> Sandbox; a forked process starts its own


def share_of_cores():
    """Processors of this machine for each of its ranks (torchrun's, or launch.sh's), at least 1."""
    local = hasattr(os, "sched_getaffinity")
    cores = len(os.sched_getaffinity(0)) if local else os.cpu_count() or 1
    ranks = os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("WORLD_SIZE") or 1
    return max(cores // int(ranks), 1)


def shared_sandbox(num_servers=0, **options):
    """The sandbox of all rewards. The first call creates it: a script's, with its options.

    num_servers: 0 = share_of_cores. OSError where programs cannot be confined and the options do
    not allow that.
    """
    with lock:
        if os.getpid() not in shared:
            shared[os.getpid()] = Sandbox(num_servers or share_of_cores(), **options)
        return shared[os.getpid()]


def read_reply(outcome, number):
    """(data, None), or (None, reason) for an error, a missing reply, or a malformed one."""
    if number >= len(outcome.replies):
        return None, outcome.ended or "ended early"
    try:
        ((kind, body),) = json.loads(outcome.replies[number]).items()
        if kind == "value":
            return body, None
        error = re.sub(r"\W", "", body[0])[:60]
    except (ValueError, TypeError, LookupError, AttributeError, RecursionError):
        error = "NoReply"
    if error in ("SyntaxError", "IndentationError", "TabError"):
        return None, "syntax error"
    return None, "memory" if error == "MemoryError" else f"crashed: {error}"
