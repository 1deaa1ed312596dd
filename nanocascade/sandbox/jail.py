"""The inside of the sandbox: a server that forks, and its children, which run the programs.

sandbox.py starts it as `python -P -s -S jail.py FD`. A job costs a fork, about a millisecond, and
not the start of an interpreter. A child is confined before it compiles its program:

    memory and time     rlimits: CPU seconds, address space, file size, open files, no core dump
    other processes     seccomp allow-list: threads, but no fork, exec, signal, ptrace, priority
    network             no socket in the allow-list
    files               Landlock: only libraries are readable (without Landlock: no file at all)
    root                all capabilities dropped

The server never reads a job, so the memory that a child inherits holds no other job. A child dies
with its server, and the server with us. Elsewhere than on Linux only the rlimits hold (`probe`).

Not covered: kernel bugs, timing channels, whether a path exists (stat), the contents of the
readable directories. The number of threads is limited only by the memory of their stacks.
"""

import atexit
import builtins
import ctypes
import errno
import fcntl
import gc
import importlib.abc
import importlib.util
import inspect
import json
import math
import os
import platform
import resource
import signal
import socket
import struct
import sys
import threading
import types
from collections.abc import Iterator
from contextlib import suppress

# Modules whose names LeetCode's starter code uses without importing them.
STARTER = "typing collections math heapq bisect itertools functools re string copy"
PRELOAD = f"collections.abc dataclasses datetime decimal fractions hashlib random {STARTER}"
# File descriptors of a child. The pipe DONE closes when the child is gone.
STDIN, STDOUT, STDERR, JOB, CALLS, REPLIES, DONE = range(7)
MAX_FRAMES, MAX_STACK = 50_000, 100 << 20  # deep recursion is common, sometimes through C frames

# System calls that a program may make, name:x86_64:aarch64, as numbered in the kernel's unistd.h.
ALLOWED = """read:0:63 write:1:64 close:3:57 fstat:5:80 lseek:8:62 mmap:9:222 mprotect:10:226
munmap:11:215 mremap:25:216 madvise:28:233 brk:12:214 rt_sigaction:13:134 rt_sigprocmask:14:135
rt_sigreturn:15:139 sigaltstack:131:132 stat:4: lstat:6: newfstatat:262:79 statx:332:291 access:21:
faccessat:269:48 faccessat2:439:439 getdents64:217:61 getcwd:79:17 futex:202:98 sched_yield:24:124
sched_getaffinity:204:123 getrandom:318:278 clock_gettime:228:113 clock_getres:229:114
gettimeofday:96:169 time:201: nanosleep:35:101 clock_nanosleep:230:115 getpid:39:172 gettid:186:178
getuid:102:174 geteuid:107:175 getgid:104:176 getegid:108:177 getppid:110:173 exit:60:93
exit_group:231:94 set_robust_list:273:99 rseq:334:293 setitimer:38:103 getitimer:36:102 select:23:
pselect6:270:72 poll:7: ppoll:271:73 pipe2:293:59 dup:32:23 dup2:33: dup3:292:24 uname:63:160
sysinfo:99:179 getrusage:98:165 times:100:153 restart_syscall:219:128 readv:19:65 writev:20:66"""
OPENAT = " openat:257:56"  # only with Landlock, which decides about the paths
MACHINES = {  # column above; audit architecture; clone, clone3, fcntl
    "x86_64": (1, 0xC000003E, 56, 435, 72),
    "aarch64": (2, 0xC00000B7, 220, 435, 25),
}
ATTACKS = {  # tried by a confined child when the server starts; each must be refused
    "network": socket.socket,
    "files": lambda: os.listdir("/"),
    "processes": lambda: os.fork() or os._exit(0),
    "signals": lambda: os.kill(os.getppid(), 0),
}


def checked(result):
    """The result of a C function; OSError if it is -1."""
    if result == -1:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return result


def seccomp_filter(allowed):
    """BPF for the allow-list; an instruction is {u16 code, u8 jump if true, u8 if false, u32 k}.

    Any other call fails with EPERM. clone may only start threads; clone3 fails with ENOSYS, since a
    filter cannot read its flags, and the C library falls back on clone. fcntl may only duplicate
    files (1030: F_DUPFD_CLOEXEC) and read or set flags: with F_SETOWN the kernel sends signals.
    """
    column, arch, clone, clone3, fcntl_number = MACHINES[platform.machine()]
    load, equal, above, any_bit, ret = 0x20, 0x15, 0x25, 0x45, 0x06
    kill, allow = (ret, 0, 0, 0x80000000), (ret, 0, 0, 0x7FFF0000)
    deny, absent = ((ret, 0, 0, 0x50000 | code) for code in (errno.EPERM, errno.ENOSYS))
    program = [(load, 0, 0, 4), (equal, 1, 0, arch), kill, (load, 0, 0, 0)]
    for entry in allowed.split():
        if number := entry.split(":")[column]:
            program += [(equal, 0, 1, int(number)), allow]
    program += [(equal, 0, 1, clone3), absent]
    program += [(equal, 0, 4, clone), (load, 0, 0, 16), (any_bit, 0, 1, 1 << 16), allow, deny]
    program += [(equal, 0, 5, fcntl_number), (load, 0, 0, 24), (equal, 1, 0, 1030)]
    program += [(above, 1, 0, fcntl.F_SETFL), allow, deny, deny]
    return b"".join(struct.pack("HBBI", *instruction) for instruction in program)


class Confinement:
    """Created in the server, which gives up files and capabilities; its children inherit that.

    With NANOCASCADE_UNCONFINED set, Linux behaves like a system without Landlock and seccomp.
    """

    def __init__(self, grants=(), calls=OPENAT):
        self.libc, self.server = ctypes.CDLL(None, use_errno=True), os.getpid()
        self.landlock, self.filter = False, None
        supported = sys.platform == "linux" and platform.machine() in MACHINES
        if supported and not os.environ.get("NANOCASCADE_UNCONFINED"):
            with suppress(OSError):  # without a filter the probe reports what is not confined
                if os.geteuid() == 0:
                    checked(self.libc.capset(struct.pack("Ii", 0x20080522, 0), bytes(24)))
                checked(self.libc.prctl(38, 1, 0, 0, 0))  # PR_SET_NO_NEW_PRIVS
                self.landlock = self.restrict_files(grants)
                program = seccomp_filter(ALLOWED + calls * self.landlock)
                self.filter = ctypes.create_string_buffer(program)

    def restrict_files(self, grants):
        """Landlock (system calls 444 to 446): remove every file right that this kernel knows, but
        reading libraries and the `grants`: (path, bit mask of rights). False without Landlock."""
        version = self.libc.syscall(444, None, 0, 1)
        if version < 1:
            return False
        rights = {1: 13, 2: 14, 3: 15, 4: 15}.get(version, 16)  # as many low bits
        wanted = struct.pack("QQQ", (1 << rights) - 1, 3, 3)  # files, network, scope of signals
        wanted = wanted[: 8 if version < 4 else 16 if version < 6 else 24]
        rules = checked(self.libc.syscall(444, wanted, len(wanted), 0))
        library = os.path.dirname(os.path.dirname(os.path.realpath(os.__file__)))
        read = [(path, 4 | 8) for path in (library, "/lib", "/lib64", "/usr/lib")]  # files, folders
        for path, allowed in [*read, *grants]:
            with suppress(FileNotFoundError):
                place = os.open(path, os.O_PATH)
                rule = struct.pack("=Qi", allowed & (1 << rights) - 1, place)
                checked(self.libc.syscall(445, rules, 1, rule, 0))
                os.close(place)
        checked(self.libc.syscall(446, rules, 0))
        os.close(rules)
        return True

    def put_on(self, job):
        """Confine this child for good. At the CPU limit, in whole seconds, the kernel kills it."""
        limits = {"CPU": math.ceil(job["total_seconds"]), "AS": job["memory"]}
        limits |= {"FSIZE": job["output"], "CORE": 0, "NOFILE": 64, "STACK": MAX_STACK}
        for name, value in limits.items():
            limit = getattr(resource, "RLIMIT_" + name)
            hard = resource.getrlimit(limit)[1]
            value = value if hard == resource.RLIM_INFINITY else min(value, hard)
            with suppress(*[] if self.filter else [ValueError, OSError]):  # macOS has no AS
                resource.setrlimit(limit, (value, value))
        if self.filter:
            checked(self.libc.prctl(1, signal.SIGKILL, 0, 0, 0))  # PR_SET_PDEATHSIG
            if os.getppid() != self.server:
                os._exit(1)  # the server died before the call above
            length, start = (len(self.filter) - 1) // 8, ctypes.addressof(self.filter)
            checked(self.libc.prctl(22, 2, struct.pack("HP", length, start), 0, 0))  # SECCOMP


# ---- a program in its child -----------------------------------------------------------------


def encode(value):
    """Plain data as JSON that keeps types: (1, {2}) -> {"tuple": [1, {"set": [2]}]}."""
    if value is None or isinstance(value, (bool, float, str)):
        return value
    if isinstance(value, int):  # hexadecimal takes linear time and has no limit of digits
        return value if abs(value) < 1 << 63 else {"int": hex(value)}
    if isinstance(value, list):
        return [encode(item) for item in value]
    if isinstance(value, dict):
        return {"dict": [[encode(key), encode(item)] for key, item in value.items()]}
    if type(value).__name__ in ("Fraction", "Decimal"):
        return float(value)
    if isinstance(value, complex):
        return {"complex": [value.real, value.imag]}
    kinds = {tuple: "tuple", set: "set", frozenset: "frozenset", range: "iter", Iterator: "iter"}
    for kind, name in kinds.items():  # what can only be iterated equals no list
        if isinstance(value, kind):
            return {name: [encode(item) for item in value]}
    raise TypeError(f"a {type(value).__name__} is not plain data")


def decode(data):
    """The inverse of `encode`."""
    if isinstance(data, list):
        return [decode(item) for item in data]
    if not isinstance(data, dict):
        return data
    ((kind, body),) = data.items()
    if kind == "int":
        return int(body, 16)
    if kind == "opaque":  # true or not, and equal to nothing
        return type("Opaque", (), {"__bool__": lambda self: body == [True]})()
    kinds = {"tuple": tuple, "set": set, "frozenset": frozenset, "dict": dict, "iter": iter}
    kinds["complex"] = lambda parts: complex(*parts)
    return kinds[kind](map(decode, body))


class Files(importlib.abc.InspectLoader):
    """Imports a program's files from memory: {"package.module": source}."""

    def __init__(self, sources):
        self.sources = sources
        for name in sources:  # a program's random.py takes precedence over the library's
            sys.modules.pop(name, None)
        sys.meta_path.insert(0, self)

    def find_spec(self, name, path=None, target=None):
        return importlib.util.spec_from_loader(name, self) if name in self.sources else None

    def get_source(self, name):
        return self.sources[name]

    def is_package(self, name):
        return any(other.startswith(name + ".") for other in self.sources)


def remote(name, asking, answers):
    """In the tests' child: a function that calls the program's function in the other child.

    A built-in exception of the program is raised here again, but not StopIteration: it could end a
    test's loop early without failing the test.
    """

    def call(*args, **kwargs):
        print(json.dumps([name, encode(args), encode(kwargs), None]), file=asking, flush=True)
        reply = json.loads(answers.readline() or '{"error": ["EOFError", "the program ended"]}')
        if "error" not in reply:
            return decode(reply["value"])
        kind = getattr(builtins, reply["error"][0], RuntimeError)
        known = issubclass(kind, Exception) and kind is not StopIteration
        raise (kind if known else RuntimeError)(reply["error"][1])

    return call


def attempt(job, replies, run, part):
    """Run one part of a job under its own CPU limit and write its value or error as a reply."""
    signal.setitimer(signal.ITIMER_PROF, job["test_seconds"])
    try:
        reply = {"value": run(part)}
    except BaseException as error:  # a program may raise anything, SystemExit included
        reply = {"error": [type(error).__name__, str(error)[:200]]}
    print(json.dumps(reply), file=replies, flush=True)
    return "value" in reply


def run_sources(job, replies):
    """Run whole programs as __main__, or test code with one source a test, up to the first error.
    In test code the job's names, and all that it imports from `entry`, are `remote` functions."""
    main = sys.modules["__main__"] = types.ModuleType("__main__")
    sys.argv = ["solution.py"]
    if "entry" in job:
        asking, sys.stdout = sys.stdout, sys.stderr  # the output of a test is dropped
        program = sys.modules[job["entry"]] = types.ModuleType(job["entry"])
        program.__getattr__, program.__all__ = lambda name: remote(name, asking, sys.stdin), []
        main.__dict__.update({name: getattr(program, name) for name in job["names"]})

    def run(number):
        try:
            exec(compile(job["sources"][number], "solution.py", "exec"), main.__dict__)
        except SystemExit as stop:
            if stop.code not in (None, 0):
                raise
        if number == len(job["sources"]) - 1:  # as the interpreter does at the end of a program
            threading._shutdown()
            atexit._run_exitfuncs()
            sys.stdout.flush()  # while its own object still has the program's names
            main.__dict__.clear()
            gc.collect()  # flushes files that the program left open
            sys.__stdout__.flush()

    all(attempt(job, replies, run, number) for number in range(len(job["sources"])))


def provide_names():
    """Build in the STARTER modules and their names; Python's own and the program's come first."""
    names = {}
    for module in map(importlib.import_module, STARTER.split()):
        public = [x for x in getattr(module, "__all__", dir(module)) if not x.startswith("_")]
        names |= {x: getattr(module, x) for x in public} | {module.__name__: module}
    vars(builtins).update(names | vars(builtins))


def answer_calls(job, replies):
    """Calls of a module's functions, one JSON line each: [name, args, kwargs, other args or null].

    A name that the module lacks is a method of a new Solution(). The other args are a second
    reading of the test's text, used if the function cannot be called with the first.
    """

    def answer(line):
        name, args, kwargs, other = map(decode, json.loads(line))
        owner = importlib.import_module(job["entry"])
        function = getattr(owner if hasattr(owner, name) else owner.Solution(), name)
        if other is not None:
            with suppress(ValueError):  # some built-in functions have no signature
                try:
                    inspect.signature(function).bind(*args)
                except TypeError:
                    args = other
        value = function(*args, **kwargs)
        with suppress(TypeError):
            return encode(value)
        return {"opaque": [bool(value)]}  # a re.Match, say: test code may ask whether it is true

    if "starter" in job:
        provide_names()
    os.dup2(STDERR, STDOUT)  # the output of a function is dropped
    for line in open(CALLS):
        attempt(job, replies, answer, line)


def run_child(confinement, received):
    """Run a job, from reading its files to the end of the process. Never returns."""
    try:
        os.setsid()
        high = [fcntl.fcntl(file, fcntl.F_DUPFD, 64) for file in received]
        for place, file in enumerate(high):
            os.dup2(file, place)
        os.closerange(len(high), 1024)
        job = json.load(open(JOB, closefd=False))
        Files(job["modules"])
        sys.setrecursionlimit(MAX_FRAMES)
        sys.set_int_max_str_digits(0)  # time and output limits bound long integers already
        gc.enable()
        confinement.put_on(job)
        set_limit, stack = resource.setrlimit, resource.RLIMIT_STACK  # programs try to raise theirs
        resource.setrlimit = lambda which, x: which == stack or set_limit(which, x)
        (run_sources if "sources" in job else answer_calls)(job, open(REPLIES, "w"))
        os._exit(0)
    finally:
        os._exit(1)


# ---- the server -----------------------------------------------------------------------------


def probe(confinement):
    """The ATTACKS that fail in a confined child on this system, found by trying them."""
    if os.fork() == 0:
        refused = 0  # a bit for each attack
        with suppress(BaseException):  # an attack that was not tried counts as not refused
            confinement.put_on({"total_seconds": 5, "memory": 1 << 30, "output": 1 << 16})
            for i, attack in enumerate(ATTACKS.values()):
                try:
                    attack()
                except OSError:
                    refused |= 1 << i
        os._exit(refused)
    refused = os.wait()[1] >> 8  # the exit status; 0 if the child was killed
    return [name for i, name in enumerate(ATTACKS) if refused >> i & 1]


def end(child):
    """Kill a child and the rest of its session; returns [wait status, CPU seconds]."""
    for kill in (os.kill, os.killpg):
        with suppress(ProcessLookupError):
            kill(child, signal.SIGKILL)
    _, status, usage = os.wait4(child, 0)
    return [status, usage.ru_utime + usage.ru_stime]


def serve(control):
    """Answer requests: files start a child and return its process id; this id ends the child and
    returns how it ended."""
    for name in PRELOAD.split():
        importlib.import_module(name)
    builtins.exit = builtins.quit = sys.exit  # missing because of -S, and programs use them
    confinement, children = Confinement(), set()
    about = {"refused": probe(confinement), "landlock": confinement.landlock}
    control.sendall(json.dumps(about).encode() + b"\n")
    gc.disable()
    gc.freeze()  # a collection would write to, and so copy, every page shared with a child
    while True:
        message, files, _, _ = socket.recv_fds(control, 20, 7)
        if files:
            answer = os.fork()
            if answer == 0:
                run_child(confinement, files)
            children.add(answer)
            for file in files:
                os.close(file)
        elif message:
            answer = end(int(message))
            children.remove(int(message))
        else:  # the process that started us is gone
            for child in children:
                end(child)
            return
        control.sendall(json.dumps(answer).encode() + b"\n")


if __name__ == "__main__":
    given = int(sys.argv[1])  # high where we have many open files, but a child closes only 1024
    place = fcntl.fcntl(given, fcntl.F_DUPFD, 64)  # above the numbers of a child's own files
    os.close(given)
    serve(socket.socket(fileno=place))
