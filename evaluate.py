"""Evaluate a checkpoint: rebuild the model and the data set from it alone and write evaluation.json.

    python evaluate.py checkpoint=outputs/…/checkpoints/best.safetensors
"""

import sys
from pathlib import Path
from typing import cast

import hydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from vit import config as conf
from vit.config import EvaluateConfig
from vit.errors import ConfigError


@hydra.main(config_path="conf", config_name="evaluate", version_base="1.3")
def main(composed: DictConfig) -> None:
    with conf.ending():
        settings = cast(EvaluateConfig, OmegaConf.to_object(composed))
        conf.check_values(settings, {key: conf.CHECKS[key] for key in ("runtime.workers", "runtime.threads")})
        if (settings.checkpoint is None) == (settings.pretrained is None):
            raise ConfigError("give checkpoint=outputs/…/checkpoints/best.safetensors, or pretrained=FILE with data=NAME")
        print(measure(settings, list(HydraConfig.get().overrides.task)))


def measure(settings: EvaluateConfig, overrides: list[str]) -> str:
    """Write evaluation.json and return what to tell the user. `overrides` of data.* change where the data is read."""
    # Imported here so that --help and a mistaken command answer at once.
    import time

    from vit import runtime
    from vit.evaluation import interval
    from vit.restore import restore, restore_pretrained
    from vit.run_folder import write_json

    runtime.use_threads(settings.runtime.threads)
    runtime.use_deterministic_kernels(settings.runtime.deterministic)
    device = runtime.choose_device(settings.runtime.device.name)
    if settings.checkpoint is not None:
        path = Path(settings.checkpoint)
        folder = path.parent.parent if path.parent.name == "checkpoints" else path.parent
        changes = {key: value for key, value in conf.explicit_changes(OmegaConf.structured(settings), overrides).items()
                   if key.startswith("data.")}
        restored = restore(path, changes, device)
    else:
        path, folder = Path(str(settings.pretrained)), Path()
        restored = restore_pretrained(path, settings.data, settings.model, device)
    images = restored.data.split(settings.split.name)
    began = time.perf_counter()
    metrics = restored.measure(restored.model, settings.split.name, runtime.loader_workers(settings.runtime.workers))
    speed = metrics["n"] / (time.perf_counter() - began)
    low, high = interval(metrics["top1"], int(metrics["n"]))
    folder = Path(settings.out) if settings.out else folder
    result = folder / ("evaluation.json" if settings.split.name == "test" else f"evaluation_{settings.split.name}.json")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_json(result, {"split": settings.split.name, "data": str(images), "checkpoint": str(path), **metrics,
                            "top1_interval_95": [low, high], "images_per_second": round(speed, 2)})
    except OSError as error:
        raise ConfigError(f"{folder}: can't write there ({error.strerror}); choose another folder with out=FOLDER") from None
    return (f"{images}: loss {metrics['loss']:.4f}, top-1 {metrics['top1']:.2%} (95 % interval {low:.2%} to {high:.2%}), "
            f"top-5 {metrics['top5']:.2%}, n {metrics['n']:,}, {speed:.0f} images/s ({restored.precision.name})\n"
            f"written to {result}")


if __name__ == "__main__":
    conf.register()
    sys.exit(conf.command_line(main, EvaluateConfig))
