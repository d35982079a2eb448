"""Runs inside the sandbox; a program of its own that imports nothing of this project.

`python -I -S sandbox_init.py LIMITS` takes new namespaces (user, mount, network, process, IPC,
host name), makes a read-only root of the system's libraries and Python alone, lowers its limits,
gives up every capability, and starts Python with `_RUNNER`. That reads one line of JSON,
`{"source", "tests": [{"setup", "expression"}]}`, says that it is ready, and writes the value of
each expression as a line of its own. What the values should be is not known inside.
"""

import ctypes
import json
import os
import resource
import signal
import sys

# From linux/sched.h, linux/mount.h, linux/prctl.h.
_CLONE_NEWNS = 0x00020000
_CLONE_NEWUTS = 0x04000000
_CLONE_NEWIPC = 0x08000000
_CLONE_NEWUSER = 0x10000000
_CLONE_NEWPID = 0x20000000
_CLONE_NEWNET = 0x40000000
_MS_RDONLY, _MS_NOSUID, _MS_NODEV, _MS_REMOUNT = 1, 2, 4, 32
_MS_BIND, _MS_REC, _MS_PRIVATE = 4096, 16384, 1 << 18
_MNT_DETACH = 2
_PR_SET_PDEATHSIG, _PR_CAPBSET_DROP, _PR_SET_NO_NEW_PRIVS = 1, 24, 38
_LINUX_CAPABILITY_VERSION_3 = 0x20080522
_SYS_PIVOT_ROOT = {"x86_64": 155, "aarch64": 41}
_NOBODY = 65534
# Where the new root is made, in a mount namespace of its own: the first that hides no Python.
_PLACES = ("/mnt", "/media", "/srv", "/var", "/opt")
_LIBRARIES = ("/usr", "/lib", "/lib64", "/lib32", "/bin")
_DEVICES = ("/dev/null", "/dev/zero", "/dev/urandom")

_RUNNER = r"""
import json, math, numbers, os, sys

def encode(value, deep=0):
    if deep > 50:
        raise ValueError("nested too deep")
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, int):
        return {"int": str(int(value))}
    if isinstance(value, float):
        return {"float": repr(float(value))}
    if isinstance(value, numbers.Rational):
        return encode(value.numerator if value.denominator == 1 else float(value))
    if isinstance(value, complex):
        return {"complex": [repr(value.real), repr(value.imag)]}
    if isinstance(value, str):
        return str(value)
    if isinstance(value, (bytes, bytearray)):
        return {"bytes": bytes(value).hex()}
    for kind in (list, tuple, set, frozenset):
        if isinstance(value, kind):
            return {kind.__name__: [encode(one, deep + 1) for one in value]}
    if isinstance(value, dict):
        return {"dict": [[encode(k, deep + 1), encode(v, deep + 1)] for k, v in value.items()]}
    raise TypeError("a value of type " + type(value).__name__ + " can't be compared")

def main():
    sys.set_int_max_str_digits(20_000)
    job = json.loads(sys.stdin.buffer.readline())
    out = os.dup(1)
    null = os.open("/dev/null", os.O_RDWR)
    for place in (0, 1, 2):
        os.dup2(null, place)

    def write(data):
        line = json.dumps(data)
        if len(line) > 100_000:
            line = json.dumps({"i": data["i"], "error": "the value is too long"})
        left = line.encode() + b"\n"
        while left:
            left = left[os.write(out, left):]

    write({"ready": True})
    names = {"__name__": "answer", "__builtins__": __builtins__}
    try:
        exec(compile(job["source"], "answer", "exec"), names)
    except BaseException as error:
        write({"source": type(error).__name__})
        os._exit(0)
    for i, test in enumerate(job["tests"]):
        try:
            exec(compile(test["setup"], "test", "exec"), names)
            value = eval(compile(test["expression"], "test", "eval"), names)
            write({"i": i, "value": encode(value)})
        except BaseException as error:
            write({"i": i, "error": type(error).__name__})
    os._exit(0)

main()
"""


class _SandboxError(Exception):
    pass


_libc = ctypes.CDLL(None, use_errno=True)


def _call(what: str, result: int) -> None:
    if result != 0:
        raise _SandboxError(f"{what}: {os.strerror(ctypes.get_errno())}")


def _mount(source: str | None, target: str, kind: str | None, flags: int, data: str = "") -> None:
    texts = [text.encode() if text is not None else None for text in (source, target, kind, data)]
    _call(f"mount {target}", _libc.mount(*texts[:3], ctypes.c_ulong(flags), texts[3]))


def _enter_namespaces() -> None:
    """Take new namespaces, as root of the user namespace."""
    uid, gid = os.getuid(), os.getgid()
    if uid != 0:
        maps = {"setgroups": "deny", "uid_map": f"0 {uid} 1", "gid_map": f"0 {gid} 1"}
    else:
        # Limits of processes do not bind the machine's root, so answers run as nobody.
        maps = {name: f"0 0 1\n{_NOBODY} {_NOBODY} 1" for name in ("uid_map", "gid_map")}
    ready, go = os.pipe(), os.pipe()
    me = os.getpid()
    writer = os.fork()
    if writer == 0:
        # A map of two users can only be written from outside of the new namespace.
        status = 1
        try:
            os.close(ready[1])
            if os.read(ready[0], 1):
                for name, text in maps.items():
                    with open(f"/proc/{me}/{name}", "w") as file:
                        file.write(text)
                os.write(go[1], b"1")
                status = 0
        finally:
            os._exit(status)
    os.close(go[1])
    flags = _CLONE_NEWUSER | _CLONE_NEWNS | _CLONE_NEWNET | _CLONE_NEWPID
    try:
        _call("new namespaces", _libc.unshare(flags | _CLONE_NEWIPC | _CLONE_NEWUTS))
        os.write(ready[1], b"1")
        if not os.read(go[0], 1):
            raise _SandboxError("the users of the new namespace can't be set")
    finally:
        for end in (*ready, go[0]):
            os.close(end)
        os.waitpid(writer, 0)
    # The answer needs no namespace of its own, in which it would have capabilities again.
    with open("/proc/sys/user/max_user_namespaces", "w") as file:
        file.write("0")


def _make_root(folders: list[str]) -> None:
    """Make a read-only root of the given folders and three devices."""
    places = (item for item in _PLACES if os.path.isdir(item))
    place = next((p for p in places if not any(f.startswith(p) for f in folders)), None)
    if place is None:
        raise _SandboxError(f"none of the folders {', '.join(_PLACES)} can hold the new root")
    _mount(None, "/", None, _MS_REC | _MS_PRIVATE)
    _mount("tmpfs", place, "tmpfs", _MS_NOSUID | _MS_NODEV, "size=1m,mode=755")
    for folder in folders:
        target = place + folder
        if os.path.islink(folder):
            os.makedirs(os.path.dirname(target), 0o755, exist_ok=True)
            os.symlink(os.readlink(folder), target)
        elif os.path.isdir(folder):
            os.makedirs(target, 0o755, exist_ok=True)
            # Recursive, because a user namespace may not uncover what is mounted over.
            _mount(folder, target, None, _MS_BIND | _MS_REC)
            _mount(None, target, None, _MS_BIND | _MS_REMOUNT | _MS_RDONLY | _MS_NOSUID | _MS_NODEV)
    os.mkdir(f"{place}/dev", 0o755)
    for device in _DEVICES:
        os.close(os.open(place + device, os.O_CREAT | os.O_WRONLY, 0o644))
        _mount(device, place + device, None, _MS_BIND)
    os.chdir(place)
    number = _SYS_PIVOT_ROOT.get(os.uname().machine)
    if number is None:
        raise _SandboxError(f"no sandbox for {os.uname().machine}")
    # With both names the same, the old root lies on top of the new one until it is unmounted.
    _call("pivot_root", _libc.syscall(number, b".", b"."))
    _call("unmount the old root", _libc.umount2(b".", _MNT_DETACH))
    _mount(None, "/", None, _MS_BIND | _MS_REMOUNT | _MS_RDONLY | _MS_NOSUID | _MS_NODEV)
    os.chdir("/")


def _drop(limits: dict[str, int], as_nobody: bool) -> None:
    """Lower the limits and give up every capability."""
    processes = 3  # this one, process 1, and its parent outside of the process namespace
    for kind, most in (
        (resource.RLIMIT_AS, limits["memory_bytes"]),
        (resource.RLIMIT_CPU, limits["cpu_s"]),
        (resource.RLIMIT_FSIZE, 0),
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_NOFILE, 32),
        (resource.RLIMIT_NPROC, 1 if as_nobody else processes),
    ):
        resource.setrlimit(kind, (most, most))
    for capability in range(64):
        _libc.prctl(_PR_CAPBSET_DROP, capability, 0, 0, 0)
    if as_nobody:
        os.setgroups([])
        os.setresgid(_NOBODY, _NOBODY, _NOBODY)
        os.setresuid(_NOBODY, _NOBODY, _NOBODY)
    _call("no new privileges", _libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0))
    header = (ctypes.c_uint32 * 2)(_LINUX_CAPABILITY_VERSION_3, 0)
    _call("capset", _libc.capset(header, (ctypes.c_uint32 * 6)()))


def main() -> None:
    limits = json.loads(sys.argv[1])
    root = os.getuid() == 0
    _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    _enter_namespaces()
    child = os.fork()
    if child:
        os.close(0)
        os.close(1)
        os.waitpid(child, 0)
        return
    try:
        _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        base = os.path.realpath(sys.base_prefix)
        python = os.path.realpath(sys.executable)
        inside = any(base == library or base.startswith(library + "/") for library in _LIBRARIES)
        _make_root([*_LIBRARIES, *(() if inside else (base,))])
        os.setsid()
        answer = os.fork()
        if answer:
            # This is process 1 of its namespace: when it ends, so does every other one there. The
            # answer has no right to change it, but could take its own signal of death away.
            os.close(0)
            os.close(1)
            os.waitpid(answer, 0)
            os._exit(0)
        _drop(limits, as_nobody=root)
        os.execve(python, [python, "-I", "-S", "-c", _RUNNER], {"PYTHONHASHSEED": "0"})
    except BaseException as error:
        os.write(2, f"sandbox: {error}\n".encode())
        os._exit(1)


if __name__ == "__main__":
    try:
        main()
    except Exception as error:
        os.write(2, f"sandbox: {error}\n".encode())
        os._exit(1)
