"""A power cut costs what was not synced, and no more: the run goes on, and nothing that was
reported is lost."""

import errno
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, TINY_FLAGS, assert_same_run, log_text

import export_hf
import train
import update_readme
from parts.run import directory
from parts.run.checkpoint import load_checkpoint
from parts.run.directory import RunDir, make_folder, remove_leftovers, settle, temporary

linux = pytest.mark.skipif(sys.platform != "linux", reason="the trace needs /proc")
State = dict[str, bytes]  # files of a folder, by their paths in it


class Disk:
    """A folder, and what POSIX promises of it after a cut: of each file and of each folder what was
    there when it was last synced. What was not may be there or not."""

    def __init__(self, root: Path):
        self.root, self.grave = root, root.with_name("grave")
        root.mkdir()
        self.grave.mkdir()
        self.names: dict[int, dict[str, int]] = {}  # on the disk, by the number of the folder
        self.contents: dict[int, bytes] = {}  # on the disk, by the number of the file
        self.known: dict[bytes, bytes] = {}  # each content once in memory
        self.states: list[
            tuple[int, State]
        ] = []  # after a cut, with the step that had been reported as saved
        self.saved = 0
        self.traced = self.syncs = True

    def now(self) -> tuple[dict[int, dict[str, int]], dict[int, bytes]]:
        """What programs see."""
        names: dict[int, dict[str, int]] = {}
        contents: dict[int, bytes] = {}
        for folder, _, inside in os.walk(self.root):
            with os.scandir(folder) as entries:
                names[os.stat(folder).st_ino] = {entry.name: entry.inode() for entry in entries}
            for path in (Path(folder, name) for name in inside):
                data, number = path.read_bytes(), path.stat().st_ino
                contents[number] = self.known.setdefault(data, data)
                if not (self.grave / str(number)).exists():
                    LINK(path, self.grave / str(number))  # or another file could get the number
        return names, contents

    def state(self, names: dict[int, dict[str, int]], contents: dict[int, bytes]) -> State:
        """The files below the root."""
        found: State = {}
        waiting = [("", self.root.stat().st_ino)]
        while waiting:
            folder, number = waiting.pop()
            for name, inside in names.get(number, {}).items():
                if inside in self.folders:
                    waiting.append((f"{folder}{name}/", inside))
                else:
                    found[folder + name] = contents.get(inside, b"")
        return found

    def worst(self) -> State:
        """All is lost that can be."""
        return self.state(self.names, self.contents)

    def look(self) -> None:
        """Note what a cut could leave at this moment."""
        if not self.traced:
            return
        names, contents = self.now()
        self.folders = names.keys() | self.names.keys()
        chance = random.Random(len(self.states))
        zeros = {
            n: self.contents.get(n, b"").ljust(len(data), b"\0") for n, data in contents.items()
        }
        some_names = {
            n: chance.choice([self.names.get(n, {}), inside]) for n, inside in names.items()
        }
        some_contents = {
            n: chance.choice([self.contents.get(n, b""), contents[n], zeros[n]]) for n in contents
        }
        for state in (
            self.worst(),
            self.state(names, self.contents),
            self.state(self.names, self.contents | contents),
            self.state(self.names | names, self.contents | zeros),
            self.state(self.names | some_names, self.contents | some_contents),
        ):
            if (self.saved, state) not in self.states[-10:]:
                self.states.append((self.saved, state))

    def sync(self, number: int) -> None:
        """Note what a sync brings to the disk."""
        path, status = Path(os.readlink(f"/proc/self/fd/{number}")), os.fstat(number)
        if not self.syncs or not path.is_relative_to(self.root):
            return
        names, contents = self.now()
        if path.is_dir():
            self.names[status.st_ino] = names[status.st_ino]
        else:
            self.contents[status.st_ino] = contents[status.st_ino]


LINK = os.link


@pytest.fixture
def traced(tmp_path, monkeypatch):
    """A disk on which each call that changes names, and each sync, is a moment of a cut."""
    disk = Disk(tmp_path / "disk")

    def noted(function):
        def call(*arguments, **options):
            disk.look()
            answer = function(*arguments, **options)
            if function is fsync:
                disk.sync(*arguments)
            return answer

        return call

    def told(message: str, *arguments) -> None:
        info(message, *arguments)
        if message.startswith("Saved checkpoint") and disk.traced:
            disk.saved = load_checkpoint(Path(arguments[0]).absolute())["step"]

    fsync, info = os.fsync, train.log.info
    for name in ("fsync", "replace", "rename", "link", "unlink", "mkdir"):
        monkeypatch.setattr(os, name, noted(getattr(os, name)))
    monkeypatch.setattr(train.log, "info", told)
    return disk


def complaints(disk: Disk, tmp_path: Path) -> list[str]:
    """What is wrong with the states that a cut could leave of `run`."""
    found, steps = [], {}
    for saved, state in disk.states:
        kept = []
        for name, data in state.items():
            if name.endswith(".pt"):
                if data not in steps:
                    (tmp_path / "one.pt").write_bytes(data)
                    try:
                        steps[data] = load_checkpoint(tmp_path / "one.pt")["step"]
                    except ValueError:
                        steps[data] = None
                if steps[data] is None:
                    found.append(f"{name} is damaged")
                elif not name.endswith("best.pt"):
                    kept.append(steps[data])
        if max(kept, default=0) < saved:
            found.append(f"step {saved} was reported as saved, and {kept} are there")
    return found


@linux
def test_each_state_that_a_cut_can_leave_is_continued(launch, prompt_disk, traced, tmp_path):
    flags = ["--lr=0.01", "--save_every=3", "--val_fraction=0.2", "--eval_every=4"]
    assert launch("disk/above/run", *flags) == 0
    traced.traced = False
    assert launch("whole", *flags) == 0
    states = [state for _, state in traced.states]
    assert len(states) > 100 and traced.saved == 8
    assert complaints(traced, tmp_path) == []
    begun = [state for state in states if any(name.endswith("last.pt") for name in state)]
    for number, state in enumerate([states[20], *begun[:: len(begun) // 3], begun[-1]]):
        for name, data in state.items():
            path = tmp_path / f"cut{number}" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)
        assert launch(f"cut{number}/above/run", *flags) == 0
        assert_same_run(Path("whole"), Path(f"cut{number}/above/run"))
        assert "is not as the run left it" not in log_text(Path(f"cut{number}/above/run"))


@linux
def test_a_disk_that_syncs_nothing_is_noticed(launch, prompt_disk, traced, tmp_path):
    traced.syncs = False
    assert launch("disk/run", "--steps=4") == 0
    assert {"step 4 was reported as saved, and [] are there"} < set(complaints(traced, tmp_path))


@linux
def test_new_names_are_on_the_disk_and_an_earlier_run_in_one_place_at_least(traced):
    run = RunDir(traced.root / "new" / "run")
    with run.locked():
        run.make()
        growing = {"logs/train.log", "logs/train_metrics.csv", "samples/samples.txt"}
        assert {f"new/run/{name}" for name in growing} <= traced.worst().keys()
        run.write_json(run.config_json, {"launches": []})
        with directory.replacing(run.last) as file:
            file.write(b"weights")
        run.append(run.samples_txt, "samples")
        run.sync()
        run.events.mkdir()
        (run.events / "events").write_bytes(b"events")
        before = {data for data in traced.worst().values() if data}
        del traced.states[:]
        run.move_aside()
    after = traced.worst()
    moved = {
        name.removeprefix("new/run/earlier-1/"): data
        for name, data in after.items()
        if "earlier-1" in name
    }
    assert moved["checkpoints/last.pt"] == b"weights" and moved["tensorboard/events"] == b"events"
    assert before <= set(moved.values()) and "new/run/config.json" not in after
    assert all(before <= set(state.values()) for _, state in traced.states[::5]), (
        "of the worst of each moment"
    )


@linux
def test_an_export_is_there_whole_or_not_at_all(launch, traced, capsys):
    traced.traced = False
    assert launch("run", "--steps=4") == 0
    traced.traced = True
    assert export_hf.main(["--checkpoint=run", "--out=disk/above/hf"]) == 0
    whole = {f"above/hf/{path.name}": path.read_bytes() for path in Path("disk/above/hf").iterdir()}
    assert traced.worst() == whole and len(whole) == 9
    for _, state in traced.states:
        assert {name: data for name, data in state.items() if name.startswith("above/hf/")} in (
            {},
            whole,
        )
    assert export_hf.main(["--from_hf=disk/above/hf", "--out=disk/other/x.pt"]) == 0
    assert "other/x.pt" in traced.worst()


def test_what_a_cut_left_beside_is_removed_by_the_next_start(launch, capsys):
    assert launch("run", "--steps=4") == 0
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    Path("README.md").write_text(
        "<!--AUTO:SUMMARY:START-->\n<!--AUTO:SUMMARY:END-->\n", encoding="utf-8"
    )
    for _ in range(2):  # also where there is nothing to write
        left, held, old = (
            Path(f"README.md.{n}.tmp") for n in (gone.pid, os.getppid(), os.getppid() + 10**7)
        )
        for path in (left, held, old):
            path.write_text("half", encoding="utf-8")
        os.utime(old, (1, 1))
        assert update_readme.main(["--out_dir=run"]) == 0
        assert held.exists() and not old.exists() and left.exists() is (os.name == "nt")
    folder = Path(f"hf.{gone.pid}.tmp")
    folder.mkdir()
    (folder / "config.json").write_text("half", encoding="utf-8")
    os.utime(folder, (1, 1))
    assert export_hf.main(["--checkpoint=run", "--out=hf"]) == 0
    assert not folder.exists() and not temporary(Path("hf"), shared=True).exists()


def test_names_that_only_look_like_leftovers_stay(tmp_path):
    others = [
        tmp_path / name for name in ("a[1].md.12x.tmp", "a1.md.1.tmp", "a[1].md.tmp", "a[1].md")
    ]
    for path in others:
        path.write_bytes(b"")
        os.utime(path, (1, 1))
    remove_leftovers(tmp_path / "a[1].md")
    assert all(path.exists() for path in others[1:])


def test_zeros_in_place_of_lines_hide_no_others(launch, capsys):
    assert launch("run", "--steps=4") == 0
    Path("README.md").write_text("<!--AUTO:LOGS:START-->\n<!--AUTO:LOGS:END-->\n", encoding="utf-8")
    log, samples, metrics = (
        Path("run", *p.split("/"))
        for p in ("logs/train.log", "samples/samples.txt", "logs/train_metrics.csv")
    )
    for path in (log, samples, metrics):
        first, _, later = path.read_bytes().partition(b"\n")
        path.write_bytes(first + b"\n" + b"\0" * 5000 + later)
    assert update_readme.main(["--out_dir=run"]) == 0
    shown = Path("README.md").read_text(encoding="utf-8")
    assert "Training complete." in shown and "\0" not in shown and "\ufffd" * 20 not in shown
    log.write_bytes(b"\0" * 5000)
    assert update_readme.main(["--out_dir=run"]) == 0
    assert "No log yet." in Path("README.md").read_text(encoding="utf-8")


# ---------------------------------------------------------------------------------------------
# Systems that cannot sync, or fail to
# ---------------------------------------------------------------------------------------------

FSYNC = """
#include <errno.h>
#include <stdlib.h>
int fsync(int number) {
    errno = atoi(getenv("FSYNC_ERRNO"));
    return -1;
}
"""
SCRIPTS = f"""
import os, sys
sys.path.insert(0, {str(ROOT)!r})
import train, update_readme
update_readme.draw_loss_curve = lambda out_dir: None
def fill(number):
    os.environ["FSYNC_ERRNO"] = str(number)
    open("README.md", "w").write("<!--AUTO:SUMMARY:START-->\\n<!--AUTO:SUMMARY:END-->\\n")
    return update_readme.main(["--out_dir=run"])
print("CODES", train.main(sys.argv[3:]), *map(fill, sys.argv[1:3]))
"""


@pytest.mark.slow
def test_a_system_without_sync_is_told_once_and_one_that_fails_is_an_error(
    shim, text_file, tmp_path
):
    codes = [str(errno.ENOSYS), str(errno.EIO)]
    flags = [*TINY_FLAGS, "--num_prompts=0", f"--input_file={text_file}", "--out_dir=run"]
    environment = os.environ | {"LD_PRELOAD": str(shim(FSYNC)), "FSYNC_ERRNO": str(errno.EINVAL)}
    result = subprocess.run(
        [sys.executable, "-c", SCRIPTS, *codes, *flags],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        encoding="utf-8",
    )
    said = result.stdout + result.stderr
    assert "CODES 0 0 2\n" in result.stdout, said
    assert (
        said.count("cannot be brought to the disk at once (Invalid argument): a power cut may") == 1
    )
    assert load_checkpoint(tmp_path / "run/checkpoints/last.pt")["step"] == 8
    assert result.stderr.count("update_readme.py: error: [Errno 5] Input/output error: ") == 1
    assert "README.md" in result.stderr.splitlines()[-1] and "Traceback" not in said


@linux
@pytest.mark.parametrize("what", ["a folder", "the rows"])
def test_a_sync_that_fails_is_no_save(launch, before_step, prompt_disk, monkeypatch, what):
    fsync = os.fsync

    def failing(number: int) -> None:
        path = Path(os.readlink(f"/proc/self/fd/{number}"))
        if path.is_dir() if what == "a folder" else path.suffix == ".csv":
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        fsync(number)

    before_step({6: lambda: monkeypatch.setattr(os, "fsync", failing)})
    assert launch("run") == 1
    log = log_text(Path("run"))
    assert (
        log.count("Saved checkpoint") == 1
        and "At the end, step 8, these could not be written: " in log
    )
    name = "checkpoints" if what == "a folder" else "logs/train_metrics.csv"
    assert log.count(f"[Errno 5] Input/output error: 'run/{name}'") == 1


@pytest.mark.parametrize("number", [errno.EINVAL, errno.ENOTSUP, errno.ENOSYS])
def test_what_cannot_be_asked_is_told_once(tmp_path, monkeypatch, number):
    told: list[str] = []

    def failing(_number: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", failing)
    monkeypatch.setattr(directory, "unsettled", [])
    monkeypatch.setattr(directory.log, "warning", told.append)
    make_folder(tmp_path / "a" / "b", parents=True)
    for name in ("one", "two"):
        with directory.replacing(tmp_path / "a" / "b" / name) as file:
            file.write(b"whole")
    assert len(told) == 1 and os.strerror(number) in told[0] and str(tmp_path) in told[0]


def test_under_macos_the_drive_is_asked_too(tmp_path, monkeypatch):
    """There fsync stops at the drive's memory. A drive that cannot be asked is told, once."""
    fcntl = pytest.importorskip("fcntl", reason="Windows has no fcntl")
    asked = []

    def ask(_number: int, command: int) -> None:
        asked.append(command)
        if len(asked) > 2:
            raise OSError(errno.ENOTSUP, "")

    monkeypatch.setattr(sys, "platform", "darwin")
    monkeypatch.setattr(fcntl, "F_FULLFSYNC", 51, raising=False)
    monkeypatch.setattr(fcntl, "fcntl", ask)
    monkeypatch.setattr(os, "fsync", lambda _number: asked.append("fsync"))
    monkeypatch.setattr(directory, "unsettled", [])
    settle(tmp_path)
    assert asked == ["fsync", 51] and directory.unsettled == []
    settle(tmp_path)
    assert asked == ["fsync", 51] * 2 and directory.unsettled == [tmp_path]
