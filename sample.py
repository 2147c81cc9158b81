"""Continue a prompt with a checkpoint of train.py: text to stdout, everything else to stderr.

    python sample.py                                # the newest run in out/; asks for prompts
    python sample.py --checkpoint out/gpt2 --prompt "BIANCA:\\n"
    python sample.py --checkpoint out/gpt2/checkpoints/last.pt --prompt_file scene.txt > more.txt

The checkpoint knows its model, its vocabulary and the context it was trained on. The same seed
gives the same text.
"""

import os
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from parts.startup import packages_of

with packages_of("sample.py", __name__):
    from typing import Annotated, Any  # not in Python 3.8, of which parts/startup.py tells

    import torch

    import train
    from parts.commandline import decode_escapes, read_flags
    from parts.compute import device
    from parts.flags import DEMO_CORPUS, Amp, Between, Config, out_of_range
    from parts.run.checkpoint import checkpoint_in, load_checkpoint, newest_run
    from parts.run.screen import log, say, speaking
    from parts.text import vocabulary
    from parts.text.files import demo_text, read_pieces, read_text

SEPARATOR = "=" * 80
GRAM = 8  # tokens whose order is looked up in the corpus


@dataclass(frozen=True)
class Options:
    """Flags of the command line."""

    checkpoint: Path | None = None
    """run directory, for its best.pt, or a checkpoint; by default the newest run in out/"""
    prompt: str | None = None
    """text to continue; \\n, \\t, \\\\ and \\uXXXX are decoded, <|endoftext|> begins a document; by
    default from --prompt_file, from stdin, or asked for"""
    prompt_file: Path | None = None
    """UTF-8 file with the text to continue; of it and of stdin a newline at the end is left out"""
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
    """text to look for copied passages in, such as the one trained on; pydoc_data.topics: the
    demo's"""


class Sampler:
    """A checkpoint ready to continue prompts. Raises OSError or ValueError for another file."""

    def __init__(self, path: Path, where: str = "auto", amp: Amp = "auto"):
        checkpoint = load_checkpoint(path, "--checkpoint")
        self.tokenizer = vocabulary.saved_tokenizer(checkpoint)
        config = Config.from_dict(checkpoint["config"])
        asked = replace(config, device=where, amp=amp, processes=1)
        self.config = device.choose_runtime(asked, previous=None)
        self.context = checkpoint["trained_context"]
        self.model = train.GPT(self.config)
        self.model.load_state_dict(checkpoint["model"])
        self.model.to(self.config.device)

    def stream(self, prompt: str, options: Options, number: int = 0) -> Iterator[str]:
        """A piece of text for each token of one continuation; `number` chooses its random stream.
        It ends where a document does, as the exported model's, unless --keep_going is given."""
        o = options
        start = vocabulary.encode_prompt(prompt or "\n", self.tokenizer)
        end = -1 if o.keep_going else self.tokenizer.eot_token
        seeds = train.random_words(o.seed, train.SAMPLES_STREAM, number + 1)
        generators = [torch.Generator().manual_seed(int(seeds[number]))]
        choice: dict[str, Any] = dict(temperature=o.temperature, top_k=o.top_k, top_p=o.top_p)
        choice |= dict(context=self.context, end=end, generators=generators)
        steps = train.continuations(self.model, [start], o.max_new_tokens, **choice)
        tokens = (token for (token,) in steps if token != end)
        one_at_a_time = len(start) + o.max_new_tokens <= self.context
        with device.autocast(device.for_sampling(self.config, one_at_a_time)):
            yield from vocabulary.whole_characters(self.tokenizer, tokens)


class Novelty:
    """A text to look for copied passages in."""

    def __init__(self, path: Path, tokenizer: vocabulary.Tokenizer):
        self.path = path
        self.tokenizer = tokenizer
        self.text = demo_text() if path == DEMO_CORPUS else read_text(path, "--novelty")
        self.grams = self.grams_of(self.text)

    def grams_of(self, text: str) -> set[bytes]:
        """All runs of `GRAM` tokens."""
        ids = vocabulary.encode(text, self.tokenizer)
        return {ids[i : i + GRAM].tobytes() for i in range(len(ids) - GRAM + 1)}

    def longest_copy(self, added: str) -> str:
        """The longest passage that stands in the text as well."""
        longest, start = "", 0
        for end in range(1, len(added) + 1):
            while added[start:end] not in self.text:
                start += 1
            longest = max(longest, added[start:end], key=len)
        return longest

    def report(self, added: str) -> str:
        """How much of what was added is copied from the text."""
        grams = self.grams_of(added)
        share = len(grams & self.grams) / max(1, len(grams))
        copied = self.longest_copy(added)
        shown = f"{copied[:200]!r}..." if len(copied) > 200 else repr(copied)
        return (
            f"[{share:.0%} of the {GRAM}-grams of tokens that were added are in {self.path}; "
            f"longest passage copied: {len(copied)} of {len(added)} characters: {shown}]"
        )


def find_checkpoint(asked: Path | None) -> Path:
    """The checkpoint that is asked for, or that of the newest run; named where it was chosen here.
    Raises FileNotFoundError."""
    path = asked or newest_run(Path("out"))
    if path is None:
        remedy = "train one with python train.py --preset demo, or name one with --checkpoint"
        raise FileNotFoundError(f"no run in out/ has a checkpoint: {remedy}")
    found = checkpoint_in(path, "--checkpoint")
    if found != asked:
        tell(f"[checkpoint: {found}]")
    return found


def prompts(options: Options) -> Iterator[str]:
    """What to continue: from the flags, from stdin, or asked for until the terminal closes it."""
    if options.prompt is not None:
        yield decode_escapes(options.prompt)
    elif options.prompt_file is not None:
        yield without_newline(read_text(options.prompt_file, "--prompt_file"))
    elif not sys.stdin.isatty():
        yield without_newline("".join(read_pieces(sys.stdin.buffer, "the prompt from stdin")))
    else:
        tell(f"({'Ctrl-Z and Enter' if os.name == 'nt' else 'Ctrl-D'} ends)")
        tell("prompt> ", end="")
        for line in sys.stdin:
            yield decode_escapes(without_newline(line))
            tell("prompt> ", end="")


def without_newline(text: str) -> str:
    """Without the line end that editors and `echo` leave."""
    return text.removesuffix("\n").removesuffix("\r")


def tell(line: str = "", end: str = "\n") -> None:
    """Write to stderr, unless that is closed: only text goes to stdout."""
    if sys.stderr is not sys.stdout:
        print(line, end=end, file=sys.stderr, flush=True)


def write(text: str) -> None:
    """Write to stdout. Raises BrokenPipeError when nobody reads it any more."""
    if not say(text, end=""):
        raise BrokenPipeError


def run(options: Options) -> None:
    """Write the samples. Raises OSError or ValueError."""
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(newline="\n")  # or Windows would double a text's own \r\n
    problems = out_of_range(options)
    if options.prompt is not None and options.prompt_file is not None:
        problems.append("--prompt and --prompt_file are two prompts: choose one")
    if problems:
        raise ValueError("\n".join(problems))
    sampler = Sampler(find_checkpoint(options.checkpoint), options.device, options.amp)
    novelty = Novelty(options.novelty, sampler.tokenizer) if options.novelty else None
    for prompt in prompts(options):
        for number in range(options.num_samples):
            if number:
                write(f"{SEPARATOR}\n")
            write(prompt)
            started = time.perf_counter()
            pieces = []
            for piece in sampler.stream(prompt, options, number):
                pieces.append(piece)
                write(piece)
            speed = len(pieces) / (time.perf_counter() - started)
            write("\n")
            ended = ", the end of a document" if len(pieces) < options.max_new_tokens else ""
            tell(f"[{len(pieces)} tokens, {speed:.1f} tok/s{ended}]")
            if novelty:
                tell(novelty.report("".join(pieces)))


@speaking("sample.py", encoding="utf-8")
def main(argv: list[str] | None = None) -> int:
    """The command line. Returns 0, 2 for bad input, 130 after Ctrl-C."""
    try:
        run(read_flags(Options, sys.argv[1:] if argv is None else argv, "sample.py", __doc__))
    except BrokenPipeError:  # whoever read the text has enough
        return 0
    except Exception as error:
        log.error("\n".join(device.complaints(error)))
        return 2
    except KeyboardInterrupt:
        tell()
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
