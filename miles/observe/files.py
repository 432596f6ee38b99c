"""Writing files of a run so that they are whole or absent, and so that a disk problem is named, not traced.

Every `OSError` on the way becomes a `RunDirError` with the file and what to do. Atomic means: safe against the death of
the process at any moment (write beside, then rename); no fsync, so not against the loss of power. Leaves what is
written to its callers.
"""

from __future__ import annotations

import errno
import os
import re
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from miles.errors import RunDirError

_NO_SPACE = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_NO_PERMISSION = {errno.EACCES, errno.EPERM, errno.EROFS}
_NO_DIRECTORY = {errno.ENOTDIR, errno.EEXIST}
_GONE = {errno.ENOENT, errno.ESTALE}


def _remedy(number: int | None, flag: str) -> str:
    if number in _NO_SPACE:
        return f"Free some space or give another place with {flag}; files written before are intact."
    if number in _NO_PERMISSION:
        return f"Give a directory that this user may write to with {flag}."
    if number in _NO_DIRECTORY:
        return f"A file is in the way; give another directory with {flag}."
    if number in _GONE:
        return f"The directory is gone or cannot be created; give another one with {flag}."
    return f"Give another directory with {flag}."


# safetensors hides the number of an I/O error in its text; torch's zip writer says no more than that it failed.
_HIDDEN_NUMBER = re.compile(r"os error (\d+)")
_TORCH_WRITER = ("PytorchStreamWriter", "unexpected pos", "failed writing file")


def _hidden(error: Exception) -> tuple[int | None, str] | None:
    """(errno, reason) of an I/O error in another guise; None for what is none."""
    text = str(error)
    found = _HIDDEN_NUMBER.search(text)
    if found is not None:
        return int(found[1]), os.strerror(int(found[1]))
    if isinstance(error, RuntimeError) and any(sign in text for sign in _TORCH_WRITER):
        return errno.ENOSPC, "the file could not be written to its end"
    return None


@contextmanager
def disk_errors(path: str | Path, flag: str = "--run-dir") -> Iterator[None]:
    """Turn an I/O error inside the block into a `RunDirError` that names `path` and, with `flag`, the remedy.

    I/O errors are `OSError`, and what safetensors and `torch.save` make of one.
    """
    try:
        yield
    except RunDirError:
        raise
    except OSError as error:
        reason = os.strerror(error.errno) if error.errno else str(error)
        raise RunDirError(f"{path}: cannot be written: {reason}. {_remedy(error.errno, flag)}") from error
    except Exception as error:
        hidden = _hidden(error)
        if hidden is None:
            raise
        raise RunDirError(f"{path}: cannot be written: {hidden[1]}. {_remedy(hidden[0], flag)}") from error


def prepare_folder(path: str | Path, flag: str) -> None:
    """Make a folder that will be written to, and write to it now, not after hours. RunDirError names `flag`."""
    folder = Path(path)
    with disk_errors(folder, flag):
        folder.mkdir(parents=True, exist_ok=True)
        probe = temporary_name(folder / "probe")
        probe.touch()
        probe.unlink()


def temporary_name(path: Path) -> Path:
    """Where `path` grows before it is renamed into place. `is_temporary` knows these names again."""
    return path.with_name(f".{path.name}.{os.getpid()}.tmp")


def is_temporary(path: Path) -> bool:
    return path.name.startswith(".") and path.name.endswith(".tmp")


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Give a temporary path to write to; rename it to `path` at the end, or delete it when the block fails.

    Raises RunDirError for disk problems.
    """
    temporary = temporary_name(path)
    with disk_errors(path):
        try:
            yield temporary
            os.replace(temporary, path)
        except BaseException:
            with suppress(OSError):
                temporary.unlink(missing_ok=True)
            raise


def write_atomically(path: Path, data: bytes | str) -> None:
    """Write the whole of `path` or nothing. Raises RunDirError."""
    with replacing(path) as temporary:
        temporary.write_bytes(data.encode() if isinstance(data, str) else data)


def numbered(path: Path) -> Path:
    """The first of `path.1`, `path.2`, ... that does not exist.

    Example: `runs/quickstart` -> `runs/quickstart.1`
    """
    number = 1
    while os.path.lexists(candidate := path.with_name(f"{path.name}.{number}")):
        number += 1
    return candidate


def write_keeping_old(path: Path, data: str) -> None:
    """Like `write_atomically`, but other content that was there stays beside it as `<name>.1`, `<name>.2`, ..."""
    with disk_errors(path):
        if path.is_file() and path.read_text() != data:
            os.replace(path, numbered(path))
    write_atomically(path, data)


class AppendLog:
    """A text file that grows by whole lines, one `write` each; a line cut short by `kill -9` is repaired on open.

    A line that cannot be written completely (full disk) is taken back before RunDirError is raised, so that the file
    holds whole lines at any time.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        with disk_errors(path):
            self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)
            self._is_regular = stat.S_ISREG(os.fstat(self._fd).st_mode)
            if self._is_regular:
                self._repair()

    def _repair(self) -> None:
        """Cut what follows the last line break."""
        size = os.fstat(self._fd).st_size
        end = size
        while end > 0:
            start = max(0, end - 65536)
            cut = os.pread(self._fd, end - start, start).rfind(b"\n")
            if cut >= 0:
                end = start + cut + 1
                break
            end = start
        if end < size:
            os.ftruncate(self._fd, end)

    def append(self, line: str) -> None:
        """Add `line`, which has no line break, and hand it to the operating system. Raises RunDirError."""
        data = memoryview(line.encode() + b"\n")
        with disk_errors(self.path):
            before = os.fstat(self._fd).st_size
            try:
                while data:
                    data = data[os.write(self._fd, data) :]
            except OSError:
                if self._is_regular:
                    with suppress(OSError):
                        os.ftruncate(self._fd, before)
                raise

    def close(self) -> None:
        if self._fd >= 0:
            with disk_errors(self.path):
                fd, self._fd = self._fd, -1
                os.close(fd)
