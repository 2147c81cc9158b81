"""The command line as a contract: files, formats, exit codes, resuming."""

import hashlib
import json
import re
import shutil
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from conftest import GPT2, ROOT, TINY_FLAGS, log_text, rows, run_script, weights, without_date

import export_hf
import sample
import train
import update_readme
from parts import VERSION
from parts.flags import Config
from parts.progress import Progress
from parts.recipe import decide
from parts.report.provenance import git_commit, sources_sha256
from parts.report.reader import read_run
from parts.run.checkpoint import load_checkpoint

RAISE = "Raise --steps (and --decay_steps, if it was typed)"
STEP_LINE = re.compile(
    r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3} \| INFO \| step (\d+)/(\d+) \| loss (\d+\.\d{6}) \| "
    r"lr (\d\.\d\de[+-]\d\d)"
    r" \| tok/s (\d+\.\d)( \|.*)?"
)


@pytest.mark.slow
def test_a_run_as_its_user_types_it(tmp_path, text_file):
    result = run_script(
        *TINY_FLAGS, GPT2, "--input_file", text_file, "--prompt", r"Line 1:\n", cwd=tmp_path
    )
    assert result.returncode == 0, result.stderr
    assert result.stderr == "", "no bar and no warnings in a pipe"
    run = tmp_path / "out" / "gpt2-input"
    files = {path.relative_to(run).as_posix() for path in run.rglob("*") if path.is_file()}
    assert files - {"run.lock"} == {
        "config.json",
        "results.json",
        "logs/train.log",
        "logs/train_metrics.csv",
        "logs/loss_curve.png",
        "samples/samples.txt",
        "checkpoints/last.pt",
        "checkpoints/prev.pt",
        "checkpoints/best.pt",
    }
    log_lines = log_text(run).splitlines()
    assert result.stdout.splitlines() == [without_date(line) for line in log_lines]
    steps = [match for line in log_lines if (match := STEP_LINE.fullmatch(line))]
    assert [int(match[1]) for match in steps] == [1, 2, 4, 6, 8] and {
        match[2] for match in steps
    } == {"8"}
    table = rows(
        run, "step", "loss", "lr", "tokens_per_sec", "elapsed_sec", "tokens", "window_loss"
    )
    assert (
        (run / "logs/train_metrics.csv")
        .read_bytes()
        .startswith(b"step,loss,lr,tokens_per_sec,elapsed_sec,tokens,")
    )
    assert [int(row[0]) for row in table] == [1, 2, 4, 6, 8]
    assert [int(row[5]) for row in table] == [32, 64, 128, 192, 256]
    assert [row[6] == "" for row in table] == [True, True, False, False, False], (
        "undefined before the window is full"
    )
    for match, row in zip(steps, table, strict=True):
        assert float(match[3]) == pytest.approx(float(row[1]), abs=1e-6)
        assert float(match[4]) == pytest.approx(float(row[2]), rel=3e-3), "three digits"

    text = "\n".join(log_lines)
    for line in (
        r"INFO \| Run directory: out/gpt2-input$",
        r"INFO \| Model: GPT-2, 1,634,208 parameters",
        r"INFO \| Corpus: .*input\.txt, [\d,]+ tokens",
        r"INFO \| Step: batch_size 2 x grad_accum 1 x seq_len 16 = 32 tokens; a pseudo-epoch",
        r"INFO \| Loss: ln V = 10\.825 .* floor",
        r"INFO \| From this machine: micro_batch \d+ \(.+\); amp \w+ \(.+\); compile off \(.+\)",
        r"INFO \| Device: cpu \(--device\)",
        r"INFO \| New best loss \d+\.\d{6} -> saved: out/gpt2-input/checkpoints/best\.pt "
        r"\(window_loss at step 8\)$",
        r"INFO \| Saved checkpoint: out/gpt2-input/checkpoints/last\.pt",
        r"INFO \| Appended samples to: out/gpt2-input/samples/samples\.txt",
        r"INFO \| Sample at step 4: Line 1: .+",
        r"INFO \| ETA 0:00:\d\d \(\w+ \d\d:\d\d\) to step 8$",
        r"INFO \| All 8 steps done\.$",
        r"INFO \| Next: python sample\.py --checkpoint out/gpt2-input$",
        r"INFO \| Corpus loss \d+\.\d+ \+- \d+\.\d+ .*perplexity",
    ):
        assert re.search(line, text.replace("\\", "/"), re.MULTILINE), line
    assert log_lines[-1].endswith(" | INFO | Training complete.")

    samples = (run / "samples/samples.txt").read_text(encoding="utf-8")
    assert re.findall(r"^={80}\nSTEP (\d+)$", samples, re.MULTILINE) == ["2", "4", "8"], (
        "the first after half"
    )
    assert samples.count("\nPROMPT:\nLine 1:\n\nOUTPUT:\nLine 1:\n") == 6, (
        "two prompts, three times, output repeats the prompt"
    )


def test_results_and_config_say_what_happened(launch, text_file):
    assert launch("run", GPT2) == 0
    results = json.loads(Path("run/results.json").read_text(encoding="utf-8"))
    assert results["stop_reason"] == "steps"
    assert (results["final_step"], results["tokens"]) == (8, 256)
    assert f"{results['final_loss']:.8f}" == rows(Path("run"), "loss")[-1][0]
    assert f"{results['window_loss']:.8f}" == rows(Path("run"), "window_loss")[-1][0]
    assert results["perplexity"] == pytest.approx(2.718281828 ** results["corpus_loss"], rel=1e-6)
    assert results["corpus_loss_slices"] == 64 and 0 < results["corpus_loss_standard_error"] < 0.1
    assert results["ln_vocab"] == pytest.approx(10.8249, abs=1e-4) and results["loss_floor"] > 0
    config = json.loads(Path("run/config.json").read_text(encoding="utf-8"))
    assert config["command"].startswith("python train.py --n_layer=2") and config[
        "command"
    ].endswith(GPT2)
    assert config["seed"] == 1337 and config["versions"]["torch"] == torch.__version__
    assert config["corpus"]["sha256"] == hashlib.sha256(text_file.read_bytes()).hexdigest()
    assert config["config"]["compile"] == "off" and config["config"]["warmup_steps"] == 0
    origins = config["origins"]
    assert {name for name, origin in origins.items() if origin["from"] == "this machine"} == {
        *("amp", "compile", "threads", "micro_batch")
    }
    assert origins["steps"] == {"from": "typed", "why": ""}
    assert origins["decay_steps"] == {"from": "follows from other flags", "why": "the last step"}


def test_checkpoints_describe_themselves(launch, config):
    assert launch("run", GPT2, "--seq_len=12") == 0
    for name in ("last", "best"):
        checkpoint = torch.load(f"run/checkpoints/{name}.pt", weights_only=True)
        assert checkpoint["trained_context"] == 12
        assert checkpoint["tokenizer"] == {"name": "gpt2", "n_vocab": 50257, "content": ""}
        model = train.GPT(Config.from_dict(checkpoint["config"]))
        model.load_state_dict(checkpoint["model"])
        assert "_orig_mod" not in " ".join(checkpoint["model"])
    assert checkpoint["step"] in (3, 6, 8)


def test_stops_at_the_target(launch):
    assert launch("run", "--target_loss=99", "--steps=50", "--log_every=50") == 0
    assert [row[0] for row in rows(Path("run"), "step")] == ["1", "3"], (
        "the stopping step has its row"
    )
    assert re.search(r"Target reached: loss [\d.]+ <= 99\.0\. Stopping\.", log_text(Path("run")))
    results = json.loads(Path("run/results.json").read_text(encoding="utf-8"))
    assert (results["stop_reason"], results["final_step"], results["best_step"]) == ("target", 3, 3)
    last, best = weights(Path("run/checkpoints/last.pt")), weights(Path("run/checkpoints/best.pt"))
    assert all(torch.equal(last[key], best[key]) for key in last), (
        "best holds the weights after its step"
    )


def test_a_run_shorter_than_its_window_has_a_best(launch):
    assert launch("run", "--steps=2", "--target_window=20", "--target_loss=0.1") == 0
    assert re.search(r"All 2 steps done\..*\n.*Corpus loss ", log_text(Path("run")))
    assert torch.load("run/checkpoints/best.pt", weights_only=True)["step"] == 2
    assert "best.pt (mean of the 2 steps)\n" in log_text(Path("run"))
    assert "| mean loss of all steps | **" in update_readme.summary_section(
        read_run(Path("run")), Path("README.md")
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("first", "again", "answer"),
    [
        ((), (), f"all steps up to 8 are done. {RAISE}"),
        (
            (),
            ("--steps=5",),
            f"all steps up to 8 are done. {RAISE}",
        ),
        (
            ("--target_loss=99",),
            ("--steps=50",),
            "the target was reached at step 3. Lower --target_loss",
        ),
        (
            ("--target_loss=99",),
            ("--target_loss=0", "--steps=3"),
            f"all steps up to 3 are done. {RAISE}",
        ),
    ],
)
def test_a_finished_run_started_again_says_so(launch, capsys, first, again, answer):
    assert launch("run", *first) == 0
    before = {path: path.read_bytes() for path in Path("run").rglob("*") if path.is_file()}
    capsys.readouterr()
    assert launch("run", *first, *again) == 0
    assert (
        f"Already finished: {answer} to go on, or choose another --out_dir"
        in capsys.readouterr().out
    )
    assert before == {path: path.read_bytes() for path in Path("run").rglob("*") if path.is_file()}


@pytest.mark.slow
def test_a_run_killed_before_its_results_is_measured_again(launch):
    assert launch("run") == 0
    complete = json.loads(Path("run/results.json").read_text(encoding="utf-8"))
    Path("run/results.json").write_text(
        json.dumps(complete | {"stop_reason": "running"}), encoding="utf-8"
    )
    assert launch("run") == 0
    again = json.loads(Path("run/results.json").read_text(encoding="utf-8"))
    assert again == complete


def test_the_goal_that_was_missed_is_named(launch):
    assert launch("run", "--target_loss=0.5") == 0
    found = json.loads(Path("run/results.json").read_text(encoding="utf-8"))["corpus_loss"]
    text = log_text(Path("run"))
    assert f"Corpus loss {found:.6f} " in text and f"missed by {found - 0.5:.4f}" in text


def test_target_zero_is_no_target(launch):
    assert not Progress(step=1, recent_losses=[0.0]).stop_reason(
        decide(dict(target_loss=0, target_window=1))
    )


def test_extreme_sampling_and_loss(launch):
    assert (
        launch("run", "--temperature=1e-40", "--init_std=1", "--lr=10", "--min_lr=10", "--steps=4")
        == 0
    )
    assert perplexity_of("run") is None or perplexity_of("run") > 1


def perplexity_of(run: str) -> float | None:
    return json.loads((Path(run) / "results.json").read_text(encoding="utf-8"))["perplexity"]


@pytest.mark.slow
def test_a_reader_that_goes_away_stops_nobody(tmp_path, text_file):
    command = [
        sys.executable,
        ROOT / "train.py",
        *TINY_FLAGS,
        "--input_file",
        text_file,
        "--out_dir",
        "run",
    ]
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, encoding="utf-8")
    process = subprocess.Popen(command, cwd=tmp_path, **pipes)
    process.stdout.readline()
    process.stdout.close()
    assert "Traceback" not in process.stderr.read()
    process.wait(timeout=100)
    assert log_text(tmp_path / "run").endswith("Training complete.\n")


def test_a_compiler_that_fails_is_reported_and_done_without(launch, monkeypatch):
    def broken(_model, **_options):
        def forward(*_arguments):
            raise RuntimeError(
                "backend raised:\n\nCompiler: cl is not found.\nCommand:\ncl x.cpp\nx.cpp:1: "
                "error: no header\n"
            )

        return forward

    monkeypatch.setattr(torch, "compile", broken)
    assert launch("run", "--compile=on") == 0
    reason = "RuntimeError: backend raised: Compiler: cl is not found. x.cpp:1: error: no header\n"
    assert f"torch.compile failed, going on without: {reason}" in log_text(Path("run"))
    config = json.loads(Path("run/config.json").read_text(encoding="utf-8"))
    assert config["config"]["compile"] == "off"
    assert config["origins"]["compile"] == {
        "from": "this machine",
        "why": "torch.compile failed, see the log",
    }

    assert load_checkpoint(Path("run/checkpoints/last.pt"))["config"]["compile"] == "off", (
        "for the next launch"
    )


@pytest.mark.slow
def test_compiled_equals_eager(launch, compiler):
    """One model, with and without torch.compile, the losses to rounding, of slices of two lengths;
    the same names."""
    flags = [
        "--amp=off",
        "--lr=0.01",
        "--target_window=20",
        "--batch_size=4",
        "--mixed_steps=4",
        "--n_layer=1",
    ]
    assert launch("eager", *flags) == 0
    assert launch("compiled", *flags, "--compile=on") == 0
    assert "Compiled in" in log_text(Path("compiled"))
    expected, found = rows(Path("eager"), "loss"), rows(Path("compiled"), "loss")
    assert [float(x[0]) for x in found] == pytest.approx([float(x[0]) for x in expected], abs=1e-3)
    assert (
        weights(Path("eager/checkpoints/last.pt")).keys()
        == weights(Path("compiled/checkpoints/last.pt")).keys()
    )


def test_without_a_target_none_is_spoken_of(launch):
    assert launch("run", "--steps=10", "--target_loss=0") == 0
    log = log_text(Path("run"))
    assert (
        re.search(r"ETA \d:\d\d:\d\d \(\w+ \d\d:\d\d\) to step 10\n", log) and "; no target" in log
    )
    assert "the target" not in log and "Target" not in log


def test_a_target_below_the_floor_is_a_warning_with_the_way_out(launch):
    assert launch("run", "--steps=1", "--target_loss=0.001") == 0
    assert re.search(
        r"WARNING \| --target_loss 0\.001 is below the floor 0\.\d+: .* nor at any --seq_len up "
        r"to 16",
        log_text(Path("run")),
    )


@pytest.mark.slow
def test_importing_does_nothing(tmp_path):
    code = (
        f"import sys; sys.path.insert(0, {str(ROOT)!r}); import train, update_readme; "
        f"print(train.log.handlers)"
    )
    result = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        encoding="utf-8",
    )
    assert (result.returncode, result.stdout.strip(), result.stderr) == (0, "[]", "")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
@pytest.mark.parametrize("script", ["train.py", "sample.py", "export_hf.py", "update_readme.py"])
def test_without_its_packages_a_script_says_what_to_do(script):
    """As with the Python of the system instead of the virtual environment's."""
    result = subprocess.run(
        [sys.executable, "-S", ROOT / script, "--help"],
        capture_output=True,
        text=True,
        encoding="utf-8",
        timeout=60,
    )
    assert result.returncode == 2 and result.stdout == "" and result.stderr.count("\n") == 1
    assert (
        result.stderr.startswith(f"{script}: error: No module named ")
        and "virtual environment" in result.stderr
    )


def test_results_of_an_older_program_are_moved_aside_and_never_emptied(launch, capsys):
    """Logs and samples without any file that says that train.py wrote them."""
    old = {
        "logs/train_metrics.csv": "step,loss\n1,2.5\n2,2.25\n",
        "samples/samples.txt": "It was the best of times",
    }
    for name, content in old.items():
        Path("run", name).parent.mkdir(parents=True)
        Path("run", name).write_text(content, encoding="utf-8")
    assert launch("run") == 0
    assert {name: Path("run/earlier-1", name).read_text(encoding="utf-8") for name in old} == old
    assert f"Moved the run that was here to {Path('run/earlier-1')}" in capsys.readouterr().out


def test_a_prompt_from_the_text_ends_in_a_whole_character(launch):
    Path("emoji.txt").write_text("\N{FAMILY}\N{DROMEDARY CAMEL}" * 400, encoding="utf-8")
    assert launch("run", "--input_file=emoji.txt", "--steps=2", "--num_prompts=1") == 0
    samples = Path("run/samples/samples.txt").read_text(encoding="utf-8")
    prompt = samples.partition("PROMPT:\n")[2].partition("\nOUTPUT")[0]
    assert len(prompt) > 3 and "\ufffd" not in prompt


@pytest.mark.parametrize("program", [train, sample, export_hf, update_readme])
def test_each_script_tells_the_version(program, capsys):
    with suppress(SystemExit):
        assert program.main(["--version"]) == 0
    assert capsys.readouterr().out == f"{program.__name__}.py {VERSION}\n"


def test_the_commit_of_another_repository_is_not_told(tmp_path, monkeypatch):
    """As where an archive was unpacked within a repository of one's own."""
    if shutil.which("git") is None:
        pytest.skip("needs git")
    place = tmp_path / "tools"
    place.mkdir()
    (tmp_path / "own.txt").touch()
    (place / "train.py").touch()
    monkeypatch.setattr("parts.report.provenance.ROOT", place)

    def commit(path: str) -> None:
        author = ["-c", "user.name=a", "-c", "user.email=a@example.org"]
        for command in (["init", "-q"], ["add", path], [*author, "commit", "-qm", "one"]):
            subprocess.run(["git", *command], cwd=tmp_path, check=True)

    commit("own.txt")
    assert git_commit() is None
    commit("tools/train.py")
    assert re.fullmatch("[0-9a-f]{40}", git_commit())


def test_a_run_tells_version_and_sources(launch, monkeypatch, tmp_path):
    """An archive has no commit: there the hash of the sources tells what ran."""
    assert launch("run", "--steps=2") == 0
    monkeypatch.setattr("parts.report.provenance.git_commit", lambda: None)
    assert launch("archive", "--steps=2") == 0
    run, archive = (
        json.loads(Path(name, "config.json").read_text(encoding="utf-8"))
        for name in ("run", "archive")
    )
    results = json.loads(Path("archive/results.json").read_text(encoding="utf-8"))
    assert run["version"] == archive["version"] == results["version"] == VERSION
    assert archive["git_commit"] is None and archive["sources_sha256"] == sources_sha256()
    (tmp_path / "copy" / "parts").mkdir(parents=True)
    for name in ("train.py", "parts/flags.py"):
        text = (ROOT / name).read_text(encoding="utf-8")
        (tmp_path / "copy" / name).write_text(text, encoding="utf-8", newline="\r\n")
    hashed = sources_sha256(tmp_path / "copy")
    (tmp_path / "copy" / "train.py").write_text(text + "#", encoding="utf-8")
    assert hashed != sources_sha256(tmp_path / "copy") != sources_sha256()


@pytest.mark.parametrize("program", [train, sample, export_hf, update_readme])
def test_help_begins_with_what_the_script_is_for(program, capsys):
    try:
        code = program.main(["--help"])
    except SystemExit as answered:
        code = answered.code
    assert code == 0
    lines = capsys.readouterr().out.splitlines()
    script, about = f"{program.__name__}.py", program.__doc__.partition("\n\n")[0]
    assert lines[0].startswith(f"usage: {script} ") and " ".join(about.split()) in " ".join(
        " ".join(lines[1:20]).split()
    )
