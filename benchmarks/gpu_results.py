"""What benchmarks.gpu_check keeps: `results/DEVICE.json`, and its table in `RESULTS.md`."""

import json
import re
from pathlib import Path

from benchmarks.gpu_jobs import GOALS
from benchmarks.report import HEADER, cells, line
from utils.files import write_json

MARKS = "<!-- gpu_check: from here on written by scripts/gpu_check.sh -->", "<!-- gpu_check: to here -->"


class Results:
    """`results/DEVICE.json` and the table in `RESULTS.md`, written after every job."""

    def __init__(self, folder: Path, facts: dict):
        self.folder = folder
        name = re.sub(r"[^a-z0-9]+", "-", facts["name"].lower()).strip("-") + "-tiny" * facts["tiny"]
        self.path = folder / "results" / f"{name}.json"
        self.path.parent.mkdir(parents=True, exist_ok=True)
        earlier = json.loads(self.path.read_text()) if self.path.exists() else {}
        self.content = {"machine": facts, "jobs": earlier.get("jobs", {})}

    def add(self, job: dict) -> None:
        """Keep a job's record; where it was not run, or not to its end, also what an earlier run has measured."""
        for name, record in job.items():
            old = self.content["jobs"].get(name)
            if old and record["status"].startswith("not run"):
                continue
            if old and record["status"] != "complete":
                new, run = {row["what"] for row in record["rows"]}, {"earlier": old["commit"] or "run"}
                left = [row for row in old["rows"] if "unit" in row and row["what"] not in new]
                record = record | {"rows": [*record["rows"], *(row | {"more": run | row["more"]} for row in left)]}
            made_with = {
                "commit": self.content["machine"]["commit"],
                "torch": self.content["machine"]["versions"]["torch"],
            }
            self.content["jobs"][name] = record | made_with
        write_json(self.path, self.content)
        write_table(self.folder)

    def summary(self, names: list[str]) -> str:
        """Prints how the jobs ended; what is wrong with them, empty if nothing is."""
        jobs = {name: self.content["jobs"][name] for name in names}
        print(f"\n{self.path}")
        for name, job in jobs.items():
            print(f"{name:>28}: {job['status']}{failures(job)}")
        bad = [name for name, job in jobs.items() if job["status"] != "complete" and "no time" not in job["status"]]
        return f"{len(bad)} of {len(jobs)} jobs did not end well ({', '.join(bad)})" if bad else ""


def failures(job: dict) -> str:
    """Of the tests' job: how many passed, and which did not."""
    outcomes = [row["outcome"] for row in job["rows"] if "outcome" in row]
    if not outcomes:
        return ""
    bad = [row["what"] for row in job["rows"] if row.get("outcome") == "failed"]
    counts = ", ".join(f"{outcomes.count(kind)} {kind}" for kind in dict.fromkeys(outcomes))
    return f"; {counts}" + (f": {', '.join(bad)}" if bad else "")


def write_table(folder: Path) -> None:
    """Put the tables of all devices into RESULTS.md, between the marks; at its end if it has none."""
    page = folder / "RESULTS.md"
    text = page.read_text() if page.exists() else ""
    if MARKS[0] not in text or MARKS[1] not in text:
        text = f"{text}\n{MARKS[0]}\n{MARKS[1]}\n".lstrip("\n")
    before, rest = text.split(MARKS[0], 1)
    after = rest.split(MARKS[1], 1)[1]
    tables = [table(json.loads(path.read_text())) for path in sorted((folder / "results").glob("*.json"))]
    page.write_text(f"{before}{MARKS[0]}\n{''.join(tables)}{MARKS[1]}{after}")


def table(content: dict) -> str:
    """One device as Markdown: what it is, all rows, how jobs ended."""
    machine, jobs = content["machine"], content["jobs"]
    versions = ", ".join(f"{name} {value}" for name, value in machine["versions"].items() if value)
    lines = [
        f"### {machine['name']}" + " (tiny sizes: shows that every job runs, measures nothing)" * machine["tiny"],
        "",
    ]
    lines += [f"{machine['processor']} ({', '.join(machine['matrix_instructions'])}), {versions}.", ""]
    lines += [line((*HEADER, "goal")), line(["---"] * (len(HEADER) + 1))]
    on_gpu = machine["device"] == "cuda" and not machine["tiny"]
    for job in jobs.values():
        for row in (row for row in job["rows"] if "unit" in row):
            lines.append(line([*cells(row), "; ".join(goals(row)) if on_gpu else ""]))
    lines += ["", line(("job", "seconds", "ended", "clocks (SM, at most, °C, W) in the middle", "commit", "torch"))]
    lines += [line(["---"] * 6)]
    for name, job in jobs.items():
        seen = [text for text in job.get("clocks", []) if text]
        clocks, ended = (seen[len(seen) // 2] if seen else ""), job["status"] + failures(job)
        lines.append(line([name, str(job.get("seconds", "")), ended, clocks, str(job["commit"]), job["torch"]]))
    return "\n".join([*lines, "", ""])


def goals(row: dict) -> list[str]:
    """What this row was to show, and whether it does."""
    found = []
    for pattern, figure, wanted in GOALS:
        if re.search(pattern, row["what"]) and row[figure] is not None:
            at_most = figure == "here"
            met = row[figure] <= wanted if at_most else row[figure] >= wanted
            told = {
                "ratio": f"{wanted:g}×",
                "of_floor": f"{wanted:.0%} of the floor",
                "here": f"{wanted:g} {row['unit']}",
            }
            found.append(f"{'at most' if at_most else 'at least'} {told[figure]}: {'met' if met else 'missed'}")
    return found
