"""File systems that cannot map or lock files: said where it matters, and the work goes on."""

import errno
import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from conftest import ROOT

import export_hf
from parts.run.directory import RunDir, open_locked
from parts.text import corpus

NO_MAPS = """
#define _GNU_SOURCE
#include <errno.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>
void *mmap(void *at, size_t n, int rights, int how, int file, off_t from) {
    if (file >= 0) { errno = ENODEV; return MAP_FAILED; }
    return (void *)syscall(SYS_mmap, at, n, rights, how, file, from);
}
void *mmap64(void *at, size_t n, int rights, int how, int file, off_t from) {
    return mmap(at, n, rights, how, file, from);
}
"""
NO_LOCKS = """
#include <errno.h>
#include <stdlib.h>
int flock(int file, int how) { errno = atoi(getenv("FLOCK")); return -1; }
"""
REFUSALS = ("ENOLCK", "EACCES", "EPERM", "EINVAL", "EIO", "ENOSYS", "EOPNOTSUPP")


def run_under(library: Path, program: str, cwd: Path) -> str:
    """Output of a Python program that meets the library's functions instead of the system's."""
    environment = os.environ | {"LD_PRELOAD": str(library), "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", textwrap.dedent(program)]
    pipes = dict(capture_output=True, text=True, encoding="utf-8", timeout=100)
    result = subprocess.run(command, cwd=cwd, env=environment, **pipes)
    assert result.returncode == 0, result.stderr
    return result.stdout + result.stderr


@pytest.mark.slow
def test_files_that_cannot_be_mapped_are_read(shim, launch, tmp_path, tokenizer):
    """Token ids, and the weights of another program's model."""
    assert launch("run", "--tokenizer=gpt2", "--steps=4") == 0
    assert export_hf.main(["--checkpoint=run", "--out=hf"]) == 0
    expected = corpus.on_disk([Path("input.txt")], tokenizer, Path("cache"), 1)
    program = """
        import json, mmap, os
        from pathlib import Path
        import export_hf
        from parts.text import corpus, vocabulary as text

        try:
            mmap.mmap(os.open("input.txt", os.O_RDONLY), 0, prot=mmap.PROT_READ)
        except OSError as error:
            assert "No such device" in str(error)
        assert export_hf.main(["--from_hf=hf", "--out=imported.pt"]) == 0
        for folder in ("cache", "new"):  # encoded before, and here
            found = corpus.on_disk([Path("input.txt")], text.load_tokenizer(), Path(folder), 1)
        print(json.dumps([found.sha256, found.tokens.tolist()]))
    """
    output = run_under(shim(NO_MAPS), program, tmp_path)
    assert json.loads(output.splitlines()[-1]) == [expected.sha256, expected.tokens.tolist()]
    assert Path("imported.pt").is_file()


@pytest.mark.slow
def test_what_cannot_be_locked_is_named_and_used(shim, tmp_path, text_file):
    """One sentence for a run and for a token file, whatever the refusal; the last owner is in
    it."""
    program = f"""
        import errno, logging, os, sys
        from pathlib import Path
        from parts.text import corpus, vocabulary as text
        from parts.run.directory import RunDir

        logging.basicConfig(stream=sys.stdout, format="%(message)s")
        for name in {REFUSALS}:
            os.environ["FLOCK"] = str(getattr(errno, name))
            for _ in range(2):
                run = RunDir(Path(name))
                with run.locked():
                    run.make()
            found = corpus.on_disk([Path("input.txt")], text.load_tokenizer(), Path(name), 1)
            print(name, len(found.tokens), run.me)
    """
    lines = run_under(shim(NO_LOCKS), program, tmp_path).splitlines()
    assert len(lines) == 4 * len(REFUSALS)
    for number, name in enumerate(REFUSALS):
        first, second, tokens, result = lines[4 * number : 4 * number + 4]
        reason = os.strerror(getattr(errno, name))
        assert first.startswith(
            f"{name}/run.lock cannot be locked ({reason}): see to it that no second program"
        )
        assert first.endswith("last nobody") and second.endswith(
            f"last {result.split(maxsplit=2)[2]}"
        )
        assert f".lock cannot be locked ({reason})" in tokens and result.startswith(name)


def test_a_wait_is_announced_before_it_begins_and_every_half_minute(
    tmp_path, text_file, tokenizer, monkeypatch
):
    """And what is whole is not waited for."""
    said, sleeps = [], []

    def load():
        return corpus.on_disk([text_file], tokenizer, tmp_path / "cache", 1)

    def sleep(seconds: float) -> None:
        sleeps.append(seconds)
        assert len(said) == 1 + (len(sleeps) > 300)
        if len(sleeps) == 310:
            holder.close()

    monkeypatch.setattr(
        "parts.run.directory.log.warning", lambda form, *values: said.append(form % values)
    )
    monkeypatch.setattr("parts.run.directory.time.sleep", sleep)
    expected = load().tokens.tolist()
    (path,) = (tmp_path / "cache").glob("*.lock")
    holder = open_locked(path)
    assert load().tokens.tolist() == expected and not said
    next((tmp_path / "cache").glob("*.tokens")).unlink()
    assert load().tokens.tolist() == expected and sleeps == [0.1] * 310
    waiting = f"Waiting for the program that holds {path}, for"
    assert said == [f"{waiting} 0 s so far", f"{waiting} 30 s so far"]


def test_a_lock_keeps_others_out_until_it_is_closed(tmp_path):
    run, other = RunDir(tmp_path), RunDir(tmp_path)
    with run.locked():
        run.make()
        with (
            pytest.raises(ValueError, match=f"in use by another train.py .pid {os.getpid()} on "),
            other.locked(),
        ):
            pass
        assert (tmp_path / "run.lock").read_text(encoding="utf-8") == run.me
    with other.locked():
        assert not other.lock.closed
    assert other.lock is None
