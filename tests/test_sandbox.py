"""What a hostile program cannot do, one property a test. After each test no child may be left."""

import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from fixtures.machine import needs_landlock, needs_sandbox

from nanocascade.sandbox import jail, sandbox
from nanocascade.sandbox.sandbox import Limits, Sandbox
from nanocascade.sandbox.session import Session

pytestmark = needs_sandbox
ROOT = str(Path(__file__).parents[1])
IMPORT = """import sys
sys.path.insert(0, sys.argv[1])
from nanocascade.sandbox import jail, sandbox
"""
DEPTH = 300 if sys.version_info[:2] == (3, 12) else 2000  # frames of C; 3.12 allows few
TRY = """import ctypes, fcntl, os, resource, signal, socket, subprocess
libc = ctypes.CDLL(None)
def refused(attack):
    try:
        return attack() == -1
    except (OSError, ValueError):  # ValueError: raising a resource limit
        return True
"""


@pytest.fixture(scope="module")
def box():
    with Sandbox(1) as box:
        yield box


def run(box, source, seconds=0.3, stdin=b"", **limits):
    return box.run_script({"p": source}, "p", stdin, Limits(seconds, seconds, **limits))


def processes():
    """{process: its parent}, but for zombies."""
    found = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, parent = stat.read_text().rpartition(")")[2].split()[:2]
            found |= {int(stat.parent.name): int(parent)} if state != "Z" else {}
        except OSError:
            continue  # it ended while we looked
    return found


@pytest.fixture(autouse=True)
def nothing_left(box):
    yield
    assert box.idle.queue[-1].process.pid not in processes().values()


def test_describe_and_refuse(monkeypatch, box):
    """Start-up says what was tried; a system that confines nothing is refused unless allowed."""
    assert all(name in box.describe() for name in jail.ATTACKS)
    read_line = sandbox.Server.read_line

    def weak(server):
        message = read_line(server)
        weaker = {"refused": ["signals"], "landlock": False}
        return weaker if isinstance(message, dict) else message

    monkeypatch.setattr(sandbox.Server, "read_line", weak)
    with pytest.raises(OSError, match="files, network, processes.*--allow_unprotected"):
        Sandbox(1)
    with Sandbox(1, allow_unprotected=True) as weak_box:
        assert "cannot confine" in weak_box.describe()


def test_without_landlock():
    """On a kernel without Landlock seccomp refuses to open any file at all."""
    source = IMPORT + "jail.Confinement.restrict_files = lambda *_: False\n"
    source += "print(*jail.probe(jail.Confinement()))"
    output = subprocess.check_output([sys.executable, "-c", source, ROOT])
    assert set(output.decode().split()) == set(jail.ATTACKS)


@pytest.mark.parametrize(
    "attacks",
    [
        """socket.socket() | socket.socket(socket.AF_UNIX) | socket.socketpair()
    libc.socket(2, 1, 0)
    socket.create_connection(('127.0.0.1', 80)) | libc.syscall(425, 8, bytes(120))""",
        """os.fork() | libc.vfork() | libc.syscall(57) | libc.syscall(56, 17, 0, 0, 0, 0)
    os.setsid()
    os.posix_spawn('/bin/true', ['a'], {}) | os.execv('/bin/true', ['a']) | subprocess.run('true')
    libc.daemon(0, 0) | libc.unshare(1 << 28) | libc.setns(0, 0)""",
        """os.kill(os.getppid(), 9) | os.kill(-1, 9) | os.killpg(0, 9) | libc.prctl(1, 0)
    fcntl.fcntl(1, 8, os.getppid()) | fcntl.fcntl(1, 10, 9) | libc.ptrace(16, os.getppid(), 0, 0)
    libc.syscall(234, os.getppid(), os.getppid(), 9) | libc.syscall(434, os.getppid(), 0)
    libc.process_vm_readv(os.getppid(), 0, 0, 0, 0, 0)""",
        """os.setuid(0) | os.setpriority(0, 0, -5) | os.sched_setscheduler(0, 1, os.sched_param(1))
    resource.setrlimit(resource.RLIMIT_CPU, (-1, -1)) | os.chroot('/') | libc.sethostname(b'a', 1)
    libc.mount(b'a', b'/mnt', b'tmpfs', 0, 0) | libc.shmget(1, 4096, 0o1600) | libc.reboot(0)
    os.memfd_create('a') | os.sched_setaffinity(0, [0]) | libc.syscall(321, 0, 0, 0)""",
    ],
    ids=["network", "processes", "signals", "privileges"],
)
def test_calls_refused(box, attacks):
    """No socket; no fork, exec or namespace; nobody else signalled or traced; no powers of root."""
    refuse(box, [attack.strip() for line in attacks.split("\n") for attack in line.split(" | ")])


def refuse(box, attacks):
    """Each attack, an expression, fails in a program and in the second one of a session: they print
    those that do not."""
    source = TRY + "".join(f"refused(lambda: {x}) or print({x!r})\n" for x in attacks)
    outcome = run(box, source + "print('end')", seconds=2.0)
    assert outcome.stdout == b"end\n", outcome
    session = Session(box, "error_text = repr")
    assert session.run("before = 'end'") == ("", "")
    assert session.run(source + "print(before)") == ("end\n", "")
    session.close()


def test_files(box, tmp_path):
    """Nothing but the standard library is read; nothing is written, made, moved or changed."""
    file = tmp_path / "file"
    file.write_text("before")
    before, folder = file.stat(), repr(str(tmp_path))
    change = [
        "open(F)",
        "open(F, 'a')",
        "os.remove(F)",
        "os.chmod(F, 0)",
        "os.truncate(F, 0)",
        "os.rename(F, F + '2')",
        "os.utime(F)",
        "os.link(F, F + '2')",
        "os.mkdir(F + '2')",
        "os.symlink(F, F + '2')",
        "os.chown(F, 1, 1)",
    ]
    refuse(
        box,
        [x.replace("F", repr(str(file))) for x in change]
        + [
            "open('/etc/passwd')",
            "open('/proc/self/environ')",
            "open('/proc/self/mem', 'r+b')",
            "open(f'/proc/{os.getppid()}/mem')",
            "os.listdir('/')",
            f"os.listdir({folder})",
            "open('new', 'w')",
            "open(os.__file__, 'a')",
            f"os.open({folder}, os.O_TMPFILE | 2)",
        ],
    )
    assert [*tmp_path.iterdir()] == [file] and file.read_text() == "before"
    assert (file.stat().st_mode, file.stat().st_ctime_ns) == (before.st_mode, before.st_ctime_ns)


def test_threads(box):
    """Threads work and are waited for; a flood of them stops at a limit."""
    assert run(box, "import threading\nthreading.Timer(0.1, print, [5]).start()").stdout == b"5\n"
    flood = "import threading\nfor _ in range(9999): threading.Timer(99, print).start()"
    assert b"RuntimeError" in run(box, flood, seconds=4.0).replies[0]


def test_memory(box):
    """Memory ends at the limit with an error inside; the process never had more."""
    source = "import resource\nkept = []\ntry:\n    while 1: kept.append(bytearray(1 << 22))\n"
    source += "except MemoryError:\n    print(resource.getrusage(0).ru_maxrss >> 10)"
    assert 50 < int(run(box, source, 4.0, memory=200 << 20).stdout) <= 200


@pytest.mark.parametrize(
    "prelude",
    [
        "",
        "import signal as s; s.setitimer(s.ITIMER_PROF, 0)",
        "x = 1\n" * 1_700_000,
        "import signal as s; [s.signal(k, s.SIG_IGN) for k in range(1, 32) if k not in (9, 19)]",
        "import threading as t; t.Thread(target=lambda: any(iter(int, 1))).start()",
        "import os\nwhile 1:\n    try: os.fork()\n    except OSError: pass",
    ],
    ids=["loop", "timer", "ten megabytes", "signals", "threads", "fork flood"],
)
def test_time(box, prelude):
    """A program ends at its CPU limit, in whole seconds where it disarms the timer, whatever it
    does to timers and signals."""
    outcome = run(box, prelude + "\nwhile 1:\n    try: 1 / 0\n    except BaseException: pass")
    assert outcome.ended == "time limit" and outcome.cpu_seconds < 1 + 0.5, outcome


@pytest.mark.parametrize(
    "source",
    [
        "time.sleep(99)",
        "while 1: time.sleep(0.5); os.write(1, b' ')",
        "threading.Event().wait()",
        "os.read(os.pipe()[0], 1)",
        "try: os.fork() or os.setsid() or os.fork()\n"
        "except OSError: ctypes.CDLL(None).daemon(0, 0)\ntime.sleep(99)",
        "threading.Timer(99, print).start()",
        "for k in range(1, 32):\n    k in (9, 19) or signal.signal(k, signal.SIG_IGN)\n"
        "time.sleep(99)",
    ],
    ids=["sleep", "writes", "lock", "pipe", "daemon", "thread", "signals"],
)
def test_sleep(box, source):
    """Whatever a program waits for, it is ended once its wall time is over."""
    source = "import ctypes, os, signal, threading, time\n" + source
    assert run(box, source, 0.05).ended == "asleep"


def test_sleep_in_calls(box):
    """Wall time is counted from the last reply: the second of two calls may not sleep, nor spin
    without the timer; tests that wait for a sleeping program end with it."""
    limits = Limits(0.05, 20.0)
    source = """import signal, time
calls = []
def f(nap):
    calls.append(signal.setitimer(signal.ITIMER_PROF, 0))
    while len(calls) > 1: time.sleep(nap)
"""
    for nap, ended in [(9, "asleep"), (0, "time limit")]:
        calls = [["f", {"tuple": [nap]}, {"dict": []}, None]] * 2
        outcome = box.run_calls({"p": source}, "p", calls, limits)
        assert outcome.ended == ended and len(outcome.replies) == 1
    program, checks = box.run_tests({"p": source}, "p", ["f(9)"] * 2, ["f"], limits)
    assert program.ended == "asleep" and b"value" not in b"".join(checks.replies[1:])


def test_slow_programs(box):
    """Only CPU time counts against the limit: a program that is kept waiting for ten times as long
    as its limit allows in CPU time, replies in between, gets all its answers."""
    source = "import time\ndef f(): return time.sleep(0.4)"
    calls = [["f", {"tuple": []}, {"dict": []}, None]] * 4
    outcome = box.run_calls({"p": source}, "p", calls, Limits(0.15, 0.9))
    assert outcome.ended == "" and len(outcome.replies) == 4


@pytest.mark.parametrize("place", [jail.STDOUT, jail.REPLIES, jail.STDIN, jail.CALLS])
def test_output(box, place):
    """A flood into any file of its own stops at the limit."""
    flood = f"import os\ntry:\n    while 1: os.write({place}, b'x' * 5000)\nexcept OSError:\n"
    flood += f"    while os.fstat({place}).st_size > 1 << 16: pass"
    assert run(box, flood, 2.0, output=1 << 16).ended in ("output limit", "")


def test_other_jobs(box, monkeypatch):
    """Nothing of another job or of ours is among the objects that a program can find."""
    run(box, "secret = 'qx7-ours'")
    monkeypatch.setenv("NANOCASCADE_TEST", "qx7-ours")
    source = "import gc, os, sys\ngc.unfreeze()\nfound = [*gc.get_objects(), os.environ]\n"
    source += "x = sys._getframe()\nwhile x: found += [x.f_locals]; x = x.f_back\n"
    source += "print(len(found) > 999, sum('QX7-'.lower() in repr(x)[:99999] for x in found))"
    assert run(box, source, 9.0).stdout == b"True 0\n"


@pytest.mark.parametrize(
    "source",
    [
        "import os\nos.closerange(0, 99)\nwhile 1: pass",
        "import os\nos.dup2(1, 6)\nwhile 1: pass",
        "x = '\0'",
        "x = '\ud800'",
        "print('\\ud800')",
        "(" * 10_000,
        "x = " + "-" * 200_000 + "1",
        "def f(): f()\nf()",
        "exit(3)",
        "import os\nos.abort()",
        "import ctypes\nctypes.string_at(0)",
        "import sys\nsys.setrecursionlimit(1 << 30)\nf = lambda *x: sorted([1], key=f)\nf()",
        "class E(Exception):\n    def __str__(self): raise self\nraise E",
        "raise KeyboardInterrupt",
        "import os\nos.write(5, b'[' * 60000)\nos._exit(1)",
        "del __builtins__\n1 / 0",
    ],
    ids=range(16),
)
def test_strange_programs(box, source):
    """Whatever the text does to itself, it ends, it is seen to have failed, the server goes on."""
    server, outcome = box.idle.queue[-1], run(box, source, 1.0)
    assert outcome.ended or b"error" in outcome.replies[0], outcome
    assert box.idle.queue[-1] is server


@needs_landlock  # some import modules that are not loaded yet
@pytest.mark.parametrize(
    ("source", "printed"),
    [
        ("print(len(str(10**9999)))", "10000\n"),  # Python's own limit is 4,300 digits
        ("f = lambda n: n and 1 + f(n - 1)\nprint(f(40_000))", "40000\n"),
        (
            f"from functools import *\nf = cache(lambda n: n and 1 + f(n - 1))\nprint(f({DEPTH}))",
            f"{DEPTH}\n",
        ),
        ("import sys\nsys.stdout = open(1, 'w')\nprint(sys.stdin.read(), end='')\nexit()", "in"),
        (
            "import atexit as a, io, sys\nsys.stdout = io.StringIO()\n"
            "a.register(lambda: sys.__stdout__.write(sys.stdout.getvalue()))\nprint(3)",
            "3\n",
        ),
        ("import os\nos.write(1, os.read(0, os.fstat(0).st_size))\nos._exit(0)", "in"),
        ("from dataclasses import *\n@dataclass\nclass A:\n    x: int\nprint(A(1))", "A(x=1)\n"),
        ("if __name__ == '__main__': print(__import__('sqlite3').sqlite_version > '3')", "True\n"),
    ],
    ids=range(8),
)
def test_honest_programs(box, source, printed):
    """What contest programs do works as it does outside."""
    outcome = run(box, source, 4.0, b"in")
    assert (outcome.stdout.decode(), outcome.ended) == (printed, ""), outcome


def await_children(server):
    """The processes that the server has started, as soon as there is one."""
    while not (children := [child for child, parent in processes().items() if parent == server]):
        time.sleep(0.01)
    return children


def await_end(*ended):
    deadline = time.monotonic() + 60  # at once, unless the machine is busy
    while left := set(ended) & set(processes()):
        assert time.monotonic() < deadline, left


def test_server_killed(box):
    """When somebody kills a server, its program dies too and another server does the job."""
    server = box.idle.queue[-1].process.pid
    with ThreadPoolExecutor(1) as threads:
        job = threads.submit(run, box, "import time\ntime.sleep(2)", seconds=1)
        children = await_children(server)
        os.kill(server, signal.SIGKILL)
        await_end(*children)
        assert job.result().ended == ""
    assert box.idle.queue[-1].process.pid != server


def test_sessions(box):
    """A session's limits hold for each of its programs: time, sleep, memory, output; what ends one
    leaves no process, no open file and the server as it was. Files that it tampers with, or a byte
    that it sends too early, spoil only its own results."""
    limits = Limits(test_seconds=0.2, memory=1 << 28, output=1 << 12)

    def used():
        (server,) = box.idle.queue
        children = Path(f"/proc/{server.process.pid}/task/{server.process.pid}/children")
        return len(os.listdir("/proc/self/fd")), children.read_text()

    run(box, "1")
    before = used()
    ends = {
        "while 1: pass": "time limit",
        "import time; time.sleep(9)": "asleep",
        "import os; os.close(5)": "process ended",
        "print('x' * 5000)": "output limit",
        "import os; os._exit(0)": "process ended",
        "import os; os.abort()": "process ended",
    }
    for program, expected in ends.items():
        session = Session(box, "error_text = repr", limits)
        assert session.run("print('first')") == ("first\n", "")
        assert session.run(program)[1] == expected, program
    session = Session(box, "error_text = repr", limits)
    assert session.run("x = 'y' * (1 << 28)") == ("MemoryError()\n", "")
    spoiled = "import os; os.write(5, b'....'); os.ftruncate(0, 0); os.lseek(1, 99, 0); print(1)"
    session.run(spoiled)
    session.close()
    assert run(box, "print(2)").stdout == b"2\n" and used() == before


def test_many_threads():
    """Many threads share two servers, and each gets its own answer."""
    with Sandbox(2) as box, ThreadPoolExecutor(8) as threads:
        outcomes = threads.map(lambda k: run(box, f"print({k})"), range(40))
        assert [int(outcome.stdout) for outcome in outcomes] == [*range(40)]


def test_we_are_killed():
    """When our process is killed, its server and the program that it runs go too, at once."""
    source = IMPORT + "box = sandbox.Sandbox(1); print(box.idle.queue[0].process.pid, flush=True)\n"
    source += "box.run_script({'p': 'import time; time.sleep(99)'}, 'p')"
    ours = subprocess.Popen([sys.executable, "-c", source, ROOT], stdout=subprocess.PIPE)
    server = int(ours.stdout.readline())
    children = await_children(server)
    ours.kill()
    ours.communicate()
    await_end(server, *children)
