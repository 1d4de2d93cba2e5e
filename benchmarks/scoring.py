"""What scoring costs beside drawing, on the embedded model.

    python -m benchmarks.scoring
    python -m benchmarks.scoring --prompts 256 --repeat 5

A round draws portions of captioned shapes, as `evaluate` and `pareto` do, and scores them by all that is measured: FID,
KID, text-image score, retrieval, diversity. Medians of CPU seconds are printed, and the share of scoring, which is to
stay below 10 % of drawing. `--dimensions` adds what statistics of features of that size take a picture.
"""

import argparse
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("USE_TORCH_XLA", "0")  # transformers would import it
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

LIMIT = 0.1
"""Of the time that drawing takes."""


def seconds(run: Callable[[], object]) -> float:
    start = time.process_time()
    run()
    return time.process_time() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=128)
    parser.add_argument("--num-images", type=int, default=2)
    parser.add_argument("--condition-scale", type=float, default=1.25)
    parser.add_argument("--repeat", type=int, default=3, help="rounds; medians are printed")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--dimensions", type=int, default=2048, help="of features, for the cost of statistics alone")
    options = parser.parse_args()

    import torch

    from dalle_torch.evaluation.distances import FeatureStatistics
    from dalle_torch.evaluation.loading import load_features, load_scorer
    from dalle_torch.pipeline import DallePipeline
    from dalle_torch.shapes.drawing import render
    from dalle_torch.shapes.sampling import sample_scenes
    from dalle_torch.studies.drawings import Setting, draw
    from dalle_torch.studies.evaluate import score_drawings

    torch.set_num_threads(options.threads)
    pipe = DallePipeline.from_pretrained("shapes").pack()
    features, scorer = load_features("shapes"), load_scorer("shapes")
    scenes = sample_scenes(options.prompts, 0)
    reference = FeatureStatistics(features.dimensions)
    from PIL import Image

    reference.update(features.features([Image.fromarray(picture) for picture in render(scenes, 0)]))
    prompts = [scene.caption for scene in scenes]
    setting = Setting(condition_scale=options.condition_scale)
    times: dict[str, list[float]] = {"drawing": [], "reading kept pictures": [], "scoring": []}
    for number in range(options.repeat):
        with tempfile.TemporaryDirectory() as folder:

            def work(seed: int = number, place: Path = Path(folder)) -> object:
                return draw(pipe, prompts, [setting], place, num_images=options.num_images, seed=seed)[0]

            times["drawing"].append(seconds(work))
            times["reading kept pictures"].append(seconds(work))
            drawings = draw(pipe, prompts, [setting], Path(folder), num_images=options.num_images, seed=number)[0]
            times["scoring"].append(seconds(lambda kept=drawings: score_drawings(kept, reference, features, scorer)))
    count = options.prompts * options.num_images
    print(f"{count} pictures of {options.prompts} prompts, {options.threads} thread(s), CPU seconds, median of "
          f"{options.repeat}")  # fmt: skip
    middle = {name: statistics.median(taken) for name, taken in times.items()}
    for name, taken in middle.items():
        spread = f"{min(times[name]):.2f}-{max(times[name]):.2f}"
        print(f"  {name:24}{taken:8.2f} s  ({spread}){1e3 * taken / count:8.1f} ms a picture")
    rows = torch.randn(64, options.dimensions)
    whole = FeatureStatistics(options.dimensions)
    taken = statistics.median(seconds(lambda: whole.update(rows)) for _ in range(options.repeat)) / len(rows)
    print(f"  statistics of {options.dimensions} features: {1e3 * taken:.1f} ms a picture")
    share = middle["scoring"] / middle["drawing"]
    print(f"  scoring takes {share:.1%} of drawing")
    if share > LIMIT:
        sys.exit(f"scoring takes {share:.1%} of drawing, more than {LIMIT:.0%}")


if __name__ == "__main__":
    main()
