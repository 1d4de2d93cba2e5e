"""`dalle-torch generate --prompts FILE` on the embedded model: killed midway it goes on, and ends as if unbroken."""

import json
import os
import signal
import subprocess
import sys
import time

from dalle_torch.shapes.sampling import sample_prompts

PROMPTS = 40
ENVIRONMENT = os.environ | {"USE_TORCH_XLA": "0", "OMP_NUM_THREADS": "1"}


def command(prompts, output, batch_size):
    return [sys.executable, "-m", "dalle_torch.cli.main", "generate", "--prompts", str(prompts), "--rank-with",
            "shapes", "--num-images", "2", "--device", "cpu", "--batch-size", str(batch_size), "--output",
            str(output)]  # fmt: skip


def content(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_gallery_that_is_killed_goes_on_and_ends_as_if_unbroken(tmp_path):
    captions = sample_prompts(PROMPTS, seed=2)
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": text, "seed": n}) + "\n" for n, text in enumerate(captions)))
    results = tmp_path / "broken" / "results.jsonl"
    with subprocess.Popen(command(prompts, tmp_path / "broken", 8), env=ENVIRONMENT) as process:
        deadline = time.monotonic() + 240
        while not results.is_file() or results.read_bytes().count(b"\n") < 8:
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.02)
        process.send_signal(signal.SIGKILL)
    kept = [line for line in results.read_bytes().splitlines(keepends=True) if line.endswith(b"\n")]
    assert 8 <= len(kept) < 2 * PROMPTS
    files = [tmp_path / "broken" / json.loads(line)["file"] for line in kept[: len(kept) // 2 * 2]]
    times = [path.stat().st_mtime_ns for path in files]
    done = subprocess.run(command(prompts, tmp_path / "broken", 8), env=ENVIRONMENT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert f"of {PROMPTS} prompts are drawn already" in done.stderr
    assert f"{2 * PROMPTS} pictures in" in done.stdout and "gallery.html" in done.stdout
    assert [path.stat().st_mtime_ns for path in files] == times, "what was finished was not drawn again"
    # Drawn at once, in batches of another size.
    subprocess.run(command(prompts, tmp_path / "whole", 32), env=ENVIRONMENT, check=True, capture_output=True)
    assert content(tmp_path / "broken") == content(tmp_path / "whole")
    rows = [json.loads(line) for line in results.read_text().splitlines()]
    assert [row["prompt"] for row in rows[::2]] == captions
    assert all(first["score"] >= second["score"] for first, second in zip(rows[::2], rows[1::2], strict=True))
    assert sum(row["score"] for row in rows[::2]) / PROMPTS > 0.6, "the model draws what it is asked for"
