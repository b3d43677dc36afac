"""The table of a sweep: all its jobs, ranked, as text, as CSV and as a picture."""

import csv
import shlex
import signal
import statistics
from pathlib import Path
from typing import Any

from vit.files import atomic_write, read_json, write_text
from vit.runs.selection import CRITERIA, describe_value, score
from vit.runs.sweep import job_settings
from vit.text import markdown_table, shorten

# Characters of a reason below the table
MAX_REASON = 200
# Jobs at most in the figure
BARS_DRAWN = 40
MEASURED = [f"{split}_{name}" for name in CRITERIA for split in ("val", "test")]
COLUMNS = ["job", "overrides", "select", *MEASURED, "status", "reason", "seconds"]
Row = dict[str, Any]


def collect(sweep_folder: Path) -> list[Row]:
    """Return one row a job, with the keys of COLUMNS, and `settings`: its overrides one by one.

    They are sorted by ranked_by(), the best first, with jobs that have no such number at the end.
    """
    rows = [job_row(note) for note in sweep_folder.glob("*/job.json")]
    ranking = ranked_by(rows)

    def place(row: Row) -> tuple[bool, float, str]:
        value = row[f"val_{ranking}"]
        return value is None, 0 if value is None else -score(ranking, value), row["job"].zfill(8)

    return sorted(rows, key=place)


def ranked_by(rows: list[Row]) -> str:
    """Return what all jobs with a result were selected by, or top1 where they differ in that."""
    names = {row["select"] for row in rows if row["select"] is not None}
    return names.pop() if len(names) == 1 else "top1"


def job_row(note: Path) -> Row:
    """Return the row of the job that a job.json belongs to."""
    job, result = read_json(note), read_json(note.with_name("result.json"))
    settings = job_settings(job["overrides"])
    status, reason = result.get("status"), result.get("reason", "")
    # A job that was killed, or has not come to its end yet, leaves no result.json
    if status is None:
        code = job.get("exit_code")
        status = "running" if code is None else "crashed"
        reason = "" if code is None else describe_exit(code)
    return {
        "job": note.parent.name,
        "settings": settings,
        "overrides": " ".join(settings),
        # Earlier versions selected by top-1, and did not say so
        "select": result.get("select", "top1" if result else None),
        **{name: result.get(name) for name in MEASURED},
        "status": status,
        "reason": "" if status == "finished" else reason,
        "seconds": result.get("seconds"),
    }


def describe_exit(code: int) -> str:
    """Say why a child that left no result.json ended, from its exit code."""
    if code >= 0:
        return f"exit code {code}"
    # Python gives the number of the signal that killed a child as a negative code
    name = signal.Signals(-code).name
    if -code == signal.SIGKILL:
        return f"signal {name}, which the system sends where memory runs out"
    return f"signal {name}"


def over_seeds(rows: list[Row]) -> list[Row]:
    """Return one row for all finished jobs that differ in their seed alone, the best group first.

    Keys: overrides, seeds (how many), and val_top1, test_top1 and the other metrics as (mean,
    sample standard deviation), or None where a job has none.
    """
    groups: dict[str, list[Row]] = {}
    for row in rows:
        settings = row["settings"]
        without_seed = [item for item in settings if not item.startswith("seed=")]
        if row["status"] == "finished" and len(without_seed) < len(settings):
            groups.setdefault(" ".join(without_seed), []).append(row)
    return [
        {
            "overrides": overrides,
            "seeds": len(jobs),
            **{name: mean_and_deviation([job[name] for job in jobs]) for name in MEASURED},
        }
        for overrides, jobs in groups.items()
        if len(jobs) > 1
    ]


def mean_and_deviation(values: list[float | None]) -> tuple[float, float] | None:
    # A mean over some of the seeds would not be comparable
    known = [value for value in values if value is not None]
    if len(known) < len(values):
        return None
    return statistics.mean(known), statistics.stdev(known)


def table(rows: list[Row]) -> str:
    """Return the ranked jobs as a table, and below them means and deviations over seeds."""
    ranking = ranked_by(rows)
    shown = shown_metrics(ranking)
    cells = [["rank", "job", *(title(name) for name in shown), "status", "overrides"]]
    for rank, row in enumerate(rows, start=1):
        cells.append(
            [
                "" if row[shown[0]] is None else str(rank),
                row["job"],
                *("" if row[name] is None else value_of(name, row[name]) for name in shown),
                row["status"],
                row["overrides"],
            ]
        )

    parts = [markdown_table(cells), *describe_ranking(rows, ranking)]
    if rows and rows[0][shown[0]] is not None:
        parts.append(f"best: python train.py {shlex.join(rows[0]['settings'])}")
    # Below the table, which a long reason would make too wide for a screen
    reasons = [
        f"job {row['job']} {row['status']}: {one_line(row)}" for row in rows if row["reason"]
    ]
    if reasons:
        parts.append("\n".join(reasons))
    groups = over_seeds(rows)
    if groups:
        parts += ["mean ± standard deviation over seeds", table_over_seeds(groups, shown)]
    return "\n\n".join(parts)


def shown_metrics(ranking: str) -> list[str]:
    """Return the columns of the table: what is ranked by, and top-1."""
    names = ["top1"] if ranking == "top1" else [ranking, "top1"]
    return [f"{split}_{name}" for name in names for split in ("val", "test")]


def title(metric: str) -> str:
    """Return the head of a column: "val top-1" for val_top1."""
    split, _, name = metric.partition("_")
    return f"{split} {CRITERIA[name]}"


def value_of(metric: str, value: float) -> str:
    return describe_value(metric.partition("_")[2], value)


def describe_ranking(rows: list[Row], ranking: str) -> list[str]:
    """Return the line on what the jobs are ranked by; none where that is what they always are."""
    if ranking == "loss":
        return ["ranked by validation loss, the lowest first (train.select=loss)"]
    if ranking != "top1":
        return [f"ranked by validation {CRITERIA[ranking]} (train.select={ranking})"]
    if len({row["select"] for row in rows if row["select"] is not None}) > 1:
        return ["ranked by validation top-1, since the jobs differ in train.select"]
    return []


def one_line(row: Row) -> str:
    """Return the first line of the reason a job failed."""
    return shorten(row["reason"].splitlines()[0], MAX_REASON)


def table_over_seeds(groups: list[Row], shown: list[str]) -> str:
    cells = [["seeds", *(title(name) for name in shown), "overrides"]]
    for group in groups:
        values = []
        for name in shown:
            if group[name] is None:
                values.append("")
                continue
            mean, deviation = group[name]
            if name.endswith("_loss"):
                values.append(f"{mean:.4f} ± {deviation:.4f}")
            else:
                values.append(f"{100 * mean:.2f} ± {100 * deviation:.2f} %")
        cells.append([str(group["seeds"]), *values, group["overrides"] or "(none)"])
    return markdown_table(cells)


def draw(rows: list[Row], path: Path) -> None:
    """Draw the jobs that have the number they are ranked by, the best at the top; else no picture.

    That number of the validation split is a bar, that of the test split a mark.
    """
    # Late: importing it takes a second, for which the driver's jobs need not wait
    from matplotlib.figure import Figure

    ranking = ranked_by(rows)
    ranked = [row for row in rows if row[f"val_{ranking}"] is not None][:BARS_DRAWN]
    if not ranked:
        return

    scale = 1 if ranking == "loss" else 100
    val = [scale * row[f"val_{ranking}"] for row in ranked]
    heights = list(range(len(ranked), 0, -1))
    # Stopped and failed jobs have no test result
    tested = [
        (scale * row[f"test_{ranking}"], height)
        for row, height in zip(ranked, heights, strict=True)
        if row[f"test_{ranking}"] is not None
    ]

    figure = Figure(figsize=(9, 1.2 + 0.3 * len(ranked)), layout="constrained")
    axes = figure.subplots()
    axes.barh(heights, val, color="#8fb3d9", label="validation")
    if tested:
        x, y = zip(*tested, strict=True)
        axes.plot(x, y, "D", color="#1b3a5c", markersize=5, label="test")

    # The end of the overrides, where those that differ usually are
    labels = [f"{row['job']}: {row['overrides'][-70:]}" for row in ranked]
    # parse_math: a dollar sign in a path does not begin a formula
    axes.set_yticks(heights, labels, fontsize=8, parse_math=False)
    axes.set_xlim(left=left_end([*val, *(value for value, _ in tested)], ranking))
    axes.set_xlabel("loss" if ranking == "loss" else f"{CRITERIA[ranking]}, %")
    # Where the bars are short: the worst job has the lowest accuracy, and the highest loss
    axes.legend(loc="upper right" if ranking == "loss" else "lower right", fontsize=8)
    figure.savefig(path, dpi=120)


def left_end(values: list[float], ranking: str) -> float:
    """Return where the bars begin: not at 0, or jobs that hardly differ would look the same."""
    margin = min(values) / 10 if ranking == "loss" else 5
    return max(0.0, min(values) - margin)


def print_summary(folder: Path) -> None:
    """Write summary.md, summary.csv and summary.png into a sweep's folder and print the table.

    Without a job, as where all of them were explain=true, there is none.
    """
    rows = collect(folder)
    if not rows:
        return
    text = table(rows)

    finished = sum(row["status"] == "finished" for row in rows)
    count = f"{finished} of {len(rows)} jobs finished"
    try:
        write_summary(folder, rows, text)
        where = f"the table is in {folder / 'summary.md'}"
    except OSError as error:
        where = f"the table could not be written to {folder} ({error.strerror or error})"
    print(f"\n{count}; {where}\n\n{text}", flush=True)


def write_summary(folder: Path, rows: list[Row], text: str) -> None:
    """Write summary.md, summary.csv and summary.png; text: of the table. Raises OSError."""
    write_text(folder / "summary.md", text + "\n")
    draw(rows, folder / "summary.png")
    with (
        atomic_write(folder / "summary.csv") as temporary,
        open(temporary, "w", newline="") as file,
    ):
        writer = csv.DictWriter(file, COLUMNS, extrasaction="ignore")
        writer.writeheader()
        writer.writerows(rows)
