"""The options of a run, as dataclasses: what a file of `configs/train` may say, checked as a whole.

Owns: names, defaults and bounds. Does not own: reading files and overrides (`config_io`), the networks' own options
(`models.configuration`).
"""

from dalle_torch.config.data import DataConfig
from dalle_torch.config.optimizer import (
    AdafactorConfig,
    ExponentialConfig,
    OptimizerConfig,
    PlateauConfig,
    ShampooConfig,
)
from dalle_torch.config.pictures import PicturesConfig, SamplesConfig, ScoresConfig
from dalle_torch.config.run import (
    CheckpointConfig,
    ModelConfig,
    RunConfig,
    RuntimeConfig,
    TrackingConfig,
)
from dalle_torch.config.shapes import (
    CropPhase,
    ShapesConfig,
    ShapesDataConfig,
    ShapesEvaluationConfig,
    ShapesJudgeConfig,
    VQGANTrainingConfig,
)
from dalle_torch.config.training import MeshConfig, TrainingConfig

__all__ = [
    "AdafactorConfig",
    "CheckpointConfig",
    "CropPhase",
    "DataConfig",
    "ExponentialConfig",
    "MeshConfig",
    "ModelConfig",
    "OptimizerConfig",
    "PicturesConfig",
    "PlateauConfig",
    "RunConfig",
    "RuntimeConfig",
    "SamplesConfig",
    "ScoresConfig",
    "ShampooConfig",
    "ShapesConfig",
    "ShapesDataConfig",
    "ShapesEvaluationConfig",
    "ShapesJudgeConfig",
    "TrackingConfig",
    "TrainingConfig",
    "VQGANTrainingConfig",
]
