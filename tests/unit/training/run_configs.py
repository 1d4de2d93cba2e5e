"""Configurations of whole runs, for tests that change them."""

from typing import Any

from dalle_torch.config import DataConfig, ModelConfig, OptimizerConfig, RunConfig, SamplesConfig, ScoresConfig


def run_config(optimizer: str = "adamw", **sections: Any) -> RunConfig:
    """A run that has every setting that can be adjusted but those of another optimizer."""
    given: dict[str, Any] = {
        "model": ModelConfig(config="configs/model/shapes.json", vqgan="shapes"),
        "data": DataConfig(train=["shards"]),
        "optimizer": OptimizerConfig(name=optimizer, lr=1e-4, weight_decay=0.1),  # type: ignore[arg-type]
        "samples": SamplesConfig(every=100, prompts=["a red circle"]),
        "scores": ScoresConfig(every=200, prompts=["a red circle"], scorer="shapes"),
    }
    return RunConfig(**given | sections)
