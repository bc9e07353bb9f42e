"""Every setting of the system, and the recipes that set them."""

from trenchcoat.config.errors import UsageError, UserError
from trenchcoat.config.settings import (
    KNOWN_FEATURE_MAPS,
    BlocksConfig,
    DataConfig,
    EvalConfig,
    FeatureMapConfig,
    Kind,
    LoraConfig,
    ModelConfig,
    ParallelConfig,
    Recipe,
    RunConfig,
    SelectConfig,
    StageConfig,
    StudentConfig,
    TransferConfig,
    dump_recipe,
)

__all__ = [
    "KNOWN_FEATURE_MAPS",
    "BlocksConfig",
    "DataConfig",
    "EvalConfig",
    "FeatureMapConfig",
    "Kind",
    "LoraConfig",
    "ModelConfig",
    "ParallelConfig",
    "Recipe",
    "RunConfig",
    "SelectConfig",
    "StageConfig",
    "StudentConfig",
    "TransferConfig",
    "UsageError",
    "UserError",
    "dump_recipe",
]
