"""Where a run's metrics, histograms and pictures go: JSON lines always, wandb when asked for.

Owns: trackers and their failures, which never stop a run. Does not own: what is measured and when (`training`).
"""

from dalle_torch.tracking.base import Histogram, NullTracker, Tracker
from dalle_torch.tracking.json_lines import JsonLinesTracker
from dalle_torch.tracking.multi import MultiTracker
from dalle_torch.tracking.wandb import start_wandb

__all__ = ["Histogram", "JsonLinesTracker", "MultiTracker", "NullTracker", "Tracker", "start_wandb"]
