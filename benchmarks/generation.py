"""Text generation with GPT-2 124M: train.py's `generate` beside Hugging Face's, with its cache, and
nanoGPT's.

    python benchmarks/generation.py --record generation.json --nanogpt ../nanoGPT

Random weights of the initialisation; greedy; one prompt of 16 tokens; the programs take turns in
one process. Hugging Face in fp16, which is very slow on a CPU, is given two rounds.
"""

import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import tyro
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from dataclasses import replace

import train
from benchmarks.record import write_record
from parts.compute.device import autocast, choose_runtime, configure_torch
from parts.flags import VOCAB_SIZE
from parts.recipe import decide


@dataclass(frozen=True)
class Options:
    """What to measure."""

    record: Path | None = None
    """JSON file to write"""
    nanogpt: Path | None = None
    """checkout of karpathy/nanoGPT"""
    new_tokens: int = 256
    rounds: int = 5
    device: str = "auto"
    """auto, cpu or cuda"""


def main() -> None:
    options = tyro.cli(Options, description=__doc__)
    config = choose_runtime(decide(dict(device=options.device, compile="off")), None)
    configure_torch(config)
    model, prompt = train.GPT(config).to(config.device), list(range(1000, 1016))

    def ours() -> None:
        answer = train.generate(
            model,
            [prompt],
            options.new_tokens,
            context=config.block_size,
            temperature=0.0,
            top_k=0,
            generators=[torch.Generator()],
        )
        assert len(answer[0]) == len(prompt) + options.new_tokens

    programs: dict[str, Callable[[], object]] = {"train.py": ours}

    from transformers import GPT2Config, GPT2LMHeadModel

    peer = (
        GPT2LMHeadModel(GPT2Config(eos_token_id=None, bos_token_id=None, pad_token_id=0))
        .to(config.device)
        .eval()
    )
    tokens = torch.tensor([prompt], device=config.device)

    def hugging_face() -> None:
        answer = peer.generate(
            tokens,
            attention_mask=torch.ones_like(tokens),
            max_new_tokens=options.new_tokens,
            do_sample=False,
            use_cache=True,
        )
        assert answer.shape[1] == len(prompt) + options.new_tokens

    programs["Hugging Face, cached"] = hugging_face
    if options.nanogpt:
        sys.path.insert(0, str(options.nanogpt))
        from model import GPT, GPTConfig

        nano = (
            GPT(GPTConfig(vocab_size=VOCAB_SIZE, bias=True, dropout=0.0)).to(config.device).eval()
        )
        programs["nanoGPT"] = lambda: nano.generate(tokens, options.new_tokens, top_k=1)

    def timed(program: Callable[[], object], precision: str) -> float:
        started = time.perf_counter()
        with autocast(replace(config, amp=precision)):
            program()
        if config.device.startswith("cuda"):
            torch.cuda.synchronize()
        return options.new_tokens / (time.perf_counter() - started)

    precisions = ["off", "bf16", "fp16"]
    rates: dict[tuple[str, str], list[float]] = {(n, p): [] for n in programs for p in precisions}
    rates.pop(("nanoGPT", "fp16"), None)
    for number in tqdm(range(options.rounds + 1), desc="rounds"):
        for (name, precision), found in rates.items():
            slow = (name, precision) == ("Hugging Face, cached", "fp16") and number not in (1, 2)
            if slow or (name == "nanoGPT" and number == 0):
                continue
            rate = timed(programs[name], precision)
            if number:  # the first is warm-up
                found.append(rate)
    fastest = {
        name: max(statistics.median(found) for (n, _), found in rates.items() if n == name)
        for name in programs
    }
    rows = []
    for (name, precision), found in rates.items():
        same = statistics.median(rates["train.py", precision])
        rows.append(
            {
                "program": name,
                "precision": "fp32" if precision == "off" else precision,
                "n": len(found),
                "tokens_per_sec": round(statistics.median(found), 1),
                "least": round(min(found), 1),
                "most": round(max(found), 1),
                "train.py is faster by": round(same / statistics.median(found), 2),
                "fastest against fastest": round(fastest["train.py"] / fastest[name], 2),
            }
        )
    write_record(options.record, __file__, rows, asdict(options))


if __name__ == "__main__":
    main()
