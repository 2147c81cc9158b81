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
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from io import FileIO
from itertools import count
from pathlib import Path
from typing import BinaryIO

from parts.run.layout import METRICS, block_of, drawn_at_ctrl_c

if sys.platform == "win32":
    import msvcrt
else:
    import fcntl

log = logging.getLogger("train")

HELD = (
    PermissionError if sys.platform == "win32" else BlockingIOError
)  # by another program, of a lock


# What is answered where nothing can be synced (SMB, FUSE, shared folders), or not by this program.
CANNOT_BE_ASKED = {
    getattr(errno, name)
    for name in ("EINVAL", "ENOTSUP", "EOPNOTSUPP", "ENOSYS", "ENOTTY", "EBADF", "EACCES", "EPERM")
}
unsettled: list[Path] = []  # where that was answered; it is told once


def settle(path: Path) -> None:
    """Bring a file, or the names in a folder, from the system's memory to the disk: else a power cut
    may undo it. Raises OSError, with the path; where a disk cannot be asked, that is a warning.

    Under Windows folders cannot be asked: it brings their names to the disk when it likes.
    """
    folder = path.is_dir()
    if folder and os.name == "nt":
        return
    try:
        number = os.open(path, os.O_RDONLY if folder else os.O_WRONLY)
        try:
            os.fsync(number)
            if sys.platform == "darwin":  # whose fsync stops at the drive's own memory
                import fcntl

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
    """Bring a folder to the disk with all that it holds. Raises OSError."""
    for path in (*folder.rglob("*"), folder):
        settle(path)


def make_folder(folder: Path, parents: bool = False) -> None:
    """Make a folder where there is none, and those above it if asked; their names are on the disk.

    Raises OSError.
    """
    if folder.is_dir():
        return
    if parents:
        make_folder(folder.parent, parents)
    folder.mkdir(exist_ok=True)
    for path in (
        folder,
        folder.parent,
    ):  # ext2 may have the name of a folder without a block for it
        settle(path)


def move(source: Path, target: Path) -> None:
    """Rename over what is at `target`; under Windows another program may hold that for a while, so try for 3 s.

    Raises OSError.
    """
    for pause in (0.05, 0.1, 0.2, 0.4, 0.8, 1.6, None):
        try:
            os.replace(source, target)
            break
        except PermissionError:
            if pause is None:
                raise
            time.sleep(pause)
    for folder in dict.fromkeys(
        (target.parent, source.parent)
    ):  # the new name first: better two than none
        settle(folder)


def also_named(path: Path, previous: Path) -> None:
    """Give the file at `path` the name `previous` as well, in place of the file that has it now."""
    link = temporary(previous)
    try:
        os.link(path, link)
    except OSError:  # FAT has no links: there will be an instant without a file at `path`
        return move(path, previous)
    try:
        move(link, previous)
    finally:
        link.unlink(missing_ok=True)  # still there when both were one file already


def temporary(path: Path, shared: bool = False) -> Path:
    """Where a file is written before it moves to `path`; one that several programs write has a place for each."""
    return path.with_name(f"{path.name}.{os.getpid()}.tmp" if shared else path.name + ".tmp")


def remove_leftovers(path: Path) -> None:
    """Remove what a cut left beside a `shared` file or folder, but not what a process that lives has
    written within the hour. Windows has no harmless way to ask which live."""
    for leftover in path.parent.glob(f"{glob.escape(path.name)}.[0-9]*.tmp"):
        with suppress(OSError, ValueError, OverflowError):
            number = int(leftover.suffixes[-2][1:])
            recent = time.time() - leftover.stat().st_mtime < 3600
            if recent and (os.name == "nt" or lives(number)):
                continue
            shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()


def lives(number: int) -> bool:
    """Whether there is another process of this number."""
    try:
        os.kill(number, 0)
    except OSError as error:
        return isinstance(error, PermissionError)
    return number != os.getpid()


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """Fill a folder that becomes `path`, on the disk with all that it holds, when the block ends
    well; those above it are then made, too. Raises OSError."""
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
    """Write a file beside `path` and move it into place when the block ends well; what was there becomes `previous`,
    if given. Whatever happens when, there is a whole file at `path`. Several programs may write a `shared` one."""
    beside = temporary(path, shared)
    if shared:
        remove_leftovers(path)
    try:
        with open(beside, "wb") as file:
            yield file
            file.flush()
            settle(beside)
        if previous is not None and path.exists():
            also_named(path, previous)
        move(beside, path)
    finally:
        beside.unlink(missing_ok=True)


def append_whole(path: Path, data: bytes) -> None:
    """Add bytes to a file that is there. Raises OSError, and then none of them is in it."""
    with open(path, "r+b", buffering=0) as file:
        end = file.seek(0, os.SEEK_END)
        if file.write(data) < len(data):
            file.truncate(end)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))


def existing_part(path: Path) -> Path:
    """The path, or the nearest folder above it that exists."""
    return next(
        (part for part in (path, *path.parents) if part.exists() or part.is_symlink()), path
    )


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


def free_bytes(path: Path) -> float:
    """Room on the disk of a path; infinite where the system does not know, as on some mounts."""
    try:
        total, _, free = shutil.disk_usage(existing_part(path))
    except OSError:
        total = 0
    return free if total else math.inf


def gigabytes(n_bytes: float) -> str:
    """Bytes for people."""
    return f"{n_bytes / 1e9:.2f} GB" if math.isfinite(n_bytes) else "an unknown number of GB"


def open_locked(path: Path, wait: bool = False) -> FileIO:
    """A file, locked until it is closed or the process ends; what cannot lock is named, and used.

    Raises OSError; `HELD` when another program has it and this one shall not `wait`.
    """
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
            log.warning(
                f"{path} cannot be locked ({error.strerror}): see to it that no second program "
                f"writes there meanwhile; it names as the last {read_if_there(path) or 'nobody'}"
            )
            break
    return file


class RunDir:
    """The files of one run, and all writing into them. Nothing is created before `locked` and `make`.

    A checkpoint, JSON file or plot stands under its name only when it is whole. Lines that the disk refuses
    wait in memory for the next ones. A write that fails while the run goes on is an `attempt`.
    """

    def __init__(self, root: Path):
        self.root = root
        self.config_json = root / "config.json"
        self.results_json = root / "results.json"
        self.tokenizer_json = root / "tokenizer.json"  # of an own vocabulary
        self.train_log = root / "logs" / "train.log"
        self.metrics_csv = root / "logs" / "train_metrics.csv"
        self.loss_curve = root / "logs" / "loss_curve.png"
        self.samples_txt = root / "samples" / "samples.txt"
        self.last = root / "checkpoints" / "last.pt"
        self.prev = root / "checkpoints" / "prev.pt"
        self.best = root / "checkpoints" / "best.pt"
        self.files = [path for path in vars(self).values() if path != root]
        self.events = root / "tensorboard"
        self.also: Callable[[Path, str], None] | None = (
            None  # is given each text that `append` is given
        )
        self.owner = root / "run.lock"  # locked by the process at work; names the last one
        self.lock: FileIO | None = None  # that file, in the process at work
        self.me = f"{os.getpid()} on {platform.node()}"
        self.unwritten: dict[Path, str] = {}  # lines that wait for the disk
        self.refused: dict[
            str, int | str
        ] = {}  # what could not be written of late, and why: an errno, or words

    def check_writable(self) -> None:
        """Raises OSError when a folder or file of the run could not be written, without writing one."""
        folders = [
            existing_part(self.root),
            *(path.parent for path in (self.train_log, self.samples_txt, self.last)),
        ]
        for folder in folders:
            if (folder.exists() or folder.is_symlink()) and not folder.is_dir():
                raise NotADirectoryError(
                    f"--out_dir {self.root}: {folder} is no directory; choose another --out_dir"
                )
            if folder.is_dir() and not os.access(folder, os.W_OK):
                raise PermissionError(
                    f"--out_dir {self.root}: {folder} is not writable; choose another --out_dir"
                )
        for path in self.files:
            if path.exists() and not path.is_file():
                raise FileExistsError(
                    f"--out_dir {self.root}: {path} is no file; choose another --out_dir"
                )

    def check_room(self, state: int, weights: int, fresh: bool) -> None:
        """Raises OSError when the disk cannot hold last, prev and a checkpoint being written, `state` bytes each, and
        best, of `weights` bytes."""
        paths = (
            ()
            if fresh
            else (self.last, self.prev, self.best, temporary(self.last), temporary(self.best))
        )
        present = {
            path.stat().st_ino: path.stat().st_size for path in paths if path.exists()
        }  # two names, one file
        needed, free = 3 * state + weights - sum(present.values()), self.free_bytes()
        if needed > free:
            raise OSError(
                f"--out_dir {self.root}: checkpoints need {gigabytes(needed)} more (last, prev and one being written: "
                f"{gigabytes(state)} each, best: {gigabytes(weights)}), and that disk has {gigabytes(free)}: free "
                f"{gigabytes(needed - free)} on it or choose another --out_dir"
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
        """Whether results or the best weights of a run lie here, which a new one must not overwrite."""
        return self.results_json.exists() or self.best.exists()

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Keep other trainers out; the system opens the lock of a process that is gone.

        Raises ValueError, with its number, when another process holds the lock.
        """
        make_folder(self.root, parents=True)
        try:
            self.lock = open_locked(self.owner)
        except HELD:
            raise ValueError(
                f"--out_dir {self.root} is in use by another train.py (pid {read_if_there(self.owner)}): wait for it, "
                "stop it, or choose another --out_dir"
            ) from None
        try:
            yield
        finally:
            self.lock.close()
            self.lock = None

    def check_owner(self) -> None:
        """Raises FileExistsError when this directory was removed and now belongs to another run."""
        if (owner := read_if_there(self.owner)) not in ("", self.me):
            raise FileExistsError(f"{self.root} was taken over by another train.py (pid {owner})")

    def first_free(self, form: str) -> Path:
        """The first path of this form in the directory, {} being 1, 2, ..., where nothing is."""
        paths = (self.root / form.format(number) for number in count(1))
        return next(path for path in paths if not path.exists())

    def move_aside(self) -> Path:
        """Move the files of an earlier run into the first free earlier-1, earlier-2, …; delete none of them."""
        self.clean()
        target = self.first_free("earlier-{}")
        make_folder(target)
        if (
            self.events.is_dir()
        ):  # an open TensorBoard gets stuck where its file is gone; `shown` empties it
            settle_all(shutil.copytree(self.events, target / self.events.name))
        # Checkpoints last: until they are gone, a start after a kill in here takes up the old run again.
        for name in (
            "logs",
            "samples",
            "config.json",
            "results.json",
            "tokenizer.json",
            "checkpoints",
        ):
            if (self.root / name).exists():
                move(self.root / name, target / name)
        return target

    def clean(self) -> None:
        """Remove what a kill left half written."""
        for path in self.files:
            temporary(path).unlink(missing_ok=True)
            remove_leftovers(path)

    def restore(self, mark: dict[str, dict]) -> None:
        """Bring metrics and samples to a checkpoint's `mark`, or their beginning; what Ctrl-C drew behind it stays."""
        offsets, unwritten = mark.get("offsets", {}), mark.get("unwritten", {})
        self.clean()
        for path in (self.metrics_csv, self.samples_txt):
            data, end = path.read_bytes(), offsets.get(path.name, 0)
            kept = data[:end]
            if len(kept) < end or (kept and not kept.endswith(b"\n")):
                log.warning(
                    "%s is not as the run left it: lines before this start are missing", path
                )
                kept = kept[: kept.rfind(b"\n") + 1]
            waited = unwritten.get(path.name, "").encode()
            kept = (kept or self.head(path).encode()) + waited
            kept += drawn_at_ctrl_c(data[end:].removeprefix(waited)) if mark else b""
            if kept != data:
                with replacing(path) as file:
                    file.write(kept)

    def make(self) -> None:
        """Make the folders, the owner's mark and the growing files, at the start and wherever they
        vanished under the run. Raises OSError."""
        for path in (self.config_json, self.train_log, self.samples_txt, self.last):
            make_folder(path.parent)
        if self.lock is not None and read_if_there(self.owner) != self.me:
            if not self.owner.exists():
                self.lock.close()
                self.lock = open_locked(self.owner)
            self.lock.truncate(0)
            self.lock.write(self.me.encode())
        for path in (self.train_log, self.metrics_csv, self.samples_txt):
            if not path.exists():
                with replacing(path) as file:
                    file.write(self.head(path).encode())

    def head(self, path: Path) -> str:
        """How a growing file begins."""
        return ",".join(METRICS) + "\n" if path == self.metrics_csv else ""

    @contextmanager
    def attempt(self, what: str) -> Iterator[None]:
        """Try to write; the run goes on when the disk refuses."""
        try:
            yield
        except OSError as error:
            self.note(what, error)
        else:
            self.note(what, None)

    def note(self, what: str, error: OSError | None) -> None:
        """Note whether something was written, and log what was not, once for each cause."""
        if error is None:
            self.refused.pop(what, None)
            return
        cause = error.errno or str(error)
        known = cause in self.refused.values()
        self.refused[what] = cause
        if not known:
            room = ""
            if error.errno == errno.ENOSPC:
                room = f" ({gigabytes(self.free_bytes())} free)"
            log.error(
                f"Could not write {what}: {error}{room}. Training goes on, and all that cannot be written is tried "
                "again; no file is left half written."
            )

    def missing(self) -> str:
        """What could not be written to the end, but for what is made from the rest again: plot and events."""
        return ", ".join(
            what for what in self.refused if what not in ("the plot", "TensorBoard's events")
        )

    def append(self, path: Path, text: str) -> None:
        """Add text to a growing file; what the disk refuses waits in memory."""
        self.unwritten[path] = self.unwritten.get(path, "") + text
        with self.attempt(f"lines of {path}"):
            self.flush(path)
        if self.also is not None:
            self.also(path, text)

    def flush(self, path: Path) -> None:
        """Write the lines that wait. Raises OSError, and then none of them is in the file."""
        self.check_owner()
        append_whole(path, self.unwritten.get(path, "").encode("utf-8", "replace"))
        self.unwritten[path] = ""

    def mark(self) -> dict[str, dict]:
        """For a checkpoint: the lengths of metrics and samples, in bytes, and the lines not yet there.

        Raises OSError.
        """
        files = (self.metrics_csv, self.samples_txt)
        for path in files:
            with suppress(OSError):  # another program may hold it: its lines wait in the checkpoint
                self.flush(path)
        return {
            "offsets": {path.name: path.stat().st_size for path in files},
            "unwritten": {path.name: self.unwritten.get(path, "") for path in files},
        }

    def sync(self) -> None:
        """Bring metrics and samples to the disk. Raises OSError."""
        for path in (self.metrics_csv, self.samples_txt):
            settle(path)

    def append_metrics(self, row: dict[str, float | None]) -> None:
        """Add one CSV row; what is missing or None is an empty field."""
        cells = (
            "" if row.get(name) is None else format(row[name], form)
            for name, form in METRICS.items()
        )
        self.append(self.metrics_csv, ",".join(cells) + "\n")

    def append_samples(self, step: int, prompt: str, outputs: list[str], remark: str = "") -> None:
        """Add one block."""
        self.append(self.samples_txt, block_of(step, prompt, outputs, remark))
        if not self.unwritten[self.samples_txt]:
            log.info("Appended samples to: %s", self.samples_txt)

    def write_json(self, path: Path, values: dict) -> None:
        """Write one JSON file whole; numbers that JSON lacks (inf, nan) become null."""
        self.check_owner()
        finite = {
            k: None if isinstance(v, float) and not math.isfinite(v) else v
            for k, v in values.items()
        }
        with replacing(path) as file:
            file.write((json.dumps(finite, indent=2, ensure_ascii=False) + "\n").encode())


class LogFile(logging.Handler):
    """Log lines, for train.log; those that come before there is one wait in memory."""

    def __init__(self) -> None:
        super().__init__()
        self.setFormatter(logging.Formatter("%(asctime)s | %(levelname)s | %(message)s"))
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
        """Append the line. A failure logs a line in turn, but only one: `attempt` reports it once."""
        line = self.format(record) + "\n"
        if self.run is None:
            self.early += line
        else:
            self.run.append(self.run.train_log, line)
