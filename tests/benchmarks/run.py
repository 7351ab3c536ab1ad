"""Measures the rows of the chapters, side by side, and says which of the figures to reach are reached.

A row is a dict in the ROWS of a chapter file beside this one:

name, compares   what to call it, and a sentence on what is compared, with sizes and units
sides            a function without arguments -> a list of functions, one a side, each returning {measure: number}; a round calls each once
reach            figures, such as "labml / ours >= 2.2", "minutes <= 8" or, only to be told, "ours / theirs": names are measures; a ratio is
                 taken within a round, then the median over the rounds
rounds           how many rounds (default 5)
public           True: the row runs on the public packages of requirements.txt, installed in a virtual environment of their own
environment      {variable: value} for the row's process, where something must be set before Python starts

Each row runs in a process of its own. One that lacks something outside the repository (a package, a text) raises FileNotFoundError
and is reported as unavailable.
"""

import argparse
import importlib
import importlib.metadata
import json
import os
import platform
import re
import subprocess
import sys
import time
import traceback
from contextlib import redirect_stdout
from datetime import datetime, timezone
from operator import ge, le
from pathlib import Path
from statistics import median
from textwrap import wrap

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]


def all_rows():
    chapters = [importlib.import_module(path.stem) for path in sorted(HERE.glob("chapter*.py"))]
    return {row["name"]: row for chapter in chapters for row in chapter.ROWS}


# In the process of one row.


def measure(row, rounds, threads):
    """The rounds of one row, A B A B ..., as a list of {measure: number}."""
    import torch

    torch.set_num_threads(threads)
    torch.manual_seed(0)
    sides, records = row["sides"](), []
    for n in range(rounds):
        record = {}
        for side in sides:
            record |= side()
        records.append(record)
        print(
            f"  round {n + 1} of {rounds}: " + ", ".join(f"{name} {value:.4g}" for name, value in record.items()),
            file=sys.stderr,
            flush=True,
        )
    return {"torch": torch.__version__, "threads": threads, "rounds": records}


def answer(row, rounds, threads):
    """Prints the outcome of one row as JSON, alone on stdout: whatever the row itself prints goes to stderr."""
    with redirect_stdout(sys.stderr):
        try:
            outcome = measure(row, rounds, threads)
        except FileNotFoundError as error:
            outcome = {"unavailable": str(error)}
        except Exception as error:  # noqa: BLE001
            traceback.print_exc()
            outcome = {"crashed": f"{type(error).__name__}: {error}"}
    print(json.dumps(outcome).replace(str(ROOT), "."))  # results carry no folder of this machine


# In the process that a person starts.


def public_python():
    """The interpreter of the environment with the public packages, which is built when its requirements have changed."""
    requirements, venv = HERE / "requirements.txt", HERE / ".venv"
    stamp = venv / "stamp"
    wanted = sys.version + requirements.read_text(encoding="utf-8")
    python = venv / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    if not stamp.exists() or stamp.read_text(encoding="utf-8") != wanted:
        print("  installing the public packages, once, some minutes", file=sys.stderr, flush=True)
        for command in ([sys.executable, "-m", "venv", "--clear", venv], [python, "-m", "pip", "install", "--quiet", "-r", requirements]):
            utf8 = os.environ | {"PYTHONUTF8": "1"}
            done = subprocess.run(
                command, check=False, env=utf8, stderr=subprocess.PIPE, encoding="utf-8"
            )
            if done.returncode:
                reasons = re.findall(r"(?m)^ERROR: (.*)", done.stderr) or done.stderr.splitlines() or ["no reason given"]
                raise FileNotFoundError(f"the public packages cannot be installed: {reasons[-1]}")
        stamp.write_text(wanted, encoding="utf-8")
    return python


def run(row, rounds, threads):
    """One row in a process of its own -> its outcome."""
    try:
        python = public_python() if row.get("public") else sys.executable
    except FileNotFoundError as error:
        return {"unavailable": str(error)}
    command = [python, __file__, "--rows", row["name"], "--rounds", str(rounds), "--threads", str(threads), "--here"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}
    environment |= row.get("environment", {})
    done = subprocess.run(
        command, check=False, env=environment, stdout=subprocess.PIPE, encoding="utf-8"
    )
    return json.loads(done.stdout) if done.stdout else {"crashed": f"exit status {done.returncode}"}


def judge(figure, records):
    """ "a / b >= 2.2" and the rounds -> the figure with its measured value and whether it is reached."""
    names, sign, target = re.fullmatch(r"(.+?)(?: ([<>]=) ([\d.]+))?", figure).groups()
    top, *bottom = names.split(" / ")
    value = median(record[top] / record[bottom[0]] if bottom else record[top] for record in records)
    judged = {"figure": names, "measured": value}
    return judged if sign is None else judged | {"reach": f"{sign} {target}", "reached": {">=": ge, "<=": le}[sign](value, float(target))}


def report(row, outcome):
    """Adds to an outcome what follows from its rounds."""
    outcome = {"row": row["name"], "compares": row["compares"], **outcome}
    if records := outcome.get("rounds"):
        outcome["medians"] = {name: median(record[name] for record in records) for name in records[0]}
        outcome["figures"] = [judge(figure, records) for figure in row["reach"]]
    return outcome


def table(outcomes):
    verdict = {True: "reached", False: "NOT REACHED", None: ""}
    line = "{:<18} {:<36} {:>9}  {:<8}  {}".format
    lines = [line("row", "figure", "measured", "reach", "verdict"), "-" * 90]
    for outcome in outcomes:
        cells = [(f["figure"], f"{f['measured']:.4g}", f.get("reach", ""), verdict[f.get("reached")]) for f in outcome.get("figures", [])]
        cells += [("", "", "", f"{state.upper()}: {outcome[state]}") for state in ("unavailable", "crashed") if state in outcome]
        lines += [line("" if n else outcome["row"], *cell) for n, cell in enumerate(cells)]
    for outcome in outcomes:
        lines += ["", *wrap(f"{outcome['row']}: {outcome['compares']}", 110)]
        if "medians" in outcome:
            values = ", ".join(f"{name} {value:.4g}" for name, value in outcome["medians"].items())
            lines += wrap(f"median of {len(outcome['rounds'])}, torch {outcome['torch']}, {outcome['threads']} threads: {values}", 110)
    return "\n".join(lines)


def machine():
    facts = {"cores": os.cpu_count(), "system": f"{platform.system()} {platform.machine()}", "python": platform.python_version()}
    facts["torch"] = importlib.metadata.version("torch")
    if hasattr(os, "getloadavg"):
        facts["load before"] = round(os.getloadavg()[0], 2)
    return facts


def write(path, results):
    """All or nothing: a reader never sees half a file."""
    part = path.with_name(f".{path.name}.part")
    text = json.dumps(results, indent=2) + "\n"
    part.write_text(text, encoding="utf-8", newline="\n")
    os.replace(part, path)


def main():
    rows = all_rows()
    parser = argparse.ArgumentParser(description="Side-by-side measurements of memtx-minimal, and the figures to reach.")
    parser.add_argument("--rows", metavar="A,B", default=",".join(rows), help="which rows, of: " + ", ".join(rows))
    parser.add_argument("--rounds", type=int, metavar="N", help="rounds of every row (default: each row's own number)")
    parser.add_argument("--threads", type=int, metavar="N", default=2, help="threads of torch (default: 2)")
    parser.add_argument("--json", type=Path, metavar="PATH", default=HERE / "results.json", help="where to write the results")
    parser.add_argument("--here", action="store_true", help=argparse.SUPPRESS)  # measure one row in this very process
    options = parser.parse_args()
    sys.stdout.reconfigure(errors="backslashreplace")
    names = options.rows.split(",")
    if unknown := [name for name in names if name not in rows]:
        parser.error(f"no row {', '.join(unknown)}: choose from {', '.join(rows)}")
    if options.here:
        return answer(rows[names[0]], options.rounds, options.threads)

    results = {"date": datetime.now(timezone.utc).isoformat(timespec="seconds"), "machine": machine(), "rows": []}
    print(", ".join(f"{name} {value}" for name, value in results["machine"].items()), file=sys.stderr)
    for n, name in enumerate(names):
        print(f"row {n + 1} of {len(names)}: {name}", file=sys.stderr, flush=True)
        start = time.perf_counter()
        outcome = run(rows[name], options.rounds or rows[name].get("rounds", 5), options.threads)
        results["rows"].append(report(rows[name], outcome) | {"seconds": round(time.perf_counter() - start, 1)})
        write(options.json, results)
    print(table(results["rows"]))
    return any("crashed" in outcome for outcome in results["rows"])


if __name__ == "__main__":
    sys.exit(main())
