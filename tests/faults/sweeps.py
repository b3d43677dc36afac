"""Sweeps whose jobs fail in every way they can."""

import csv
import json
from collections.abc import Iterator
from pathlib import Path

from faults.trials import Effort, Row, finish

JOB = [
    "experiment=digits",
    "model.num_layers=1",
    "model.hidden_size=32",
    "model.num_heads=2",
    "train.steps=3",
]
KINDS = ["SIGKILL", "none", "SIGSEGV", "SIGTERM", "exit code 7", "mistake"]
# Python runs it at the start of every process: the job of a seed fails as plants/SEED says
PLANT = """
import os, signal, sys

seed = next((word[5:] for word in sys.argv if word.startswith("seed=")), "")
is_job = any("hydra.run.dir=" in word for word in sys.argv)
if os.environ.get("FAULTS") and seed.isdigit() and is_job:
    kind = open(os.path.join(os.environ["FAULTS"], seed)).read()
    if kind.startswith("SIG"):
        os.kill(os.getpid(), getattr(signal, kind))
    elif kind.startswith("exit"):
        os._exit(7)
    elif kind == "mistake":
        sys.argv.append("train.batch_size=100000")
"""
# Of a job that failed so: its status in the table, and what its reason must name
STATUSES = {"none": ("finished", ""), "mistake": ("failed", "train.batch_size")}


def sweeps(work: Path, effort: Effort) -> Iterator[Row]:
    """The jobs are told apart, and the same command again runs those alone that failed."""
    row = Row(
        "a sweep with planted failures: all jobs accounted for, then only the failed ones run again"
    )
    kinds = KINDS[:2] if effort.quick else KINDS * 3 + ["none"] * 2
    plants = work / "plants"
    plants.mkdir()
    for seed, kind in enumerate(kinds):
        (plants / str(seed)).write_text(kind)
    (work / "sitecustomize.py").write_text(PLANT)

    seeds = ",".join(str(seed) for seed in range(len(kinds)))
    command = ["-m", *JOB, f"seed={seeds}", "hydra.sweep.dir=sweep"]
    environment = {"PYTHONPATH": str(work), "OMP_NUM_THREADS": "1"}
    code, errors = finish(work, *command, env={**environment, "FAULTS": str(plants)})
    row.count(code == 0, f"exit code {code} {errors[-400:]}")
    count_jobs(work / "sweep", [(kind, *expected(kind)) for kind in kinds], row)

    finished = times_of_finished_jobs(work / "sweep")
    code, errors = finish(work, *command, env=environment)
    row.count(code == 0, f"again: exit code {code} {errors[-400:]}")
    count_jobs(work / "sweep", [(kind, "finished", "") for kind in kinds], row)
    for path, time_written in finished.items():
        untouched = path.stat().st_mtime_ns == time_written
        row.count(untouched, f"job {path.parent.name} was finished and ran again")
    yield row


def expected(kind: str) -> tuple[str, str]:
    """The status of a job that failed so, and a part of its reason."""
    return STATUSES.get(kind, ("crashed", kind))


def count_jobs(sweep: Path, expectations: list[tuple[str, str, str]], row: Row) -> None:
    """Compare summary.csv with (kind of failure, status, part of the reason) of every job."""
    with open(sweep / "summary.csv") as file:
        jobs = {job["job"]: job for job in csv.DictReader(file)}
    for seed, (kind, status, reason) in enumerate(expectations):
        job = jobs.get(str(seed), {"status": "missing", "reason": ""})
        good = job["status"] == status and reason in job["reason"]
        row.count(good, f"job {seed} ({kind}): {job}")


def times_of_finished_jobs(sweep: Path) -> dict[Path, int]:
    times = {}
    for path in sweep.glob("*/result.json"):
        if json.loads(path.read_text())["status"] == "finished":
            times[path] = path.stat().st_mtime_ns
    return times
