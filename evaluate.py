"""Evaluate a checkpoint: restore the model and its data set from the file, write evaluation.json.

python evaluate.py checkpoint=outputs/…/checkpoints/best.safetensors
python evaluate.py checkpoint=outputs/…/checkpoints/best.safetensors report=true  # and a page
python evaluate.py checkpoint=outputs/…/checkpoints/best.safetensors data=folder data.root=FOLDER
"""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import hydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from vit.config.command_line import run_main, task_errors
from vit.config.config import EvaluateConfig, from_composed, register
from vit.config.resume import command_line_changes
from vit.config.settings import check_settings
from vit.errors import ConfigError, writing_to

# Keys of the groups that a checkpoint brings, which may be given beside it
CHANGES_OF_CHECKPOINTS = (
    "data",
    "data.root",
    "data.limit",
    "data.val_fraction",
    "data.test_fraction",
    "data.eval_crop",
    "model.image_size",
)
# Keys of the groups that foreign weights are given, which mean nothing where nothing is trained
OF_TRAINING = (
    "data.unreadable",
    "data.mirror",
    "data.balance",
    "model.name",
    "model.dropout",
    "model.embedding_dropout",
    "model.attention_dropout",
    "model.projection_dropout",
    "model.mlp_dropout",
    "model.drop_path",
    "model.patch_dropout",
    "model.init",
    "model.init_range",
)

# torch takes seconds to import, and --help and a mistyped command should answer at once
if TYPE_CHECKING:
    import torch

    from vit.evaluation.measurements import MeasuredModel


@hydra.main(config_path="conf", config_name="evaluate", version_base="1.3")
def main(composed: DictConfig) -> None:
    with task_errors():
        settings = from_composed(composed)
        changes = command_line_changes(composed, HydraConfig.get().overrides.task)
        check_settings(settings)
        check_source(settings, changes)
        print(measure(settings, changes))


def check_source(settings: EvaluateConfig, changes: dict[str, Any]) -> None:
    """Raise ConfigError unless there is one source of weights and every group applies to it."""
    if (settings.checkpoint is None) == (settings.pretrained is None):
        raise ConfigError(
            "give checkpoint=outputs/…/checkpoints/best.safetensors, "
            "or pretrained=FILE with data=NAME"
        )
    for key in changes:
        if settings.checkpoint is not None:
            is_of_group = key.partition(".")[0] in ("data", "model")
            if is_of_group and key not in CHANGES_OF_CHECKPOINTS:
                raise ConfigError(
                    f"{key}=… does nothing beside checkpoint=FILE, which holds its own; "
                    "leave it out"
                )
        elif key in OF_TRAINING:
            raise ConfigError(f"{key} does nothing in an evaluation; leave it out")


def measure(settings: EvaluateConfig, changes: dict[str, Any]) -> str:
    """Measure what is asked for, write evaluation.json and the report, and return a summary.

    changes: {key: value} of the command line; those of data.* apply to a checkpoint's own data.
    """
    # Imported here so that --help and a mistyped command answer at once
    from vit.runtime.allocator import keep_freed_memory
    from vit.runtime.device import start_device, use_deterministic_kernels, use_threads
    from vit.runtime.faults import failures_explained

    device = start_device(settings.runtime.device)
    use_threads(settings.runtime.threads)
    use_deterministic_kernels(settings.runtime.deterministic)
    keep_freed_memory(device.type)
    with failures_explained("try precision=bf16, or runtime.device=cpu", "runtime.workers"):
        model = restore_model(settings, changes, device)
        return measure_model(model, settings)


def restore_model(
    settings: EvaluateConfig, changes: dict[str, Any], device: "torch.device"
) -> "MeasuredModel":
    """Return the model of the checkpoint, or of foreign weights, with its data on the device."""
    from vit.evaluation.elsewhere import restore_elsewhere
    from vit.evaluation.measurements import MeasuredModel, in_views
    from vit.evaluation.restore import restore, restore_pretrained
    from vit.runtime.cores import loader_workers
    from vit.weights.sources import find

    computing = (settings.precision, settings.batch_size)
    of_run = {key: value for key, value in changes.items() if key in CHANGES_OF_CHECKPOINTS}
    if settings.checkpoint is not None:
        path, name = Path(settings.checkpoint), settings.checkpoint
        if "data" in changes:
            restored = restore_elsewhere(path, settings.data, of_run, device, *computing)
        else:
            restored = restore(path, of_run, device, *computing)
    else:
        source = find(str(settings.pretrained))
        path, name = source.path, source.name
        restored = restore_pretrained(
            path, settings.data, settings.model, device, *computing, typed=set(changes)
        )
    workers = loader_workers(settings.runtime.workers, device_type=device.type)
    model = MeasuredModel(path, restored, settings.split, workers, name)
    return in_views(model, settings.views)


def measure_model(model: "MeasuredModel", settings: EvaluateConfig) -> str:
    """Measure what is asked for and write it; see measure()."""
    from vit.evaluation.measurements import MEASUREMENTS, measure_all
    from vit.evaluation.outputs import ADVICE, Outputs, make_writable, of_another_protocol
    from vit.files import write_json

    # What can't be measured or written is refused before the work
    requested = [entry for key, entry in MEASUREMENTS.items() if getattr(settings, key)]
    for measurement in requested:
        measurement.check(model)
    outputs = Outputs.of(settings.checkpoint, settings.out, settings.split)
    make_writable(outputs.report_folder if settings.report else outputs.folder)

    # One pass over the split serves all; some measurements add passes of their own
    numbers, lines = measure_all(model, requested)
    lines += of_another_protocol(outputs.file, numbers["protocol"])
    with writing_to(outputs.folder, ADVICE):
        write_json(outputs.file, numbers)
        lines.append(f"written to {outputs.file}")
        if settings.report:
            # matplotlib is imported for the page alone
            from vit.report.page import write_report

            page = write_report(outputs.report_folder, model, numbers, outputs.run)
            lines.append(f"report: {page}")
    return "\n".join(lines)


if __name__ == "__main__":
    register()
    sys.exit(run_main(main, EvaluateConfig))
