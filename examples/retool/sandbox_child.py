"""The inside of the sandbox: gives up its rights one after the other, then runs the program on its standard input.

    python -I -S -B sandbox_child.py CPU_S MEMORY_MB     runs it (see sandbox.py, which starts this)
    python -I -S -B sandbox_child.py probe               prints what this machine cannot hold, one word per line

    limits       setrlimit: processor time, memory, no file content, no core dumps, few open files
    privileges   capset, no_new_privs: none, even for root
    files        Landlock: only Python's own files can be read
    calls        seccomp: the system calls of ALLOWED, files for reading only; every other one answers EPERM. So there
                 are no processes, threads, sockets or signals to others, and nothing can be written or removed

None of it can be taken back. Linux on x86-64 or ARM64; elsewhere only the limits hold. Imports the standard library
alone and as little of it as possible: a start costs what a start of Python costs.
"""

from __future__ import annotations

import ctypes
import os
import platform
import resource
import struct
import sys
import sysconfig

# Name: number on x86-64, on ARM64 (None: does not exist there). What Python needs to compute, import and print.
ALLOWED: dict[str, tuple[int | None, int | None]] = {
    "read": (0, 63), "write": (1, 64), "close": (3, 57), "lseek": (8, 62), "pread64": (17, 67),
    "readv": (19, 65), "writev": (20, 66), "dup": (32, 23), "openat": (257, 56),
    "stat": (4, None), "fstat": (5, 80), "lstat": (6, None), "newfstatat": (262, 79), "statx": (332, 291),
    "access": (21, None), "faccessat": (269, 48), "faccessat2": (439, 439),
    "readlink": (89, None), "readlinkat": (267, 78), "getdents64": (217, 61), "getcwd": (79, 17),
    "mmap": (9, 222), "mprotect": (10, 226), "munmap": (11, 215), "mremap": (25, 216), "madvise": (28, 233),
    "brk": (12, 214),
    "rt_sigaction": (13, 134), "rt_sigprocmask": (14, 135), "rt_sigreturn": (15, 139), "sigaltstack": (131, 132),
    "futex": (202, 98), "sched_yield": (24, 124), "restart_syscall": (219, 128),
    "nanosleep": (35, 101), "clock_nanosleep": (230, 115), "clock_gettime": (228, 113), "clock_getres": (229, 114),
    "gettimeofday": (96, 169), "time": (201, None), "times": (100, 153), "getrusage": (98, 165),
    "poll": (7, None), "ppoll": (271, 73), "select": (23, None), "pselect6": (270, 72),
    "getpid": (39, 172), "gettid": (186, 178), "getuid": (102, 174), "geteuid": (107, 175), "getgid": (104, 176),
    "getegid": (108, 177), "uname": (63, 160), "getrandom": (318, 278),
    "exit": (60, 93), "exit_group": (231, 94),
}  # fmt: skip
MACHINES = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}  # column of ALLOWED, AUDIT_ARCH_*

PR_SET_SECCOMP, SECCOMP_MODE_FILTER, PR_SET_NO_NEW_PRIVS = 22, 2, 38
SECCOMP_ALLOW, SECCOMP_EPERM = 0x7FFF0000, 0x00050001
BPF_LOAD, BPF_EQUAL, BPF_SET, BPF_RETURN = 0x20, 0x15, 0x45, 0x06
OFFSET_NUMBER, OFFSET_ARCH, OFFSET_ARGUMENT_2 = 0, 4, 32  # in struct seccomp_data

CAPSET = {"x86_64": 126, "aarch64": 91}
CAPABILITY_VERSION_3 = 0x20080522

LANDLOCK_CREATE_RULESET, LANDLOCK_ADD_RULE, LANDLOCK_RESTRICT_SELF = 444, 445, 446
LANDLOCK_RULE_PATH_BENEATH, LANDLOCK_VERSION = 1, 1
LANDLOCK_FILE_RIGHTS = (1 << 13) - 1  # all that the first version knows
LANDLOCK_READ = 1 << 2 | 1 << 3  # files, folders

MEGABYTE = 2**20
OPEN_FILES = 64


def main() -> None:
    if sys.argv[1] == "probe":
        print("\n".join(give_up_rights(cpu_s=10, memory_mb=512)))
        return
    source = sys.stdin.read()
    give_up_rights(cpu_s=int(sys.argv[1]), memory_mb=int(sys.argv[2]))
    run(source)


def give_up_rights(*, cpu_s: int, memory_mb: int) -> list[str]:
    """Returns the names of the layers that this machine does not have."""
    set_limits(cpu_s, memory_mb)
    layers = {"privileges": drop_privileges, "files": hide_files, "calls": filter_calls}
    return [name for name, layer in layers.items() if not layer()]


def run(source: str) -> None:
    """Execute `source` as a program; a traceback of its own frames goes to standard error."""
    try:
        exec(compile(source, "program.py", "exec"), {"__name__": "__main__"})
    except Exception as error:
        import traceback

        if error.__traceback__ is not None:  # without the frame of this function
            error.__traceback__ = error.__traceback__.tb_next
        traceback.print_exception(error)
        sys.exit(1)


def set_limits(cpu_s: int, memory_mb: int) -> None:
    limits = {
        resource.RLIMIT_CPU: cpu_s,
        resource.RLIMIT_AS: memory_mb * MEGABYTE,
        resource.RLIMIT_FSIZE: 0,
        resource.RLIMIT_CORE: 0,
        resource.RLIMIT_NOFILE: OPEN_FILES,
        resource.RLIMIT_NPROC: 0,  # no effect on root, whose processes the call filter stops
    }
    for name, limit in limits.items():
        # macOS refuses some of them.
        try:
            resource.setrlimit(name, (limit, limit))
        except (ValueError, OSError):
            continue


def drop_privileges() -> bool:
    libc = linux_libc()
    if libc is None or platform.machine() not in CAPSET:
        return False
    header = ctypes.create_string_buffer(struct.pack("Ii", CAPABILITY_VERSION_3, 0))
    nothing = ctypes.create_string_buffer(24)
    dropped = libc.syscall(CAPSET[platform.machine()], header, nothing) == 0
    return bool(libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) == 0 and dropped)


def hide_files() -> bool:
    """Landlock: reading below Python's folders and the system's libraries, and nothing else."""
    libc = linux_libc()
    if libc is None or libc.syscall(LANDLOCK_CREATE_RULESET, None, 0, LANDLOCK_VERSION) < 1:
        return False
    handled = ctypes.create_string_buffer(struct.pack("Q", LANDLOCK_FILE_RIGHTS), 8)
    rules = libc.syscall(LANDLOCK_CREATE_RULESET, handled, 8, 0)
    if rules < 0:
        return False
    python = [sysconfig.get_path("stdlib"), sysconfig.get_path("platstdlib"), os.path.join(sys.base_prefix, "lib")]
    paths = [*python, "/lib", "/lib64", "/usr/lib", os.getcwd()]
    for path in filter(os.path.isdir, paths):
        folder = os.open(path, os.O_PATH | os.O_CLOEXEC)
        rule = ctypes.create_string_buffer(struct.pack("=Qi", LANDLOCK_READ, folder), 12)
        added = libc.syscall(LANDLOCK_ADD_RULE, rules, LANDLOCK_RULE_PATH_BENEATH, rule, 0)
        os.close(folder)
        if added != 0:
            return False
    restricted = libc.syscall(LANDLOCK_RESTRICT_SELF, rules, 0) == 0
    os.close(rules)
    return bool(restricted)


def filter_calls() -> bool:
    """seccomp: a program in classic BPF that compares the number of each system call with the list."""
    libc = linux_libc()
    if libc is None or platform.machine() not in MACHINES:
        return False
    column, arch = MACHINES[platform.machine()]
    openat = ALLOWED["openat"][column]
    writes = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND

    def step(code: int, value: int, if_true: int = 0, if_false: int = 0) -> bytes:
        return struct.pack("HBBI", code, if_true, if_false, value)

    program = step(BPF_LOAD, OFFSET_ARCH) + step(BPF_EQUAL, arch, 1, 0) + step(BPF_RETURN, SECCOMP_EPERM)
    program += step(BPF_LOAD, OFFSET_NUMBER)
    for numbers in ALLOWED.values():
        number = numbers[column]
        if number is not None and number != openat:
            program += step(BPF_EQUAL, number, 0, 1) + step(BPF_RETURN, SECCOMP_ALLOW)
    assert openat is not None
    program += step(BPF_EQUAL, openat, 0, 3) + step(BPF_LOAD, OFFSET_ARGUMENT_2)
    program += step(BPF_SET, writes, 1, 0) + step(BPF_RETURN, SECCOMP_ALLOW) + step(BPF_RETURN, SECCOMP_EPERM)
    code = ctypes.create_string_buffer(program, len(program))
    filter_ = ctypes.create_string_buffer(struct.pack("HxxxxxxP", len(program) // 8, ctypes.addressof(code)))
    return bool(libc.prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, filter_, 0, 0) == 0)


def linux_libc() -> ctypes.CDLL | None:
    return ctypes.CDLL(None, use_errno=True) if sys.platform == "linux" else None


if __name__ == "__main__":
    main()
