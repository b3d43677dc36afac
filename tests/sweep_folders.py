"""Folders as the jobs of a sweep leave them."""

import json


def write_job(folder, overrides, exit_code=0, **result):
    folder.mkdir(parents=True)
    note = {"overrides": overrides, "status": "ended", "exit_code": exit_code}
    (folder / "job.json").write_text(json.dumps(note))
    if result:
        result = {"reason": "all steps done", "seconds": 10.0, **result}
        (folder / "result.json").write_text(json.dumps(result))


def write_finished(folder, overrides, val_top1, test_top1):
    write_job(folder, overrides, status="finished", val_top1=val_top1, test_top1=test_top1)


def write_selected(folder, select, value, val_top1):
    result = {"select": select, f"val_{select}": value, f"test_{select}": value}
    result |= {"val_top1": val_top1, "test_top1": val_top1}
    write_job(folder, [f"seed={folder.name}"], status="finished", **result)
