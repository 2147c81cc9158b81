"""What every benchmark ends with: a table on the terminal and a JSON record with the
circumstances."""

import json
import sys
from datetime import date
from pathlib import Path

import pandas as pd

from parts.compute.device import choose_device, environment
from parts.report.provenance import git_commit
from parts.run.directory import replacing


def write_record(
    path: Path | None, program: str, rows: list[dict], options: dict, hidden: tuple[str, ...] = ()
) -> None:
    """Print the rows as a table, but for hidden columns; write them with date, commit, command,
    versions and hardware, if a path is given."""
    print(pd.DataFrame(rows).drop(columns=list(hidden)).to_string(index=False), flush=True)
    if path is None:
        return
    device, _ = choose_device()
    record = {
        "date": date.today().isoformat(),
        "commit": git_commit(),
        "command": " ".join(["python", f"benchmarks/{Path(program).name}", *sys.argv[1:]]),
        **environment(device),
        "options": options,
        "rows": rows,
    }
    with replacing(path) as file:
        file.write((json.dumps(record, indent=1, default=str) + "\n").encode())
