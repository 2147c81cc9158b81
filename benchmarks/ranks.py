"""What sharing a step between processes costs: measured steps of 1 and 2 gloo ranks, and what
arithmetic predicts.

    python benchmarks/ranks.py --record ranks.json

Predicted is the time of the same share of slices on as many busy processes that do not talk, and
the time that the gradients take at the bandwidth found by averaging one large tensor: a rank sends
and receives 2 (N - 1) / N of all gradient bytes, in fp32, after its last micro-batch and before its
update.
"""

import json
import statistics
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import tyro

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import train
from benchmarks.record import write_record
from parts.commandline import parse_config
from parts.compute.device import choose_runtime, configure_torch
from parts.compute.ranks import Ranks
from parts.text.corpus import load_corpus
from parts.text.vocabulary import load_tokenizer


@dataclass(frozen=True)
class Options:
    """What to measure."""

    record: Path | None = None
    """JSON file to write"""
    preset: str = "gpt2"
    slices: int = 16
    """of 128 tokens in a step"""
    ranks: int = 2
    steps: int = 7
    """timed, after one that is not"""
    input_file: Path = Path("data/input.txt")


def one_process(options: Options, slices: int) -> None:
    """Seconds of each step, and bytes per second of averaging (0 alone), printed by rank 0."""
    ranks = Ranks.join()
    flags = [
        "--optimizer=adamw",
        "--compile=off",
        "--threads=1",
        f"--input_file={options.input_file}",
    ]
    config = parse_config(
        [f"--preset={options.preset}", f"--batch_size={slices}", *flags], processes=ranks.count
    )
    config = choose_runtime(config, None)
    configure_torch(config)
    trainer = train.Trainer(config, load_corpus(config, load_tokenizer()), None, ranks)
    seconds = []
    for _ in range(options.steps + 1):
        started = time.perf_counter()
        trainer.update()
        seconds.append(time.perf_counter() - started)
    probe, rates = torch.ones(2**25), []
    for _ in range(4):
        started = time.perf_counter()
        ranks.average([probe])
        sent = 2 * (ranks.count - 1) / ranks.count * probe.numel() * 4
        rates.append(sent / (time.perf_counter() - started))
    if ranks.rank == 0:
        print(json.dumps([seconds[1:], statistics.median(rates), config.n_params]), flush=True)
    ranks.end(0)


def run(
    command: list[str], options: Options, slices: int, copies: int = 1
) -> tuple[list[float], float, int]:
    """The answer of the first of so many processes at once."""
    values = json.dumps(asdict(options), default=str)
    commands = [[*command, __file__, "--serve", values, str(slices)]] * copies
    processes = [subprocess.Popen(one, stdout=subprocess.PIPE, text=True) for one in commands]
    answers = [process.communicate()[0] for process in processes]
    return json.loads(answers[0])


def main() -> None:
    if sys.argv[1:2] == ["--serve"]:
        values = json.loads(sys.argv[2])
        return one_process(
            Options(**values | {"input_file": Path(values["input_file"])}), int(sys.argv[3])
        )
    options = tyro.cli(Options, description=__doc__)
    python, count = [sys.executable], options.ranks
    torchrun = [*python, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={count}"]
    alone, _, n_params = run(python, options, options.slices)
    apart, _, _ = run(python, options, options.slices // count, copies=count)
    shared, rate, _ = run(torchrun, options, options.slices)
    traffic = 2 * (count - 1) / count * 4 * n_params / rate
    rows = []
    for name, seconds, predicted in (
        ("1 rank, 1 thread", alone, None),
        (f"{count} processes that do not talk, 1/{count} of the slices each", apart, None),
        (f"{count} ranks, 1 thread each", shared, statistics.median(apart) + traffic),
    ):
        rows.append(
            {
                "way": name,
                "step_sec": round(statistics.median(seconds), 2),
                "least": round(min(seconds), 2),
                "most": round(max(seconds), 2),
                "n": len(seconds),
                "predicted_sec": predicted and round(predicted, 2),
                "gb_per_sec": round(rate / 1e9, 2),
                "gradients_gb": round(4 * n_params / 1e9, 2),
            }
        )
    write_record(options.record, __file__, rows, asdict(options))


if __name__ == "__main__":
    main()
