"""The run as TensorBoard shows it: each step once, however it ended, and from its first step on."""

import io
import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from parts.flags import Config, text_names
from parts.progress import StopReason
from parts.run.directory import RunDir, append_whole, read_json
from parts.run.layout import csv_rows, sample_blocks

log = logging.getLogger("train")
EVENTS = "events.out.tfevents.{}.train"  # name of a file; those of other programs end otherwise
ATTEMPT = "TensorBoard's events"
GROUPS = {  # column of the CSV: group of plots, by default "loss"
    "lr": "optimizer",
    "grad_norm": "optimizer",
    "tokens": "speed",
    "tokens_per_sec": "speed",
    "elapsed_sec": "speed",
}
RESULTS = "best_loss best_step corpus_loss perplexity bits_per_byte val_loss val_perplexity"


@contextmanager
def writing_events(run: RunDir, config: Config) -> Iterator[None]:
    """Around a run: with --tensorboard write its events, else empty those of earlier starts.

    What is in the way of events costs the run nothing.
    """
    with run.attempt(ATTEMPT):  # emptied: an open TensorBoard gets stuck where its file is gone
        for path in sorted(run.events.glob(EVENTS.format("*")), reverse=True):
            path.write_bytes(b"") if path.stat().st_size else path.unlink()
    board = None
    if config.tensorboard:
        try:
            board = Board(run, config)
            how = f"tensorboard --logdir {run.root}"
            log.info("Events for TensorBoard: %s; to see them: %s", run.events, how)
        except Exception as error:  # TensorBoard, protobuf and NumPy fail together in many ways
            reason = str(error).partition("\n")[0]
            log.warning(f"Going on without --tensorboard (pip install tensorboard): {reason}")
    run.listener = None if board is None else board.append
    try:
        yield
    finally:
        run.listener = None
        if board is not None:
            board.end()


class Board:
    """An event file of TensorBoard: first what metrics and samples hold, then what they get.

    Whole records are appended before training goes on: no thread can fail with rows in hand.
    """

    def __init__(self, run: RunDir, config: Config):
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog
        from tensorboard.compat.proto.summary_pb2 import Summary
        from torch.utils.tensorboard import RecordWriter
        from torch.utils.tensorboard.summary import hparams, text

        self.run, self.Event, self.Summary, self.text = run, Event, Summary, text
        self.path = run.events / EVENTS.format(f"{time.time():.6f}")
        self.waiting = io.BytesIO()
        self.records = RecordWriter(self.waiting)

        files = (run.metrics_csv, run.samples_txt)
        texts = {path: path.read_bytes().decode("utf-8", "replace") for path in files}
        times = {row["step"]: row["elapsed_sec"] for row in csv_rows(texts[run.metrics_csv])}
        elapsed = 0.0
        began = time.time() - max(times.values(), default=0.0)  # had it run without a break
        flags = config.as_dict()
        for name in ("input_file", "val_file"):
            flags[name] = text_names(getattr(config, name))
        compared = ["results/best_loss", "results/corpus_loss", "loss/window_loss"]
        compared += ["loss/val_loss"] if config.validates else []
        experiment, session, self.session_end = hparams(flags, dict.fromkeys(compared, 0))
        self.record(0, began, file_version="brain.Event:2")
        start = SessionLog(status=SessionLog.START)  # to readers: forget all from step 0 on
        self.record(0, began, session_log=start)
        self.record(0, began, summary=experiment)
        self.record(0, began, summary=session)
        past = [one for path, content in texts.items() for one in self.summaries(path, content)]
        for step, summary in sorted(past, key=lambda one: one[0]):
            elapsed = times.get(step, elapsed)
            self.record(step, began + elapsed, summary=summary)
        self.flush()

    def summaries(self, path: Path, content: str) -> Iterator[tuple[int, object]]:
        """Step and summary of each row or block in a text of metrics or samples; else nothing."""
        if path == self.run.metrics_csv:
            for row in csv_rows(content):
                step = int(row.pop("step"))
                tags = {f"{GROUPS.get(name, 'loss')}/{name}": row[name] for name in row}
                yield step, self.scalars(tags)
        elif path == self.run.samples_txt:
            blocks = {block.step: block for block in sample_blocks(content)}
            for step, block in blocks.items():
                verbatim = "    " + block.texts.strip("\n").replace("\n", "\n    ")  # in Markdown
                yield step, self.text("samples", verbatim)

    def scalars(self, values: dict[str, float]) -> object:
        """A summary of plotted values, by tag."""
        value_of = self.Summary.Value
        return self.Summary(value=[value_of(tag=t, simple_value=v) for t, v in values.items()])

    def record(self, step: int, wall_time: float, **content: object) -> None:
        """Add an event to those that wait."""
        event = self.Event(step=step, wall_time=wall_time, **content)
        self.records.write(event.SerializeToString())

    def append(self, path: Path, content: str) -> None:
        """Show what a file of the run was just given."""
        for step, summary in self.summaries(path, content):
            self.record(step, time.time(), summary=summary)
        if self.waiting.tell():
            self.flush()

    def end(self) -> None:
        """Show the results of a run that ended, was interrupted or failed."""
        results = read_json(self.run.results_json)
        reason = results.get("stop_reason", StopReason.RUNNING)
        if reason == StopReason.RUNNING:
            return
        found = {f"results/{name}": results.get(name) for name in RESULTS.split()}
        values = {tag: value for tag, value in found.items() if value is not None}
        self.record(results.get("final_step", 0), time.time(), summary=self.scalars(values))
        if reason not in (StopReason.INTERRUPTED, StopReason.FAILED):
            self.record(0, time.time(), summary=self.session_end)
        self.flush()

    def flush(self) -> None:
        """Append what waits to the file, or none of it."""
        with self.run.attempt(ATTEMPT):
            self.run.check_owner()
            self.run.events.mkdir(exist_ok=True)
            self.path.touch()
            append_whole(self.path, self.waiting.getvalue())
            self.waiting.truncate(self.waiting.seek(0))
