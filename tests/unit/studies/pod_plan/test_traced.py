"""The training step traced without weights, data or devices."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.xla

CONFIG = """\
model: {config: MODEL, tokenizer: none}
data: {train: [none]}
optimizer: {name: shampoo, lr: 1.0e-3, shampoo: {block_size: 32, skip_preconditioning_dim_size_gt: 128}}
training: {steps: 10, batch_size: 8, accumulation_steps: 2, precision: bfloat16, gradient_checkpointing: true,
  use_scan: true}
runtime: {backend: xla}
mesh: {dp: 4, mp: 2}
"""
MODEL = {
    "d_model": 32, "decoder_attention_heads": 4, "encoder_attention_heads": 4, "decoder_ffn_dim": 64,
    "encoder_ffn_dim": 64, "decoder_layers": 2, "encoder_layers": 2, "encoder_vocab_size": 256,
    "image_vocab_size": 255, "decoder_start_token_id": 255, "image_length": 16, "max_text_length": 8,
    "bos_token_id": 0, "pad_token_id": 1, "eos_token_id": 2,
    "dropout": 0.0, "attention_dropout": 0.0, "activation_dropout": 0.0, "use_glu": True, "ln_positions": "normformer",
    "use_bias": False,
}  # fmt: skip


@pytest.fixture(scope="module")
def traced(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict]:
    folder = tmp_path_factory.mktemp("plan")
    (folder / "model.json").write_text(json.dumps(MODEL), encoding="utf-8")
    config = folder / "run.yaml"
    config.write_text(CONFIG.replace("MODEL", str(folder / "model.json")), encoding="utf-8")
    script = Path(__file__).with_name("traced.py")
    root = Path(__file__).parents[4]
    done = subprocess.run(
        [sys.executable, str(script), str(config)], cwd=root, env={**_environment(), "PYTHONPATH": str(root)},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


def _environment() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if name not in ("PJRT_DEVICE", "CPU_NUM_DEVICES")}


def test_there_is_a_program_of_each_kind_of_step_for_all_devices(traced: dict[str, dict]) -> None:
    assert list(traced) == ["with roots", "without roots"]
    for step in traced.values():
        assert step["devices"] == 8
        assert step["first_outputs"] == ["loss", "grad_norm"]
        assert step["names_modules"]
    assert traced["with roots"]["program"] > 1.5 * traced["without roots"]["program"]


def test_weights_and_state_are_overwritten_where_they_lie(traced: dict[str, dict]) -> None:
    for step in traced.values():
        assert step["right_places"]
        for kind in ("weights", "momentum", "diagonal_momentum", "diagonal_statistics", "statistics"):
            assert step["overwritten"][kind] == step["inputs"][kind] > 0, kind


def test_preconditioners_change_in_steps_with_roots_alone(traced: dict[str, dict]) -> None:
    with_roots, without = traced["with roots"], traced["without roots"]
    assert with_roots["overwritten"]["preconditioners"] == with_roots["inputs"]["statistics"]
    assert without["inputs"]["preconditioners"] == with_roots["inputs"]["statistics"]
    assert "preconditioners" not in without["overwritten"]


def test_both_steps_find_the_same_on_the_devices(traced: dict[str, dict]) -> None:
    kinds = ("weights", "momentum", "diagonal_momentum", "diagonal_statistics", "statistics", "batch")
    with_roots, without = ({kind: step["bytes"][kind] for kind in kinds} for step in traced.values())
    assert with_roots == without


def test_an_input_lies_as_the_table_of_rules_says(traced: dict[str, dict]) -> None:
    # Rows over mp: each of two parts is on four devices, one of every pair of neighbours of a host.
    assert traced["with roots"]["q_proj"] == "{devices=[2,1,4]0,2,4,6,1,3,5,7 last_tile_dim_replicate}"


def test_a_batch_is_sent_as_training_sends_it(traced: dict[str, dict]) -> None:
    # A slice for every device: passes, rows of an mp group, tokens.
    text, image = ["int32", 8, 2, 2, 8], ["int32", 8, 2, 2, 16]
    assert traced["with roots"]["batch"] == [text, text, image]
