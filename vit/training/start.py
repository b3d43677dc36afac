"""TODO: say what this file is for."""

from vit.augment.batch import BatchAugmentation
from vit.augment.image import TrainingTransform
from vit.augment.mixing import MixupCutmix
from vit.augment.policies import build_policies
from vit.config.config import Config
from vit.data.preprocessing import Preprocessing
from vit.training.batches import Augmentation


def build_augmentation(
    config: Config, preprocessing: Preprocessing, num_classes: int
) -> Augmentation:
    """All random changes of training that the configuration asks for; what mirrors a class into another is left out."""
    augment, flip = config.augment, config.augment.flip if config.data.mirror else 0.0
    policies = build_policies(
        augment.policy.name, augment.policy_ops, augment.policy_magnitude, augment.color_jitter
    )
    return Augmentation(
        TrainingTransform(preprocessing, augment.crop_scale, flip, policies),
        BatchAugmentation(
            config.seed, preprocessing.image_size, augment.pad, augment.crop_scale, flip, policies
        ),
        augment.erasing,
        MixupCutmix(
            config.seed,
            num_classes,
            augment.mixup,
            augment.cutmix,
            1.0 if augment.mix_probability is None else augment.mix_probability,
        ),
        config.data.unreadable.name == "skip",
    )
