"""Continue a prompt with a checkpoint of train.py: text to stdout as it comes, everything else to stderr.

    python sample.py                                    # the newest run in out/; asks for prompts, Ctrl-D ends
    python sample.py --checkpoint out/gpt2 --prompt "BIANCA:\\n"
    python sample.py --checkpoint out/gpt2/checkpoints/last.pt --prompt_file scene.txt --num_samples 3 > scenes.txt

The checkpoint knows its model, its vocabulary and the context it was trained on. The same seed gives the same text.
"""

import os
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from parts.start import packages_of

with packages_of("sample.py", __name__):
    from typing import Annotated  # not in Python 3.8, of which parts/start.py tells

    import numpy as np
    import torch

    import train
    from parts.commandline import decode_escapes, read_flags
    from parts.compute.device import (
        autocast,
        choose_amp,
        choose_device,
        complaints,
        device_problem,
        for_sampling,
        make_current,
    )
    from parts.flags import Amp, Between, Config, out_of_range
    from parts.run.checkpoint import checkpoint_in, load_checkpoint, newest_run
    from parts.run.screen import log, speaking
    from parts.text.vocabulary import (
        Tokenizer,
        encode_prompt,
        pieces,
        read_text,
        saved_tokenizer,
        whole_characters,
    )

SEPARATOR = "=" * 80
GRAM = 8  # tokens whose order is looked up in the corpus


@dataclass(frozen=True)
class Options:
    """Flags of the command line."""

    checkpoint: Path | None = None
    """run directory, for its best.pt, or a checkpoint; by default the run in out/ whose checkpoints changed last"""
    prompt: str | None = None
    """text to continue; \\n, \\t, \\\\ and \\uXXXX are decoded, and <|endoftext|> begins a document; by default from
    --prompt_file, from stdin, or asked for"""
    prompt_file: Path | None = None
    """UTF-8 file with the text to continue; from it, and from stdin, one newline at the end is left out"""
    num_samples: Annotated[int, Between(1, 10_000)] = 1
    """texts to write for each prompt"""
    max_new_tokens: Annotated[int, Between(1, 1_000_000)] = 200
    """tokens added to the prompt, at most"""
    keep_going: bool = False
    """go on where the model ends a document, which it was taught by several texts"""
    temperature: Annotated[float, Between(0, 100)] = 0.9
    """divides the logits before sampling; 0: always the likeliest token"""
    top_k: Annotated[int, Between(0, 10**6)] = 50
    """sample among the k likeliest tokens; 0: among all"""
    top_p: Annotated[float, Between(1e-6, 1)] = 1.0
    """sample among the likeliest tokens that make up this probability"""
    seed: Annotated[int, Between(0, 2**63 - 1)] = 1337
    """of the samples; each has a stream of its own"""
    device: str = "auto"
    """auto, cpu, cuda, cuda:N or mps"""
    amp: Amp = "auto"
    """precision of matrix products"""
    novelty: Path | None = None
    """text to look for copied passages in, such as the one trained on"""


class Sampler:
    """A checkpoint ready to continue prompts. Raises OSError or ValueError for a file that is none."""

    def __init__(self, path: Path, device: str = "auto", amp: Amp = "auto"):
        checkpoint = load_checkpoint(path, "--checkpoint")
        self.tokenizer = saved_tokenizer(checkpoint)
        config = Config.from_dict(checkpoint["config"])
        config = replace(config, device=choose_device()[0] if device == "auto" else device)
        if problem := device_problem(config.device):
            raise ValueError(problem)
        make_current(config.device)
        amp = choose_amp(config.device)[0] if amp == "auto" else amp
        self.config = replace(config, amp=amp)
        self.context = checkpoint["trained_context"]
        self.model = train.GPT(self.config)
        self.model.load_state_dict(checkpoint["model"])
        self.model.to(self.config.device)

    def stream(self, prompt: str, options: Options, number: int = 0) -> Iterator[str]:
        """A piece of text for each token of one continuation, as they come; `number` chooses the sample's own random
        stream. Without --keep_going it ends where a document does, as the exported model."""
        start = encode_prompt(prompt or "\n", self.tokenizer)
        end = -1 if options.keep_going else self.tokenizer.eot_token
        seeds = train.random_words(options.seed, train.SAMPLES_STREAM, number + 1)
        generator = torch.Generator().manual_seed(int(seeds[number]))
        steps = train.continuations(
            self.model, [start], options.max_new_tokens, context=self.context, temperature=options.temperature,
            top_k=options.top_k, top_p=options.top_p, end=end, generators=[generator],
        )  # fmt: skip
        one_at_a_time = len(start) + options.max_new_tokens <= self.context
        with autocast(for_sampling(self.config, one_at_a_time)):
            yield from whole_characters(
                self.tokenizer, (token for (token,) in steps if token != end)
            )


class Corpus:
    """A text to look for copied passages in."""

    def __init__(self, text: str, tokenizer: Tokenizer):
        self.text, self.tokenizer = text, tokenizer
        self.grams = self.grams_of(text)

    def grams_of(self, text: str) -> set[bytes]:
        """All runs of `GRAM` tokens."""
        ids = np.array(self.tokenizer.encode_ordinary(text), dtype=np.uint32)
        return {ids[i : i + GRAM].tobytes() for i in range(len(ids) - GRAM + 1)}

    def longest_copy(self, text: str) -> str:
        """The longest passage of the text that stands here as well."""
        longest, start = "", 0
        for end in range(1, len(text) + 1):
            while text[start:end] not in self.text:
                start += 1
            longest = max(longest, text[start:end], key=len)
        return longest

    def share_copied(self, text: str) -> float:
        """Of the text's grams, the part that stands here as well."""
        grams = self.grams_of(text)
        return len(grams & self.grams) / max(1, len(grams))


def find_checkpoint(asked: Path | None) -> Path:
    """The checkpoint that is asked for, or that of the newest run; says which where that is open.

    Raises FileNotFoundError.
    """
    if (path := newest_run(Path("out")) if asked is None else asked) is None:
        raise FileNotFoundError(
            "no run in out/ has a checkpoint: train one with python train.py --preset demo, or name one with "
            "--checkpoint"
        )
    if (found := checkpoint_in(path, "--checkpoint")) != asked:
        tell(f"[checkpoint: {found}]")
    return found


def prompts(options: Options) -> Iterator[str]:
    """What to continue: from the flags, from stdin, or asked for on a terminal until it is closed."""
    if options.prompt is not None:
        yield decode_escapes(options.prompt)
    elif options.prompt_file is not None:
        yield without_newline(read_text(options.prompt_file, "--prompt_file")[0])
    elif not sys.stdin.isatty():
        yield without_newline("".join(pieces(sys.stdin.buffer, "the prompt from stdin")))
    else:
        tell(f"(Ctrl-{'Z and Enter' if os.name == 'nt' else 'D'} ends)")
        while True:
            tell("prompt> ", end="")
            if not (line := sys.stdin.readline()):
                return
            yield decode_escapes(without_newline(line))


def without_newline(text: str) -> str:
    """Without the line end that editors and `echo` leave."""
    return text.removesuffix("\n").removesuffix("\r")


def tell(line: str = "", end: str = "\n") -> None:
    """Write to stderr, unless that is closed: only text goes to stdout."""
    if sys.stderr is not sys.stdout:
        print(line, end=end, file=sys.stderr, flush=True)


def run(options: Options) -> None:
    """Write the samples. Raises OSError or ValueError."""
    problems = out_of_range(options)
    if options.prompt is not None and options.prompt_file is not None:
        problems.append("--prompt and --prompt_file are two prompts: choose one")
    if problems:
        raise ValueError("\n".join(problems))
    text = None if options.novelty is None else read_text(options.novelty, "--novelty")[0]
    sampler = Sampler(find_checkpoint(options.checkpoint), options.device, options.amp)
    corpus = None if text is None else Corpus(text, sampler.tokenizer)
    for prompt in prompts(options):
        for number in range(options.num_samples):
            if number:
                print(SEPARATOR)
            print(prompt, end="", flush=True)
            started, pieces = time.perf_counter(), []
            for piece in sampler.stream(prompt, options, number):
                pieces.append(piece)
                print(piece, end="", flush=True)
            seconds = time.perf_counter() - started
            print(flush=True)
            ended = ", the end of a document" if len(pieces) < options.max_new_tokens else ""
            tell(f"[{len(pieces)} tokens, {len(pieces) / seconds:.1f} tok/s{ended}]")
            if corpus is not None:
                added = "".join(pieces)
                copied = corpus.longest_copy(added)
                tell(
                    f"[of what was added, {corpus.share_copied(added):.0%} of the {GRAM}-grams of tokens are in "
                    f"{options.novelty}; longest passage copied from it: {len(copied)} of {len(added)} characters: "
                    f"{copied[:200]!r}{'...' * (len(copied) > 200)}]"
                )


@speaking("sample.py", encoding="utf-8")
def main(argv: list[str] | None = None) -> int:
    """The command line. Returns 0, 2 for bad input, 130 after Ctrl-C."""
    try:
        run(read_flags(Options, sys.argv[1:] if argv is None else argv, "sample.py", __doc__))
    except SystemExit as answered:  # after --help
        return int(answered.code or 0)
    except BrokenPipeError:  # whoever read the text has enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    except Exception as error:
        log.error("\n".join(complaints(error)))
        return 2
    except KeyboardInterrupt:
        tell()
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
