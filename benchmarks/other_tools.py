"""What other tools make of an exported model, beside what train.py's own model says.

    python benchmarks/other_tools.py --record other-tools.json
    python benchmarks/other_tools.py --tools mlx-lm --exporter ../old/export_hf.py

Two small models are trained on the demo's text: one with GPT-2's vocabulary, and one with a
vocabulary of its own and a trained context of 64 of its 128 positions. Each tool answers in an
environment of its own (benchmarks/ask_tool.py), which is made in --work and kept there. Columns:

    ids                whether a passage as long as the context has the same token ids
    log_prob_off       largest difference of the log-probabilities of its tokens, in nats
    greedy             whether the greedy text is the same, up to the context
    bits_per_byte      of the held-out text; of train.py, what its run measured
    bits_per_byte_off  how far that is from what train.py's model gives in the same windows
"""

import json
import math
import shutil
import subprocess
import sys
import venv
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import tyro
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import sample
from benchmarks.record import write_record
from parts.run.directory import read_json
from parts.run.layout import RunPaths
from parts.text.files import demo_text

ROOT = Path(__file__).resolve().parents[1]
ASK = Path(__file__).with_name("ask_tool.py")
TORCH = f"torch=={torch.__version__.partition('+')[0]}"
TOOLS = {  # what pip installs: what goes with it
    "transformers==4.44.2": [TORCH],
    "transformers==4.46.3": [TORCH],
    "transformers==4.57.6": [TORCH],
    "transformers==5.0.0": [TORCH],
    "transformers": [TORCH],
    "ctranslate2": [TORCH, "transformers"],
    "optimum-onnx[onnxruntime]": [TORCH],
    "lm_eval[hf]": [TORCH],
    "mlx-lm": [TORCH, "mlx[cpu]"],
    "xllamacpp": [],
    "gpt4all": [],
    "node-llama-cpp": [],
}
READ_GGUF = ("xllamacpp", "gpt4all", "node-llama-cpp")
MODELS = {
    "gpt2": ["--tokenizer=gpt2", "--steps=400"],
    "bpe:300": ["--tokenizer=bpe:300", "--steps=600", "--seq_len=64"],
}
PROMPT = 5  # tokens


@dataclass(frozen=True)
class Options:
    """What to try."""

    record: Path | None = None
    """JSON file to write"""
    tools: tuple[str, ...] = tuple(TOOLS)
    """of those that this file knows"""
    exporter: Path = Path("export_hf.py")
    """the script that exports, seen from the project's folder; perhaps of an earlier checkout"""
    work: Path = Path("out/other-tools")
    """folder for models and environments, 10 GB for all tools"""


def run(*command: Path | str) -> None:
    """Raises RuntimeError with the last error, or else the last line, that the program wrote."""
    words = [str(part) for part in command]
    done = subprocess.run(words, capture_output=True, encoding="utf-8", errors="replace")
    if done.returncode:
        lines = (done.stderr or done.stdout).strip().splitlines()
        errors = [line for line in lines if "error" in line.lower()] or lines
        raise RuntimeError(errors[-1] if errors else f"exit code {done.returncode}")


def train_model(name: str, work: Path) -> Path:
    """The run directory of one of the `MODELS`; it is trained where it is not there yet."""
    folder = work / name.replace(":", "-")
    text = demo_text()
    cut = text.rindex("\n", 0, len(text) * 9 // 10) + 1
    folder.mkdir(parents=True, exist_ok=True)
    parts = {"text.txt": text[:cut], "heldout.txt": text[cut:]}
    for file, part in parts.items():
        (folder / file).write_text(part, encoding="utf-8", newline="\n")
    flags = [f"--input_file={folder / 'text.txt'}", f"--val_file={folder / 'heldout.txt'}"]
    flags += ["--preset=demo", "--max_tokens=8000", "--device=cpu", *MODELS[name]]
    flags += [f"--out_dir={folder / 'run'}"]
    run(sys.executable, ROOT / "train.py", *flags)
    return folder / "run"


def rolling_bits_per_byte(sampler: sample.Sampler, text: str) -> float:
    """Bits per byte of a text in windows of the context, as lm_eval cuts them: the first begins
    behind an end of a document, and the last is filled up with tokens that are measured already."""
    ids = [sampler.tokenizer.eot_token, *sampler.tokenizer.encode_ordinary(text)]
    nats = 0.0
    first = 0
    while first < len(ids) - 1:
        end = min(first + sampler.context, len(ids) - 1)
        begin = max(0, end - sampler.context)
        window = torch.tensor([ids[begin : end + 1]])
        with torch.no_grad():
            scores = sampler.model(window[:, :-1]).double().log_softmax(-1)
        chosen = scores.gather(2, window[:, 1:, None]).flatten()
        nats -= chosen[first - begin :].sum().item()
        first = end
    return nats / math.log(2) / len(text.encode())


def own_answer(run_dir: Path) -> tuple[dict, dict]:
    """The question for all tools, and what train.py's model says."""
    sampler = sample.Sampler(RunPaths(run_dir).best, "cpu", "off")
    sampler.model.eval()
    text = (run_dir.parent / "text.txt").read_text(encoding="utf-8")
    heldout = (run_dir.parent / "heldout.txt").read_text(encoding="utf-8")
    tokenizer = sampler.tokenizer
    passage = tokenizer.decode(tokenizer.encode_ordinary(text)[: sampler.context])
    ids = tokenizer.encode_ordinary(passage)
    with torch.no_grad():
        scores = sampler.model(torch.tensor([ids[:-1]]))[0].double().log_softmax(-1)
    log_probs = scores.gather(1, torch.tensor(ids[1:])[:, None])[:, 0].tolist()
    prompt = tokenizer.decode(ids[:PROMPT])
    n_new = sampler.context - PROMPT
    options = sample.Options(temperature=0.0, max_new_tokens=n_new)
    question = {"passage": passage, "prompt": prompt, "n_new": n_new}
    answer = {
        "ids": ids,
        "log_probs": log_probs,
        "greedy": prompt + "".join(sampler.stream(prompt, options)),
        "bits_per_byte": rolling_bits_per_byte(sampler, heldout),
    }
    return question | {"context": sampler.context, "heldout": heldout}, answer


def asker(tool: str, work: Path) -> list[Path | str]:
    """The command that asks a tool, in its environment, which is made where it is not there yet."""
    package = tool.partition("=")[0].partition("[")[0]
    folder = work / "environments" / tool.partition("[")[0].replace("==", "-")
    installed = folder / "installed.txt"
    if package == "node-llama-cpp":
        folder.mkdir(parents=True, exist_ok=True)
        npm = shutil.which("npm") or "npm"  # npm.cmd on Windows
        install: list[Path | str] = [npm, "install", "--prefix", folder, tool]
        ask: list[Path | str] = ["node", ASK.with_suffix(".mjs"), folder]
    else:
        python = folder / ("Scripts/python.exe" if sys.platform == "win32" else "bin/python")
        if not python.exists():
            venv.create(folder, with_pip=True)
        install = [python, "-m", "pip", "install", "-q", tool, *TOOLS[tool]]
        ask = [python, ASK, package]
    if not installed.exists():
        run(*install)
        installed.write_text(f"{tool}\n", encoding="utf-8")
    return ask


def compare(answer: dict, own: dict) -> dict:
    """How far a tool's answer is from ours."""
    row: dict = {"version": answer["version"]}
    if "ids" in answer:
        row["ids"] = "equal" if answer["ids"] == own["ids"] else "differ"
    if "log_probs" in answer:
        pairs = zip(answer["log_probs"], own["log_probs"], strict=False)
        row["log_prob_off"] = max(abs(a - b) for a, b in pairs)
    if "greedy" in answer:
        row["greedy"] = "equal" if answer["greedy"] == own["greedy"] else "differs"
    if "bits_per_byte" in answer:
        row["bits_per_byte"] = answer["bits_per_byte"]
        row["bits_per_byte_off"] = abs(answer["bits_per_byte"] - own["bits_per_byte"])
    return row


def main() -> None:
    options = tyro.cli(Options, description=__doc__)
    work = options.work.resolve()
    rows = []
    for name in MODELS:
        run_dir = train_model(name, work)
        question, own = own_answer(run_dir)
        asked = run_dir.parent / "question.json"
        answered = run_dir.parent / "answer.json"
        asked.write_text(json.dumps(question), encoding="utf-8")
        folder = run_dir.parent / "exported"
        gguf = run_dir.parent / "exported.gguf"
        for out in (folder, gguf):
            if out.is_dir():
                shutil.rmtree(out)
            out.unlink(missing_ok=True)
            exporter = ROOT / options.exporter
            run(sys.executable, exporter, f"--checkpoint={run_dir}", f"--out={out}")
        measured = read_json(RunPaths(run_dir).results_json)["best_bits_per_byte"]
        rows.append({"tool": "train.py", "model": name, "bits_per_byte": measured})
        for tool in tqdm(options.tools, unit="tool", disable=None):
            model = gguf if tool in READ_GGUF else folder
            row = {"tool": tool, "model": name}
            try:
                run(*asker(tool, work), model, asked, answered)
                answer = json.loads(answered.read_text(encoding="utf-8"))
                rows.append(row | compare(answer, own))
            except RuntimeError as error:
                rows.append(row | {"problem": str(error)})
    write_record(options.record, __file__, rows, asdict(options))


if __name__ == "__main__":
    main()
