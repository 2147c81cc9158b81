"""The command line as a contract: files, formats, exit codes, resuming."""

import csv
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import ROOT, TINY_FLAGS, run_script

import train

STEP_LINE = re.compile(
    r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3} \| INFO \| step (\d+)/(\d+) \| loss (\d+\.\d{6}) \| lr (\d\.\d\de[+-]\d\d)"
    r" \| tok/s (\d+\.\d)( \|.*)?"
)


def rows(run: Path, *columns: str) -> list[tuple[str, ...]]:
    """Columns of the CSV; without timing when none are named."""
    with open(run / "logs" / "train_metrics.csv", encoding="utf-8", newline="") as file:
        table = list(csv.DictReader(file))
    columns = columns or [name for name in train.METRICS if name not in ("tokens_per_sec", "elapsed_sec")]
    return [tuple(row[name] for name in columns) for row in table]


def log_text(run: Path) -> str:
    return (run / "logs" / "train.log").read_text(encoding="utf-8")


def weights(path: Path) -> dict[str, torch.Tensor]:
    return torch.load(path, weights_only=True)["model"]


def assert_same_run(first: Path, second: Path) -> None:
    """Weights bit for bit, CSV but for timing, samples and best."""
    assert rows(first) == rows(second)
    assert (first / "samples/samples.txt").read_bytes() == (second / "samples/samples.txt").read_bytes()
    for name in ("last.pt", "best.pt"):
        expected, found = weights(first / "checkpoints" / name), weights(second / "checkpoints" / name)
        assert expected.keys() == found.keys()
        assert all(torch.equal(expected[key], found[key]) for key in expected), name


@pytest.fixture
def launch(tmp_path, text_file, monkeypatch):
    """Run train.main in a directory of its own; a later flag overrides an earlier one."""
    monkeypatch.chdir(tmp_path)

    def run(name: str, *flags: str) -> int:
        return train.main([*TINY_FLAGS, "--input_file", str(text_file), "--out_dir", name, *flags])

    return run


def test_a_run_as_its_user_types_it(tmp_path, text_file):
    result = run_script(*TINY_FLAGS, "--input_file", text_file, "--prompt", r"Line 1:\n", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert result.stderr == "", "no bar and no warnings in a pipe"
    run = tmp_path / "out" / "gpt2"
    files = {path.relative_to(run).as_posix() for path in run.rglob("*") if path.is_file()}
    assert files == {
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
    assert result.stdout.splitlines() == log_lines
    steps = [match for line in log_lines if (match := STEP_LINE.fullmatch(line))]
    assert [int(match[1]) for match in steps] == [1, 2, 4, 6, 8] and {match[2] for match in steps} == {"8"}
    table = rows(run, "step", "loss", "lr", "tokens_per_sec", "elapsed_sec", "tokens", "window_loss")
    assert (run / "logs/train_metrics.csv").read_bytes().startswith(b"step,loss,lr,tokens_per_sec,elapsed_sec,tokens,")
    assert [int(row[0]) for row in table] == [1, 2, 4, 6, 8]
    assert [int(row[5]) for row in table] == [32, 64, 128, 192, 256]
    assert [row[6] == "" for row in table] == [True, True, False, False, False], "undefined before the window is full"
    for match, row in zip(steps, table, strict=True):
        assert float(match[3]) == pytest.approx(float(row[1]), abs=1e-6)
        assert match[4] == f"{float(row[2]):.2e}"

    text = "\n".join(log_lines)
    for line in (
        r"INFO \| Model: GPT-2, 1,634,208 parameters",
        r"INFO \| Corpus: .*input\.txt, [\d,]+ tokens",
        r"INFO \| Step: batch_size 2 x grad_accum 1 x seq_len 16 = 32 tokens; a pseudo-epoch",
        r"INFO \| Loss: ln V = 10\.825 .* floor",
        r"INFO \| Device: cpu \(--device\)",
        r"INFO \| Amp: \w+ \(.+\)",
        r"INFO \| Compile: off \(.+\)",
        r"INFO \| New best loss \d+\.\d{6} -> saved: out/gpt2/checkpoints/best\.pt",
        r"INFO \| Saved checkpoint: out/gpt2/checkpoints/last\.pt",
        r"INFO \| Appended samples to: out/gpt2/samples/samples\.txt",
        r"INFO \| Corpus loss \d+\.\d+ \+- \d+\.\d+ .*perplexity",
    ):
        assert re.search(line, text.replace("\\", "/")), line
    assert log_lines[-1].endswith(" | INFO | Training complete.")

    samples = (run / "samples/samples.txt").read_text(encoding="utf-8")
    assert re.findall(r"^={80}\nSTEP (\d+)$", samples, re.MULTILINE) == ["4", "8"]
    assert samples.count("\nPROMPT:\nLine 1:\n\nOUTPUT:\nLine 1:\n") == 4, (
        "two prompts, twice, output repeats the prompt"
    )


def test_results_and_config_say_what_happened(launch, text_file):
    assert launch("run") == 0
    results = json.loads(Path("run/results.json").read_text(encoding="utf-8"))
    assert results["stop_reason"] == "steps"
    assert (results["final_step"], results["tokens"]) == (8, 256)
    assert f"{results['final_loss']:.8f}" == rows(Path("run"), "loss")[-1][0]
    assert f"{results['window_loss']:.8f}" == rows(Path("run"), "window_loss")[-1][0]
    assert results["perplexity"] == pytest.approx(2.718281828 ** results["corpus_loss"], rel=1e-6)
    assert results["corpus_loss_slices"] == 64 and 0 < results["corpus_loss_standard_error"] < 0.1
    assert results["ln_vocab"] == pytest.approx(10.8249, abs=1e-4) and results["loss_floor"] > 0
    config = json.loads(Path("run/config.json").read_text(encoding="utf-8"))
    assert config["command"].startswith("python train.py --n_layer=2") and config["command"].endswith("--out_dir run")
    assert config["seed"] == 1337 and config["versions"]["torch"] == torch.__version__
    assert config["corpus"]["sha256"] == train.hashlib.sha256(text_file.read_bytes()).hexdigest()
    assert config["config"]["compile"] == "off" and config["config"]["warmup_steps"] == 0
    assert set(config["reasons"]) == {"device", "amp", "compile", "threads"}


def test_checkpoints_describe_themselves(launch, config):
    assert launch("run", "--seq_len=12") == 0
    for name in ("last", "best"):
        checkpoint = torch.load(f"run/checkpoints/{name}.pt", weights_only=True)
        assert checkpoint["trained_context"] == 12
        assert checkpoint["tokenizer"] == {"name": "gpt2", "n_vocab": 50257}
        model = train.GPT(train.Config.from_dict(checkpoint["config"]))
        model.load_state_dict(checkpoint["model"])
        assert "_orig_mod" not in " ".join(checkpoint["model"])
    assert checkpoint["step"] in (3, 6, 8)


def test_stops_at_the_target(launch):
    assert launch("run", "--target_loss=99", "--steps=50", "--log_every=50") == 0
    assert [row[0] for row in rows(Path("run"), "step")] == ["1", "3"], "the stopping step has its row"
    assert re.search(r"Target reached: loss \d+\.\d{6} <= 99\.0\. Stopping\.", log_text(Path("run")))
    results = json.loads(Path("run/results.json").read_text(encoding="utf-8"))
    assert (results["stop_reason"], results["final_step"], results["best_step"]) == ("target", 3, 3)
    last, best = weights(Path("run/checkpoints/last.pt")), weights(Path("run/checkpoints/best.pt"))
    assert all(torch.equal(last[key], best[key]) for key in last), "best holds the weights after its step"


def test_a_run_shorter_than_its_window_has_a_best(launch):
    assert launch("run", "--steps=2", "--target_window=20") == 0
    assert torch.load("run/checkpoints/best.pt", weights_only=True)["step"] == 2


@pytest.mark.parametrize(
    ("first", "again", "answer"),
    [
        ((), (), "all steps up to 8 are done. Raise --steps"),
        ((), ("--steps=5",), "all steps up to 8 are done. Raise --steps"),
        (("--target_loss=99",), ("--steps=50",), "the target was reached at step 3. Lower --target_loss"),
        (("--target_loss=99",), ("--target_loss=0", "--steps=3"), "all steps up to 3 are done. Raise --steps"),
    ],
)
def test_a_finished_run_started_again_says_so(launch, capsys, first, again, answer):
    assert launch("run", *first) == 0
    before = {path: path.read_bytes() for path in Path("run").rglob("*") if path.is_file()}
    capsys.readouterr()
    assert launch("run", *first, *again) == 0
    assert f"Already finished: {answer} to go on." in capsys.readouterr().out
    assert before == {path: path.read_bytes() for path in Path("run").rglob("*") if path.is_file()}


def test_a_run_killed_before_its_results_is_measured_again(launch):
    assert launch("run") == 0
    complete = json.loads(Path("run/results.json").read_text(encoding="utf-8"))
    Path("run/results.json").write_text(json.dumps(complete | {"stop_reason": "running"}), encoding="utf-8")
    assert launch("run") == 0
    again = json.loads(Path("run/results.json").read_text(encoding="utf-8"))
    assert again == complete


def test_the_goal_that_was_missed_is_named(launch):
    assert launch("run", "--target_loss=0.5") == 0
    assert "All 8 steps done; window_loss is still above the target 0.5." in log_text(Path("run"))


@pytest.mark.parametrize("flags", [(), ("--amp=fp16",), ("--dropout=0.2",), ("--grad_accum=2", "--amp=bf16")])
def test_a_resumed_run_equals_an_uninterrupted_one(launch, flags):
    flags = [*flags, "--lr=0.01", "--decay_steps=8", "--warmup_steps=2", "--target_window=2"]
    assert launch("whole", *flags) == 0
    assert launch("parts", *flags, "--steps=4") == 0
    assert launch("parts", *flags) == 0
    assert "Resuming from step 4" in log_text(Path("parts"))
    assert_same_run(Path("whole"), Path("parts"))
    launches = json.loads(Path("parts/config.json").read_text(encoding="utf-8"))["launches"]
    assert [launch["first_step"] for launch in launches] == [1, 5]


def test_resuming_cuts_rows_and_samples_behind_the_checkpoint(launch):
    """As after a kill at step 8 that left the checkpoint of step 4."""
    flags = ["--decay_steps=8", "--warmup_steps=2"]
    assert launch("whole", *flags) == 0
    assert launch("cut", *flags) == 0
    checkpoints = Path("cut/checkpoints")
    os.replace(checkpoints / "prev.pt", checkpoints / "last.pt")
    with open("cut/logs/train_metrics.csv", "a", encoding="utf-8") as file:
        file.write("9,1.2")  # a row that the power cut tore
    Path("cut/results.json").unlink()
    assert launch("cut", *flags) == 0
    assert_same_run(Path("whole"), Path("cut"))


def test_another_cut_into_micro_batches_gives_the_same_run_to_rounding(launch):
    flags = ["--decay_steps=8", "--warmup_steps=2", "--amp=off"]
    assert launch("whole", *flags, "--batch_size=4") == 0
    assert launch("parts", *flags, "--batch_size=4", "--steps=4") == 0
    assert launch("parts", *flags, "--batch_size=1", "--grad_accum=4") == 0
    assert "--batch_size 4 -> 1, --grad_accum 1 -> 4" in log_text(Path("parts"))
    expected, found = rows(Path("whole"), "loss"), rows(Path("parts"), "loss")
    assert [float(x[0]) for x in found] == pytest.approx([float(x[0]) for x in expected], abs=1e-4)


def test_automatic_choices_are_kept(launch, monkeypatch):
    assert launch("run", "--steps=4", "--amp=auto") == 0
    first = torch.load("run/checkpoints/last.pt", weights_only=True)["config"]["amp"]
    monkeypatch.setattr(train, "choose_amp", lambda _device: ("fp16", "another machine"))
    assert launch("run", "--amp=auto") == 0
    assert torch.load("run/checkpoints/last.pt", weights_only=True)["config"]["amp"] == first != "fp16"
    assert f"Amp: {first} (as in the run so far)" in log_text(Path("run"))


def test_resume_never_keeps_the_old_run(launch):
    assert launch("run", "--steps=4") == 0
    before = Path("run/checkpoints/last.pt").read_bytes()
    assert launch("run", "--steps=4", "--resume=never", "--seed=2") == 0
    assert Path("run/earlier-1/checkpoints/last.pt").read_bytes() == before
    assert Path("run/checkpoints/last.pt").read_bytes() != before
    assert [row[0] for row in rows(Path("run"), "step")] == ["1", "2", "4"]


@pytest.mark.parametrize("resume", ["never", "auto"])
def test_no_run_is_overwritten_by_a_fresh_one(launch, resume):
    """Also what is left of it: here, as in a clone that has no checkpoints."""
    assert launch("run", "--steps=4") == 0
    train.shutil.rmtree("run/checkpoints")
    if resume == "never":
        Path("run/config.json").unlink()
        Path("run/results.json").unlink()
    kept = Path("run/samples/samples.txt").read_bytes()
    assert launch("run", "--steps=2", f"--resume={resume}") == 0
    assert Path("run/earlier-1/samples/samples.txt").read_bytes() == kept
    assert [row[0] for row in rows(Path("run"), "step")] == ["1", "2"]


def test_resume_from_a_path_into_another_directory(launch):
    assert launch("one", "--steps=4") == 0
    assert launch("two", "--resume", "one/checkpoints/last.pt") == 0
    assert [row[0] for row in rows(Path("two"), "step")] == ["6", "8"]
    assert [row[0] for row in rows(Path("one"), "step")] == ["1", "2", "4"]
    assert Path("two/checkpoints/best.pt").exists(), "its own best: the other run keeps the one it had"
    again = ("--resume", "one/checkpoints/last.pt", "--steps=12")
    assert launch("two", *again) == 0, "the same command goes on with the run it began"
    assert [row[0] for row in rows(Path("two"), "step")] == ["6", "8", "10", "12"]


def test_a_shortened_csv_is_cut_at_a_line_and_said(launch):
    assert launch("run", "--steps=4", "--decay_steps=8") == 0
    csv_file = Path("run/logs/train_metrics.csv")
    csv_file.write_bytes(csv_file.read_bytes()[:-20])
    assert launch("run", "--decay_steps=8") == 0
    assert [row[0] for row in rows(Path("run"), "step")] == ["1", "2", "6", "8"]


def test_damaged_json_of_a_run_stops_nobody(launch):
    assert launch("run", "--steps=4") == 0
    Path("run/config.json").write_text('{"launches": 5}', encoding="utf-8")
    Path("run/results.json").write_text("[", encoding="utf-8")
    assert launch("run") == 0
    Path("run/config.json").write_text('{"config": []}', encoding="utf-8")
    assert launch("run", "--resume=elsewhere/last.pt") == 2
    assert launch("run", "--steps=10") == 0
    assert len(json.loads(Path("run/config.json").read_text(encoding="utf-8"))["launches"]) == 1


def test_a_best_of_another_window_is_not_compared(launch):
    assert launch("run", "--lr=1e-6", "--target_window=1", "--steps=4") == 0
    assert launch("run", "--lr=1e-6", "--target_window=4", "--steps=8") == 0
    results = json.loads(Path("run/results.json").read_text(encoding="utf-8"))
    assert results["best_step"] == 8 and results["best_loss"] == results["window_loss"]


def test_target_zero_is_no_target(launch):
    assert not train.Progress(step=1, recent_losses=[0.0]).stop_reason(train.Config(target_loss=0, target_window=1))


def test_extreme_sampling_and_loss(launch):
    assert launch("run", "--temperature=1e-40", "--init_std=1", "--lr=10", "--min_lr=10", "--steps=4") == 0
    assert perplexity_of("run") is None or perplexity_of("run") > 1


def perplexity_of(run: str) -> float | None:
    return json.loads((Path(run) / "results.json").read_text(encoding="utf-8"))["perplexity"]


@pytest.mark.skipif(os.name == "nt", reason="RLIMIT_FSIZE is POSIX")
def test_a_write_that_fails_is_one_line_and_leaves_the_old_checkpoint(tmp_path, text_file):
    """A limit on file size stands in for a full disk: the second, longer run cannot write its larger files."""
    flags = [*TINY_FLAGS, "--input_file", text_file, "--out_dir", "run", "--amp=off"]
    assert run_script(*flags, "--steps=4", cwd=tmp_path).returncode == 0
    before = (tmp_path / "run/checkpoints/last.pt").read_bytes()
    code = (
        "import resource, signal, sys; signal.signal(signal.SIGXFSZ, signal.SIG_IGN); "
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, 1_000_000)); "
        f"sys.path.insert(0, {str(ROOT)!r}); import train; sys.exit(train.main(sys.argv[1:]))"
    )
    result = subprocess.run([sys.executable, "-c", code, *flags], cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 1 and result.stderr == ""
    assert "File too large" in result.stdout and "what was written before is intact" in result.stdout
    assert (tmp_path / "run/checkpoints/last.pt").read_bytes() == before
    assert not list(tmp_path.rglob("*.tmp"))


def test_a_reader_that_goes_away_stops_nobody(tmp_path, text_file):
    command = [sys.executable, ROOT / "train.py", *TINY_FLAGS, "--input_file", text_file, "--out_dir", "run"]
    process = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    process.stdout.readline()
    process.stdout.close()
    assert "Traceback" not in process.stderr.read()
    process.wait(timeout=100)
    assert log_text(tmp_path / "run").endswith("Training complete.\n")


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
@pytest.mark.skipif(os.name == "nt", reason="Windows delivers no POSIX signals")
def test_a_signal_finishes_the_step_saves_and_says_how_to_continue(tmp_path, text_file, number, code):
    command = [sys.executable, ROOT / "train.py", *TINY_FLAGS, "--input_file", text_file, "--out_dir", "run"]
    process = subprocess.Popen(
        [*command, "--steps=100000"], cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    metrics = tmp_path / "run/logs/train_metrics.csv"
    deadline = time.monotonic() + 60
    while not (metrics.exists() and metrics.read_bytes().count(b"\n") > 3) and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    assert process.returncode == code, err
    assert "Traceback" not in err
    step = torch.load(tmp_path / "run/checkpoints/last.pt", weights_only=True)["step"]
    assert f"after step {step}; the same command continues." in out
    assert err.strip() == "Finishing this step, then saving. Ctrl-C once more breaks off without saving."
    assert json.loads((tmp_path / "run/results.json").read_text(encoding="utf-8"))["stop_reason"] == "interrupted"


def test_a_run_that_diverges_exits_1_and_leaves_no_bad_checkpoint(launch, monkeypatch, capsys):
    monkeypatch.setattr(train, "MAX_SKIPPED_IN_A_ROW", 3)
    forward = train.GPT.forward
    calls = []

    def diverging(self, tokens, targets=None):
        calls.append(1)
        return forward(self, tokens, targets) * (float("inf") if len(calls) > 4 else 1.0)

    monkeypatch.setattr(train.GPT, "forward", diverging)
    assert launch("run", "--save_every=2") == 1
    assert "step 5 skipped" in log_text(Path("run"))
    assert "Training failed: loss or gradient was not finite in 3 steps in a row, the last being step 7" in log_text(
        Path("run")
    )
    assert torch.load("run/checkpoints/last.pt", weights_only=True)["step"] == 4, "none from inside the bad streak"
    assert json.loads(Path("run/results.json").read_text(encoding="utf-8"))["stop_reason"] == "failed"


def test_out_of_memory_is_one_line_with_a_remedy(launch, monkeypatch, capsys):
    def refuse(*_arguments):
        raise torch.OutOfMemoryError("tried to allocate 20 GiB")

    monkeypatch.setattr(train.GPT, "forward", refuse)
    assert launch("run") == 1
    assert "Out of memory: halve --batch_size and double --grad_accum" in log_text(Path("run"))


def test_a_compiler_that_fails_is_reported_and_done_without(launch, monkeypatch):
    def broken(_model):
        def forward(*_arguments):
            raise RuntimeError("Compiler: cl is not found.\nmore")

        return forward

    monkeypatch.setattr(torch, "compile", broken)
    assert launch("run", "--compile=on") == 0
    assert "torch.compile failed, going on without: RuntimeError: Compiler: cl is not found." in log_text(Path("run"))


@pytest.mark.skipif(train.shutil.which("g++") is None, reason="no C++ compiler")
def test_compiled_equals_eager(launch):
    """One model, with and without torch.compile, the losses to rounding; saved under the same names."""
    flags = ["--amp=off", "--lr=0.01", "--target_window=20"]
    assert launch("eager", *flags) == 0
    assert launch("compiled", *flags, "--compile=on") == 0
    assert "Compiled in" in log_text(Path("compiled"))
    expected, found = rows(Path("eager"), "loss"), rows(Path("compiled"), "loss")
    assert [float(x[0]) for x in found] == pytest.approx([float(x[0]) for x in expected], abs=1e-3)
    assert launch("again", *flags, "--compile=on", "--steps=4", "--decay_steps=8", "--warmup_steps=0") == 0
    assert launch("again", *flags, "--compile=on") == 0
    assert_same_run(Path("compiled"), Path("again"))
    assert weights(Path("eager/checkpoints/last.pt")).keys() == weights(Path("compiled/checkpoints/last.pt")).keys()


def test_a_target_below_the_floor_is_a_warning_with_the_way_out(launch):
    assert launch("run", "--steps=1", "--target_loss=0.001") == 0
    assert re.search(
        r"WARNING \| --target_loss 0\.001 is below the floor 0\.\d+: .* nor at any --seq_len up to 16",
        log_text(Path("run")),
    )


def test_importing_does_nothing(tmp_path):
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); import train, update_readme; print(train.log.handlers)"
    result = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert (result.returncode, result.stdout.strip(), result.stderr) == (0, "[]", "")
    assert list(tmp_path.iterdir()) == []
