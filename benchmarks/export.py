"""export_hf.py at the size of every preset: time, memory, and whether the same model comes out and
comes back.

    python benchmarks/export.py --record export.json

Each preset gets fresh weights and goes, every stage in a process of its own, through `export_hf.py
--checkpoint`, then transformers (logits of 64 random tokens and 16 greedy ones beside those of
train.py, in fp32), then `--from_hf`. Differences are in units of the logits' own standard
deviation.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import tyro
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from dataclasses import replace

import export_hf
import sample
import train
from benchmarks.record import write_record
from benchmarks.throughput import peak_rss_mb
from parts.commandline import parse_config
from parts.flags import PRESETS
from parts.run.checkpoint import load_checkpoint, write_checkpoint
from parts.text.corpus import Corpus

os.environ["HF_HUB_OFFLINE"] = "1"


@dataclass(frozen=True)
class Options:
    """What to measure."""

    record: Path | None = None
    """JSON file to write"""
    presets: tuple[str, ...] = tuple(PRESETS)
    """the largest needs 12 GB of memory and 25 GB of disk"""
    work: Path | None = None
    """folder for the models; None: a temporary one"""


def tokens_of(vocab_size: int) -> torch.Tensor:
    """Some token ids, (1, 64)."""
    return torch.randint(vocab_size, (1, 64), generator=torch.Generator().manual_seed(0))


def make(preset: str) -> None:
    """A checkpoint of weights alone, with fresh ones."""
    config = replace(parse_config([f"--preset={preset}"]), device="cpu")
    corpus = Corpus(tokens_of(config.vocab_size)[0].numpy(), "", 64)
    trainer = train.Trainer(replace(config, micro_batch=1), corpus, None)
    checkpoint = trainer.description() | {"step": 0, "model": trainer.model.state_dict()}
    write_checkpoint(Path("best.pt"), checkpoint)


def ours() -> None:
    """Logits and greedy tokens of train.py's model."""
    sampler = sample.Sampler(Path("best.pt"), "cpu", "off")
    tokens = tokens_of(sampler.config.vocab_size)
    options = dict(
        context=sampler.context, temperature=0.0, top_k=0, generators=[torch.Generator()]
    )
    with torch.no_grad():
        greedy = train.generate(sampler.model, tokens[:, :16].tolist(), 16, **options)
        torch.save([sampler.model(tokens), greedy], "ours.pt")


def theirs() -> dict:
    """How far transformers' logits are from ours, and whether its greedy tokens are the same."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained("hf").eval()
    tokens, (logits, greedy) = tokens_of(model.config.vocab_size), torch.load("ours.pt")
    with torch.no_grad():
        difference = (model(tokens).logits - logits).abs().max() / logits.std()
        options = dict(
            attention_mask=torch.ones(1, 16), do_sample=False, max_length=None, max_new_tokens=16
        )
        found = model.generate(tokens[:, :16], **options)
    return {"largest_difference": difference.item(), "same_greedy": found.tolist() == greedy}


def back() -> dict:
    """Whether the weights that come back are the same, bit for bit; positions that were trained."""
    before, after = (load_checkpoint(Path(name))["model"] for name in ("best.pt", "back.pt"))
    before["wpe.weight"] = before["wpe.weight"][: len(after["wpe.weight"])]
    return {
        "same_weights": before.keys() == after.keys()
        and all(torch.equal(before[k], after[k]) for k in before)
    }


def stage(name: str, *arguments: str) -> None:
    """In a process of its own: do one stage, print seconds, the peak of its memory in GB, and what
    it found."""
    before = time.perf_counter()
    stages = {"make": make, "ours": ours, "theirs": theirs, "back": back, "export": export_hf.main}
    found = stages[name](list(arguments)) if name == "export" else stages[name](*arguments)
    answer = [time.perf_counter() - before, peak_rss_mb() / 1000, found]
    print(json.dumps(answer))


def main() -> None:
    if sys.argv[1:2] == ["--stage"]:
        return stage(*sys.argv[2:])
    options = tyro.cli(Options, description=__doc__)
    rows = []
    for preset in tqdm(options.presets, unit="preset"):
        with tempfile.TemporaryDirectory(dir=options.work) as folder:

            def run(*stage: str, folder: str = folder) -> tuple[float, float, dict | int | None]:
                command = [sys.executable, Path(__file__).resolve(), "--stage", *stage]
                answer = subprocess.run(
                    command, cwd=folder, stdout=subprocess.PIPE, text=True, check=True
                ).stdout
                return json.loads(answer.splitlines()[-1])

            run("make", preset)
            run("ours")
            seconds, memory, code = run("export", "--checkpoint=best.pt", "--out=hf")
            found = run("theirs")[2]
            back_seconds, back_memory, back_code = run("export", "--from_hf=hf", "--out=back.pt")
            if code or back_code:
                raise SystemExit(f"export_hf.py failed on {preset}")
            rows.append(
                {
                    "preset": preset,
                    "parameters": parse_config([f"--preset={preset}"]).n_params,
                    "folder_gb": round(
                        sum(path.stat().st_size for path in Path(folder, "hf").iterdir()) / 1e9, 2
                    ),
                    "export_sec": round(seconds, 1),
                    "export_peak_gb": round(memory, 1),
                    **found,
                    "import_sec": round(back_seconds, 1),
                    "import_peak_gb": round(back_memory, 1),
                    **run("back")[2],
                }
            )
    write_record(options.record, __file__, rows, asdict(options))


if __name__ == "__main__":
    main()
