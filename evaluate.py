"""Evaluate a checkpoint: rebuild the model and the data set from it alone and write evaluation.json.

python evaluate.py checkpoint=outputs/…/checkpoints/best.safetensors
python evaluate.py checkpoint=outputs/…/checkpoints/best.safetensors report=true    # and a page, report/index.html
"""

import errno
import os
import sys
from pathlib import Path
from typing import cast

import hydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from vit.config.command_line import command_line, ending
from vit.config.config import CHECKS, EvaluateConfig, register
from vit.config.ranges import check_values
from vit.config.resume import explicit_changes
from vit.errors import ConfigError, writing_to

ELSEWHERE = "choose another folder with out=FOLDER"


@hydra.main(config_path="conf", config_name="evaluate", version_base="1.3")
def main(composed: DictConfig) -> None:
    with ending():
        settings = cast(EvaluateConfig, OmegaConf.to_object(composed))
        check_values(settings, {key: CHECKS[key] for key in ("runtime.workers", "runtime.threads")})
        if (settings.checkpoint is None) == (settings.pretrained is None):
            raise ConfigError(
                "give checkpoint=outputs/…/checkpoints/best.safetensors, or pretrained=FILE with data=NAME"
            )
        print(measure(settings, list(HydraConfig.get().overrides.task)))


def measure(settings: EvaluateConfig, overrides: list[str]) -> str:
    """Write evaluation.json, and the report where it is wanted, and return what to tell the user.

    `overrides` of data.* change where the data is read."""
    # Imported here so that --help and a mistaken command answer at once.
    import time

    from vit.evaluation.accuracy import wilson_interval
    from vit.evaluation.measurements import (
        NEIGHBOURS,
        calibration,
        check_possible,
        measure_corruptions,
        measure_held_out,
        measure_neighbours,
        record_outputs,
    )
    from vit.evaluation.restore import restore, restore_pretrained
    from vit.files import write_json
    from vit.runtime.device import (
        choose_device,
        loader_workers,
        use_deterministic_kernels,
        use_threads,
    )

    use_threads(settings.runtime.threads)
    use_deterministic_kernels(settings.runtime.deterministic)
    device = choose_device(settings.runtime.device.name)
    if settings.checkpoint is not None:
        path = Path(settings.checkpoint)
        run = path.parent.parent if path.parent.name == "checkpoints" else path.parent
        changes = {
            key: value
            for key, value in explicit_changes(OmegaConf.structured(settings), overrides).items()
            if key.startswith("data.")
        }
        restored = restore(path, changes, device)
    else:
        path, run = Path(str(settings.pretrained)), Path()
        restored = restore_pretrained(path, settings.data, settings.model, device)
    split, model = settings.split.name, restored.model
    images, workers = restored.data.split(split), loader_workers(settings.runtime.workers)
    check_possible(restored, images, split, settings.knn, settings.corruptions)
    folder = Path(settings.out) if settings.out else run
    suffix = "" if split == "test" else f"_{split}"
    result, page = folder / f"evaluation{suffix}.json", folder / f"report{suffix}"
    wanted = page if settings.report else folder
    with writing_to(wanted, ELSEWHERE):  # tried before the work
        wanted.mkdir(parents=True, exist_ok=True)
        if not os.access(wanted, os.W_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    with record_outputs(model, logits=settings.report, features=settings.knn) as record:
        began = time.perf_counter()
        metrics = restored.measure(model, split, workers)
        speed = metrics["n"] / (time.perf_counter() - began)
    low, high = wilson_interval(metrics["top1"], int(metrics["n"]))
    found = {
        "split": split,
        "data": str(images),
        "checkpoint": str(path),
        **metrics,
        "top1_interval_95": [low, high],
        "images_per_second": round(speed, 2),
    }
    told = [
        f"{images}: loss {metrics['loss']:.4f}, top-1 {metrics['top1']:.2%} (95 % interval {low:.2%} to {high:.2%}), "
        f"top-5 {metrics['top5']:.2%}, n {metrics['n']:,}, {speed:.0f} images/s ({restored.precision.name})"
    ]
    if settings.knn:
        found |= measure_neighbours(restored, record.features, images.labels, workers)
        told.append(
            f"top-1 of the {NEIGHBOURS} nearest neighbours {found['knn_top1']:.2%}, from {found['knn_bank']}"
        )
    if settings.corruptions:
        found |= measure_corruptions(restored, images, workers, print)
        told.append(f"top-1 under corruptions, their mean {found['corruptions_top1']:.2%}")
    held_out = None
    if settings.report:
        held_out = measure_held_out(restored, split, record.logits, workers)
        found |= calibration(record.logits, images.labels, held_out, path)
    with writing_to(folder, ELSEWHERE):
        write_json(result, found)
        told.append(f"written to {result}")
        if settings.report:
            # Only in its own folder does metrics.jsonl tell of this checkpoint
            known = (
                run
                if settings.checkpoint is not None and path.parent.name == "checkpoints"
                else None
            )
            from vit.evaluation.measurements import Measured
            from vit.report.page import write_report

            measured = Measured(path, known, restored, images, record.logits, held_out, found)
            told.append(f"report: {write_report(page, measured)}")
    return "\n".join(told)


if __name__ == "__main__":
    register()
    sys.exit(command_line(main, EvaluateConfig))
