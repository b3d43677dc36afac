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
        conf.check_values(settings, {key: check for key, check in conf.CHECKS.items()
                                     if key.startswith("runtime.") or key == "data.limit"})
        if settings.checkpoint is None:
            raise ConfigError("checkpoint has no value; give checkpoint=outputs/…/checkpoints/best.safetensors")
        print(evaluate_checkpoint(settings, list(HydraConfig.get().overrides.task)))


def evaluate_checkpoint(settings: EvaluateConfig, overrides: list[str]) -> str:
    """Write evaluation.json and return what to tell the user. `overrides` of data.* change where the data is read."""
    # Imported here so that --help and a mistaken command answer at once.
    import time

    from vit import checkpoint, runtime
    from vit.data import evaluation_batches, load_data
    from vit.evaluation import evaluate, interval
    from vit.run_folder import write_json

    path, split = Path(str(settings.checkpoint)), settings.split.name
    header = checkpoint.read_checkpoint(path)[1]
    model = checkpoint.load(path)
    changes = {key: value for key, value in conf.explicit_changes(OmegaConf.structured(settings), overrides).items()
               if key.startswith("data.")}
    config = conf.from_plain(conf.changed(header["config"], changes), str(path))
    plain = conf.plain(config)
    device = runtime.choose_device(settings.runtime.device.name)
    runtime.use_threads(settings.runtime.threads)
    runtime.use_deterministic_kernels(settings.runtime.deterministic)
    precision = runtime.Precision(header["precision"], device)
    data = load_data(**conf.data_arguments(plain["data"], plain["model"]), image_size=model.preprocessing.image_size,
                     device=device)
    checkpoint.check_classes(header["classes"], data.classes, path)
    images = data.split(split)
    batches = evaluation_batches(images, config.train.batch_size, model.preprocessing,
                                 runtime.loader_workers(settings.runtime.workers), device)
    began = time.perf_counter()
    metrics = evaluate(model.to(device), batches, precision)
    speed = metrics["n"] / (time.perf_counter() - began)
    low, high = interval(metrics["top1"], int(metrics["n"]))
    folder = Path(settings.out) if settings.out else path.parent.parent if path.parent.name == "checkpoints" else path.parent
    result = folder / ("evaluation.json" if split == "test" else f"evaluation_{split}.json")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_json(result, {"split": split, "data": str(images), "checkpoint": str(path), **metrics,
                            "top1_interval_95": [low, high], "images_per_second": round(speed, 2)})
    except OSError as error:
        raise ConfigError(f"{folder}: can't write there ({error.strerror}); choose another folder with out=FOLDER") from None
    return (f"{images}: loss {metrics['loss']:.4f}, top-1 {metrics['top1']:.2%} (95 % interval {low:.2%} to {high:.2%}), "
            f"top-5 {metrics['top5']:.2%}, n {metrics['n']:,}, {speed:.0f} images/s ({precision.name})\nwritten to {result}")


if __name__ == "__main__":
    conf.register()
    sys.exit(conf.command_line(main, EvaluateConfig))
