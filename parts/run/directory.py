"""Whole files or none, on the disk when they are spoken of; one writer per run."""

import errno
import glob
import json
import logging
import math
import os
import platform
import shutil
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from io import FileIO
from itertools import count
from pathlib import Path
from typing import BinaryIO

from parts.run.layout import (
    CSV_HEADER,
    LOG_FORM,
    Row,
    RunPaths,
    csv_line,
    drawn_at_ctrl_c,
    sample_block,
)

if sys.platform == "win32":
    import msvcrt
else:
    import fcntl

log = logging.getLogger("train")

# Raised when another program holds a lock.
HELD = PermissionError if sys.platform == "win32" else BlockingIOError

# What is answered where nothing can be synced (SMB, FUSE, shared folders), or not by this program.
CANNOT_BE_ASKED = {
    getattr(errno, name)
    for name in ("EINVAL", "ENOTSUP", "EOPNOTSUPP", "ENOSYS", "ENOTTY", "EBADF", "EACCES", "EPERM")
}
unsettled: list[Path] = []  # where that was answered; only the first is told


def settle(path: Path) -> None:
    """Sync a file, or the names in a folder, to the disk: a power cut cannot undo it then. A disk
    that cannot sync is a warning, any other failure an OSError with the path."""
    is_folder = path.is_dir()
    if is_folder and os.name == "nt":  # where names reach the disk when Windows likes
        return
    try:
        number = os.open(path, os.O_RDONLY if is_folder else os.O_WRONLY)
        try:
            os.fsync(number)
            if sys.platform == "darwin":  # whose fsync stops at the drive's own memory
                fcntl.fcntl(number, fcntl.F_FULLFSYNC)
        finally:
            os.close(number)
    except OSError as error:
        if error.errno not in CANNOT_BE_ASKED:
            raise OSError(error.errno, error.strerror, str(path)) from error
        if not unsettled:
            log.warning(
                f"{path} cannot be brought to the disk at once ({error.strerror}): a power cut may "
                "damage or undo what was written last. A local disk has no such limit"
            )
        unsettled.append(path)


def settle_all(folder: Path) -> None:
    """Sync a folder with all that it holds. Raises OSError."""
    for path in (*folder.rglob("*"), folder):
        settle(path)


def make_folder(folder: Path, parents: bool = False) -> None:
    """Make a folder, if asked with its parents, and sync the names. Raises OSError."""
    if folder.is_dir():
        return
    if parents:
        make_folder(folder.parent, parents)
    folder.mkdir(exist_ok=True)
    settle(folder)  # ext2 may have the name of a folder without a block for it
    settle(folder.parent)


def move(source: Path, target: Path) -> None:
    """Rename over what is at `target`, and sync both folders. Raises OSError."""
    for pause in (0.05, 0.1, 0.2, 0.4, 0.8, 1.6, None):  # under Windows another program may hold it
        try:
            os.replace(source, target)
            break
        except PermissionError:
            if pause is None:
                raise
            time.sleep(pause)
    settle(target.parent)  # the new name first: better two names than none
    if source.parent != target.parent:
        settle(source.parent)


def name_also(path: Path, previous: Path) -> None:
    """Give the file at `path` the name `previous` as well, in place of the file that has it."""
    link = temporary(previous)
    try:
        os.link(path, link)
    except OSError:  # FAT has no links: for an instant there is no file at `path`
        return move(path, previous)
    try:
        move(link, previous)
    finally:
        link.unlink(missing_ok=True)  # still there when both were one file already


def temporary(path: Path, shared: bool = False) -> Path:
    """Where a file is written before it moves to `path`; a `shared` one has a place per process."""
    return path.with_name(f"{path.name}.{os.getpid()}.tmp" if shared else path.name + ".tmp")


def remove_leftovers(path: Path) -> None:
    """Remove what a kill left beside a `shared` file, but not the work of a living process."""
    for leftover in path.parent.glob(f"{glob.escape(path.name)}.[0-9]*.tmp"):
        with suppress(OSError, ValueError, OverflowError):
            process = int(leftover.suffixes[-2][1:])
            recent = time.time() - leftover.stat().st_mtime < 3600
            if recent and (os.name == "nt" or is_another_process(process)):
                continue
            shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()


def is_another_process(number: int) -> bool:
    """Whether a process of this number lives, and is not this one."""
    try:
        os.kill(number, 0)
    except OSError as error:
        return isinstance(error, PermissionError)
    return number != os.getpid()


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """Fill a folder that becomes `path` when the block ends well. Raises OSError."""
    place = existing_part(path.parent) / path.name
    remove_leftovers(place)
    folder = temporary(place, shared=True)
    try:
        folder.mkdir()
        yield folder
        settle_all(folder)
        make_folder(path.parent, parents=True)
        before = folder.with_suffix(".before")
        if path.exists():
            move(path, before)
        move(folder, path)
        shutil.rmtree(before, ignore_errors=True)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def replacing(path: Path, previous: Path | None = None, shared: bool = False) -> Iterator[BinaryIO]:
    """Write a file beside `path`, and move it into place when the block ends well.

    At every instant the file at `path` is whole. What was there becomes `previous`, if given.
    Several programs may write a `shared` file at once.
    """
    beside = temporary(path, shared)
    if shared:
        remove_leftovers(path)
    try:
        with open(beside, "wb") as file:
            yield file
            file.flush()
            settle(beside)
        if previous is not None and path.exists():
            name_also(path, previous)
        move(beside, path)
    finally:
        beside.unlink(missing_ok=True)


def write_whole(path: Path, data: bytes) -> None:
    """Write a file as a whole. Raises OSError."""
    with replacing(path) as file:
        file.write(data)


def append_whole(path: Path, data: bytes) -> None:
    """Add bytes to a file that is there. Raises OSError, and then none of them is in it."""
    with open(path, "r+b", buffering=0) as file:
        end = file.seek(0, os.SEEK_END)
        if file.write(data) < len(data):
            file.truncate(end)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))


def existing_part(path: Path) -> Path:
    """The path, or the nearest folder above it that exists."""
    there = (part for part in (path, *path.parents) if part.exists() or part.is_symlink())
    return next(there, path)


def first_free(path: Path) -> Path:
    """The first of best-1.pt, best-2.pt, ... that nothing has yet, for a path best.pt."""
    numbered = (path.with_stem(f"{path.stem}-{number}") for number in count(1))
    return next(one for one in numbered if not one.exists())


def read_if_there(path: Path) -> str:
    """Text of a small file; empty when there is none."""
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return ""


def read_json(path: Path) -> dict:
    """The object in a JSON file; an empty one when the file is missing or damaged."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return values if isinstance(values, dict) else {}


def has_content(path: Path) -> bool:
    """Whether a file is there and not empty."""
    return path.is_file() and path.stat().st_size > 0


def is_protected(path: Path) -> bool:
    """Whether what is at a path is protected against writing. Replacing it would not notice."""
    if not path.exists():
        return False
    # Root may write everything; of a folder Windows means something else by this mode.
    of_nobody = path.is_file() and not path.stat().st_mode & 0o222
    return of_nobody or not os.access(path, os.W_OK)


def free_bytes(path: Path) -> float:
    """Room on the disk of a path; infinite where the system does not know, as on some mounts."""
    try:
        total, _, free = shutil.disk_usage(existing_part(path))
    except OSError:
        return math.inf
    return free if total else math.inf


def gigabytes(n_bytes: float) -> str:
    """Bytes for people."""
    return f"{n_bytes / 1e9:.2f} GB" if math.isfinite(n_bytes) else "an unknown number of GB"


def open_locked(path: Path, wait: bool = False) -> FileIO:
    """A file, locked until it is closed or the process ends. A disk without locks is a warning.
    Raises OSError; without `wait`, that is `HELD` when another program has the lock."""
    file = open(path, "ab", buffering=0)  # noqa: SIM115
    for tenths in count():
        try:
            if sys.platform == "win32":
                file.seek(2**30)  # others can read what stands before
                msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
            else:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            break
        except HELD:
            if not wait:
                file.close()
                raise
            if tenths % 300 == 0:
                seconds = tenths // 10
                log.warning("Waiting for the program that holds %s, for %d s so far", path, seconds)
            time.sleep(0.1)
        except OSError as error:
            last = read_if_there(path) or "nobody"
            log.warning(
                f"{path} cannot be locked ({error.strerror}): see to it that no second program "
                f"writes there meanwhile; it names as the last {last}"
            )
            break
    return file


class RunDir(RunPaths):
    """The files of one run, and all writing into them: whole, or in lines that may wait in memory.
    A write that may fail while the run goes on is an `attempt`."""

    def __init__(self, root: Path):
        super().__init__(root)
        # Files that grow, with their first bytes; two of them are cut where a run is resumed.
        self.resumable = {self.metrics_csv: CSV_HEADER.encode(), self.samples_txt: b""}
        self.growing = {self.train_log: b""} | self.resumable
        self.listener: Callable[[Path, str], None] | None = None  # is given what `append` is given
        self.lock: FileIO | None = None  # the open `owner` file, in the process at work
        self.me = f"{os.getpid()} on {platform.node()}"
        self.unwritten: dict[Path, str] = defaultdict(str)  # lines that wait for the disk
        self.refused: dict[str, int | str] = {}  # what could not be written: an errno, or why

    def check_writable(self) -> None:
        """Raises OSError when a folder or file of the run cannot be written; writes nothing."""
        for path in self.files:
            folder = existing_part(path.parent)
            problem = ""
            if not folder.is_dir():
                problem = f"{folder} is no directory"
            elif not os.access(folder, os.W_OK):
                problem = f"{folder} is not writable"
            elif path.exists() and not path.is_file():
                problem = f"{path} is no file"
            if problem:
                raise OSError(f"--out_dir {self.root}: {problem}; choose another --out_dir")

    def check_room(self, state: int, weights: int, fresh: bool) -> None:
        """Raises OSError without room for three checkpoints of `state` bytes, and for the best."""
        replaced = [self.last, self.prev, self.best, temporary(self.last), temporary(self.best)]
        stats = [path.stat() for path in replaced if path.exists() and not fresh]
        present = {stat.st_ino: stat.st_size for stat in stats}  # one file may have two names
        needed = 3 * state + weights - sum(present.values())
        free = self.free_bytes()
        if needed > free:
            raise OSError(
                f"--out_dir {self.root}: checkpoints need {gigabytes(needed)} more (last, prev and "
                f"one being written: {gigabytes(state)} each, best: {gigabytes(weights)}), and "
                f"that disk has {gigabytes(free)}: free {gigabytes(needed - free)} on it or choose "
                "another --out_dir"
            )

    def free_bytes(self) -> float:
        """Room on the disk of the checkpoints."""
        return free_bytes(self.last)

    def owns(self, checkpoint: Path) -> bool:
        """Whether the file lies in this run's own checkpoint folder."""
        return checkpoint.resolve().parent == self.last.resolve().parent

    def exists(self) -> bool:
        """Whether there is anything of a run."""
        return any(path.exists() for path in self.files)

    def is_ours(self) -> bool:
        """Whether what lies here was written by this program."""
        return read_if_there(self.owner) != "" or "launches" in read_json(self.config_json)

    def has_outcome(self) -> bool:
        """Whether results or best weights lie here, which a new run must not overwrite."""
        return self.results_json.exists() or self.best.exists()

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Keep other trainers out. Raises ValueError when another process holds the lock."""
        make_folder(self.root, parents=True)
        try:
            self.lock = open_locked(self.owner)
        except HELD:
            raise ValueError(
                f"--out_dir {self.root} is in use by another train.py (pid "
                f"{read_if_there(self.owner)}): wait for it, stop it, or choose another --out_dir"
            ) from None
        try:
            yield
        finally:
            self.lock.close()
            self.lock = None

    def check_owner(self) -> None:
        """Raises FileExistsError when the directory was removed and now is another run's."""
        owner = read_if_there(self.owner)
        if owner not in ("", self.me):
            raise FileExistsError(f"{self.root} was taken over by another train.py (pid {owner})")

    def make(self) -> None:
        """Make what is missing: folders, the owner's mark, growing files. Raises OSError."""
        for path in self.files:
            make_folder(path.parent)
        if self.lock is not None and read_if_there(self.owner) != self.me:
            if not self.owner.exists():
                self.lock.close()
                self.lock = open_locked(self.owner)
            self.lock.truncate(0)
            self.lock.write(self.me.encode())
        for path, head in self.growing.items():
            if not path.exists():
                write_whole(path, head)

    def clean(self) -> None:
        """Remove what a kill left half written."""
        for path in self.files:
            temporary(path).unlink(missing_ok=True)
            remove_leftovers(path)

    def move_aside(self) -> Path:
        """Move the files of an earlier run into the first free earlier-1, earlier-2, ..."""
        self.clean()
        target = first_free(self.earlier)
        make_folder(target)
        if self.events.is_dir():  # copied: an open TensorBoard gets stuck where its file is gone
            settle_all(shutil.copytree(self.events, target / self.events.name))
        # Checkpoints last: until they are gone, a start after a kill in here goes on with that run.
        jsons = [self.config_json, self.results_json, self.tokenizer_json]
        folders = [self.train_log.parent, self.samples_txt.parent]
        for path in [*folders, *jsons, self.last.parent]:
            if path.exists():
                move(path, target / path.name)
        return target

    def restore(self, mark: dict[str, dict]) -> None:
        """Cut metrics and samples at a checkpoint's `mark`; what Ctrl-C drew behind it stays."""
        offsets, unwritten = mark.get("offsets", {}), mark.get("unwritten", {})
        self.clean()
        for path, head in self.resumable.items():
            data = path.read_bytes()
            end = offsets.get(path.name, 0)
            kept = data[:end]
            if len(kept) < end or (kept and not kept.endswith(b"\n")):
                missing = "lines before this start are missing"
                log.warning("%s is not as the run left it: %s", path, missing)
                kept = kept[: kept.rfind(b"\n") + 1]
            waited = unwritten.get(path.name, "").encode()
            kept = (kept or head) + waited
            if mark:
                kept += drawn_at_ctrl_c(data[end:].removeprefix(waited))
            if kept != data:
                write_whole(path, kept)

    @contextmanager
    def attempt(self, what: str) -> Iterator[None]:
        """Try to write; the run goes on when the disk refuses."""
        try:
            yield
        except OSError as error:
            self.note(what, error)
        else:
            self.refused.pop(what, None)

    def note(self, what: str, error: OSError) -> None:
        """Note what could not be written, and log it, once for each cause."""
        cause = error.errno or str(error)
        is_new = cause not in self.refused.values()
        self.refused[what] = cause
        if is_new:
            room = ""
            if error.errno == errno.ENOSPC:
                room = f" ({gigabytes(self.free_bytes())} free)"
            log.error(
                f"Could not write {what}: {error}{room}. Training goes on and will write it again "
                "later; no file is left half written."
            )

    def missing(self) -> str:
        """What could not be written to the end, without what can be made again from the rest."""
        made_again = ("the plot", "TensorBoard's events")
        return ", ".join(what for what in self.refused if what not in made_again)

    def append(self, path: Path, text: str) -> None:
        """Add text to a growing file; what the disk refuses waits in memory."""
        self.unwritten[path] += text
        with self.attempt(f"lines of {path}"):
            self.flush(path)
        if self.listener is not None:
            self.listener(path, text)

    def append_metrics(self, row: Row) -> None:
        """Add one row to the CSV."""
        self.append(self.metrics_csv, csv_line(row))

    def append_samples(self, step: int, prompt: str, outputs: list[str], remark: str = "") -> None:
        """Add one block to samples.txt."""
        self.append(self.samples_txt, str(sample_block(step, prompt, outputs, remark)))
        if not self.unwritten[self.samples_txt]:
            log.info("Appended samples to: %s", self.samples_txt)

    def flush(self, path: Path) -> None:
        """Write the lines that wait. Raises OSError, and then none of them is in the file."""
        self.check_owner()
        append_whole(path, self.unwritten[path].encode("utf-8", "replace"))
        self.unwritten[path] = ""

    def mark(self) -> dict[str, dict]:
        """Bytes of metrics and samples, and their lines that wait, for a checkpoint."""
        for path in self.resumable:
            with suppress(OSError):  # another program may hold it: its lines wait in the checkpoint
                self.flush(path)
        return {
            "offsets": {path.name: path.stat().st_size for path in self.resumable},
            "unwritten": {path.name: self.unwritten[path] for path in self.resumable},
        }

    def sync(self) -> None:
        """Bring metrics and samples to the disk. Raises OSError."""
        for path in self.resumable:
            settle(path)

    def write_json(self, path: Path, values: dict) -> None:
        """Write one JSON file whole; numbers that JSON lacks (inf, nan) become null."""
        self.check_owner()
        finite = dict(values)
        for name, value in values.items():
            if isinstance(value, float) and not math.isfinite(value):
                finite[name] = None
        write_whole(path, (json.dumps(finite, indent=2, ensure_ascii=False) + "\n").encode())


class LogFile(logging.Handler):
    """Log lines, for train.log; those that come before there is one wait in memory."""

    def __init__(self) -> None:
        super().__init__()
        self.setFormatter(logging.Formatter(LOG_FORM))
        self.run: RunDir | None = None
        self.early = ""

    @contextmanager
    def of(self, run: RunDir) -> Iterator[None]:
        """In the block, write into this run's train.log, first the lines that wait."""
        self.run = run
        run.append(run.train_log, self.early)
        try:
            yield
        finally:
            self.run = None

    def emit(self, record: logging.LogRecord) -> None:
        """Append the line. A failure logs one line in turn: `attempt` reports it once."""
        line = self.format(record) + "\n"
        if self.run is None:
            self.early += line
        else:
            self.run.append(self.run.train_log, line)
