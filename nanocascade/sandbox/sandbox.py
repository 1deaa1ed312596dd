"""Runs programs that nobody vouches for and hands back what they left, as plain data.

`Sandbox` lends jail.py's servers to threads, one job at a time each. Files go in and files come
out: job, input, output and replies are memory files that we made, and that we read when the child
is dead and can change them no more. Expected outputs never go in, so a program that forges replies
still has to know the right values.

Limits are CPU time, kept by the kernel, and time asleep, found by looking ten times a second.
Waiting for a core is free, so a loaded machine changes no verdict, and yet a sleeper ends within a
second of its limit. The limit a test ends an honest program early; one that disarms that timer, our
look at it; one that forges replies as well, the limit in all.
"""

import json
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
import time
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple

from nanocascade.sandbox import jail


class Limits(NamedTuple):
    """What one child may use."""

    test_seconds: float = 4.0  # CPU, or asleep
    total_seconds: float = 40.0
    memory: int = 1 << 30  # bytes of address space
    output: int = 1 << 20  # bytes of standard output, and of replies


LIMITS = Limits()
TICK, GRACE = 0.1, 0.25  # seconds: between two looks; beyond a limit, as a look is only a sample


class Outcome(NamedTuple):
    """What a child left, and how it ended."""

    stdout: bytes
    replies: list  # of bytes, a line for each piece of the job; JSON if the program left them alone
    ended: str  # "" for status 0, else "time limit", "exit status 3", "crashed: SIGSEGV", ...
    cpu_seconds: float


def memory_file(content):
    """A file that has no name, at its start."""
    if hasattr(os, "memfd_create"):
        file = open(os.memfd_create("job"), "r+b", buffering=0)
    else:
        file = tempfile.TemporaryFile(buffering=0)
    file.write(content)
    file.seek(0)
    return file


def activity(process):
    """CPU seconds of a process, and whether a thread of it runs, or waits for a core or a disk; 0
    and no where the system does not say, so that there wall time counts."""
    used, awake, folder = 0, False, Path(f"/proc/{process}")
    read = lambda stat: stat.read_text().rpartition(")")[2].split()  # noqa: E731
    try:
        used = sum(map(int, read(folder / "stat")[11:13]))  # user, system
        awake = any(read(stat)[0] in "RD" for stat in folder.glob("task/*/stat"))
    except OSError:
        awake = folder.exists()  # a thread ended while we looked
    return used / os.sysconf("SC_CLK_TCK"), awake


def watch(done, processes, replies, limits):
    """Wait until `done` is ready: None. Seconds asleep, if their time is over before.

    Processes that wait for each other sleep only when all do; of two the busier one counts.
    """
    spent = asleep = used = written = since = 0  # seconds but for `written`, a file's size
    last = time.monotonic()
    while max(spent - limits.total_seconds, spent - since - limits.test_seconds) < GRACE:
        if done.poll(1000 * TICK):
            return None
        now, (seconds, awake) = time.monotonic(), zip(*map(activity, processes), strict=True)
        if not any(awake):
            asleep += max(now - last - (sum(seconds) - used), 0)
        last, used, spent = now, sum(seconds), asleep + max(seconds)
        if (size := os.fstat(replies.fileno()).st_size) > written:
            written, since = size, spent
    return asleep


class Server:
    """One fork server, for one thread at a time."""

    def __init__(self):
        self.control, theirs = socket.socketpair()
        self.process = subprocess.Popen(
            [sys.executable, "-P", "-s", "-S", "-X", "utf8", jail.__file__, str(theirs.fileno())],
            pass_fds=[theirs.fileno()],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            cwd="/",
            start_new_session=True,
            # The seed: a set is printed in one order, also when a run is resumed.
            env={k: v for k, v in os.environ.items() if k == "LD_LIBRARY_PATH"}
            | {"PYTHONHASHSEED": "0"},
        )
        theirs.close()
        self.lines = self.control.makefile("r")
        self.about = self.hear()

    def hear(self):
        """The next line that the server says."""
        line = self.lines.readline()
        if not line:
            raise ConnectionError("a sandbox server died; was it killed, or is memory short?")
        return json.loads(line)

    def run(self, jobs, limits):
        """A child for each (header, input, calls); an Outcome each, once the last one is done.

        Two jobs are a program that answers calls and the tests that make them: the calls are what
        the tests print, the answers what they read.
        """
        with ExitStack() as stack:
            null = stack.enter_context(open(os.devnull, "r+b", 0))
            pipes = []
            for _ in range(2 * len(jobs) - 1):
                reading, writing = os.pipe()
                pipe = open(reading, "rb", 0), open(writing, "wb", 0)
                pipes.append([stack.enter_context(end) for end in pipe])
            children = []
            for header, *content in jobs:
                job = json.dumps({**header, **limits._asdict()}).encode()
                new = [stack.enter_context(memory_file(x)) for x in (b"", job, b"", *content)]
                stdout, job, replies, stdin, calls = new
                children.append([stdin, stdout, null, job, calls, replies, null])
            left = [(child[jail.STDOUT], child[jail.REPLIES]) for child in children]
            if len(jobs) == 2:
                children[0][jail.CALLS], children[1][jail.STDOUT] = pipes[1]
                children[1][jail.STDIN], children[0][jail.REPLIES] = pipes[2]
            done, children[-1][jail.DONE] = pipes[0]
            processes = []
            for files in children:
                socket.send_fds(self.control, [b"j"], [file.fileno() for file in files])
                processes.append(self.hear())
            for file in sum(pipes, []):
                if file is not done:
                    file.close()  # so that the child's is the only one
            waiting = select.poll()
            waiting.register(done)
            asleep = watch(waiting, processes, left[-1][1], limits)
            self.control.sendall(b"k")
            ended = self.hear()
            return [
                outcome(*how, asleep, limits, *files)
                for how, files in zip(ended, left, strict=True)
            ]

    def close(self):
        self.lines.close()
        self.control.close()
        self.process.wait()  # it ends what it runs, then itself


def outcome(status, cpu_seconds, asleep, limits, stdout, replies):
    """A dead child's Outcome, from its wait status and its files."""
    stdout, replies = (os.pread(file.fileno(), limits.output, 0) for file in (stdout, replies))
    code, ended = os.waitstatus_to_exitcode(status), ""
    used = cpu_seconds / limits.total_seconds
    if asleep is not None:
        ended = "asleep" if asleep > cpu_seconds else "time limit"
    elif code == -signal.SIGPROF or used > (0.9 if code == -signal.SIGKILL else 1):
        ended = "time limit"
    elif limits.output in (len(stdout), len(replies)):
        ended = "output limit"
    elif code:  # SIGKILL: memory ran out, or it closed the file that says it is there
        ended = f"exit status {code}" if code > 0 else f"crashed: {signal.Signals(-code).name}"
    return Outcome(stdout, replies.splitlines(), ended, cpu_seconds)


class Sandbox:
    """Runs programs from any thread, as many at a time as it has servers."""

    def __init__(self, num_servers=2, *, allow_unprotected=False):
        first = Server()
        self.missing = sorted(set(jail.ATTACKS) - set(first.about["refused"]))
        self.landlock, self.num_servers = first.about["landlock"], num_servers
        self.idle = queue.LifoQueue()  # None: a server to be started when needed
        for server in [None] * (num_servers - 1) + [first]:
            self.idle.put(server)
        if self.missing and not allow_unprotected:
            self.close()
            raise OSError(
                f"{self.describe()}. Programs that a model wrote are not run without; "
                "--allow_unprotected runs them all the same."
            )

    def describe(self):
        """What is enforced here, as found by trying when the first server started."""
        if self.missing:
            return f"Sandbox: this system does not let us confine {', '.join(self.missing)}"
        files = "Landlock" if self.landlock else "no opening of files"
        return f"Sandbox: seccomp, {files}, rlimits; tried and refused: {', '.join(jail.ATTACKS)}"

    def run_script(self, modules, entry, stdin=b"", limits=LIMITS):
        """modules[entry] as a program. modules: {dotted name: source}. One reply."""
        limits = limits._replace(total_seconds=min(limits.total_seconds, limits.test_seconds))
        header = {"modules": modules, "sources": [modules[entry]], "names": []}
        return self._run([(header, stdin, b"")], limits)[0]

    def run_calls(self, modules, entry, calls, limits=LIMITS):
        """Functions of modules[entry], called; see jail.answer_calls. One reply a call."""
        lines = "".join(json.dumps(call) + "\n" for call in calls)
        return self._run([({"modules": modules, "entry": entry}, b"", lines.encode())], limits)[0]

    def run_tests(self, modules, entry, tests, names, limits=LIMITS):
        """Test code, whose `names` are functions of modules[entry], in a process of its own.

        The Outcomes of the program and of the tests; the latter has a reply a test, up to the first
        that failed, and no program can have touched it.
        """
        program = {"modules": modules, "entry": entry}
        checks = {"modules": {}, "entry": entry, "sources": tests, "names": names}
        return self._run([(program, b"", b""), (checks, b"", b"")], limits)

    def _run(self, jobs, limits):
        for last_try in (False, False, True):
            server = self.idle.get()
            healthy = None
            try:
                server = server or Server()
                outcomes = server.run(jobs, limits)
                healthy = server
                return outcomes
            except ConnectionError:  # somebody killed the server: another one does the job
                if last_try:
                    raise
            finally:
                if server and not healthy:
                    server.close()  # lost, or we were interrupted: what it runs must not go on
                self.idle.put(healthy)

    def close(self):
        """Wait for what runs, then end the servers. A later run would start them again."""
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
shared = {}  # process id -> Sandbox; a fork of ours starts its own


def shared_sandbox(num_servers=2, allow_unprotected=False):
    """The sandbox of all rewards, made by the first call: a script's, to set it up and describe it.

    OSError where programs cannot be confined and the script does not allow that.
    """
    with lock:
        if os.getpid() not in shared:
            shared[os.getpid()] = Sandbox(num_servers, allow_unprotected=allow_unprotected)
        return shared[os.getpid()]


def read_reply(outcome, number):
    """(data, None), or (None, reason) for an error, a missing reply, or one that is no reply."""
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
