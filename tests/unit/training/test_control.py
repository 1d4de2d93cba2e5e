"""What a user types becomes a change of the configuration, or a line that says why not."""

import json
from dataclasses import asdict, replace

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from dalle_torch.config import (
    DataConfig,
    OptimizerConfig,
    RunConfig,
    SamplesConfig,
    ScoresConfig,
    ShampooConfig,
    TrainingConfig,
)
from dalle_torch.training.control import (
    ADJUSTABLE,
    Change,
    History,
    Mailbox,
    Orders,
    Request,
    apply,
    changes_of,
    parse_request,
    take_orders,
    value_of,
)
from dalle_torch.training.run_folder import differences
from tests.unit.training.run_configs import run_config

NUMBERS = {
    "optimizer.lr": st.floats(0, 1),
    "optimizer.weight_decay": st.floats(1e-9, 1),
    "optimizer.beta1": st.floats(0, 1, exclude_max=True),
    "optimizer.beta2": st.floats(0, 1, exclude_min=True, exclude_max=True),
    "optimizer.max_grad_norm": st.floats(1e-3, 1e6),
    "optimizer.shampoo.preconditioning_compute_steps": st.integers(1, 1000),
    "data.blank_caption_prob": st.floats(0, 1),
    "data.min_clip_score": st.none() | st.floats(0, 0.4),
    "data.max_clip_score": st.none() | st.floats(0.5, 1),
    "training.log_every": st.integers(1, 10**6),
    "training.eval_every": st.integers(1, 10**6),
    "training.save_every": st.integers(1, 10**6),
    "samples.every": st.none() | st.integers(1, 10**6),
    "scores.every": st.none() | st.integers(1, 10**6),
}
SETTINGS = st.fixed_dictionaries({}, optional=NUMBERS)


def typed(values: dict) -> list[str]:
    return [f"{name}={'null' if value is None else value}" for name, value in values.items()]


@given(values=SETTINGS, short=st.booleans())
def test_values_that_are_in_bounds_arrive_and_nothing_else_changes(values: dict, short: bool) -> None:
    config = run_config("shampoo")
    assume(any(value_of(config, name) != value for name, value in values.items()))
    words = typed({ADJUSTABLE[name].short if short else name: value for name, value in values.items()})
    request = Request.from_json(json.loads(json.dumps(parse_request(words, config).to_json())))
    changes = changes_of(request, config, 7)
    changed = apply(config, changes)
    assert all(value_of(changed, name) == value for name, value in values.items())
    # The Shampoo section comes in as a whole where it was left to its defaults.
    found = {difference.name for difference in differences(config, changed)}
    wanted = {name for name, value in values.items() if value_of(config, name) != value}
    assert {name.replace("shampoo.preconditioning_compute_steps", "shampoo") for name in wanted} == found
    assert [(change.name, change.old) for change in changes] == [(n, value_of(config, n)) for n in request.settings]
    back = apply(changed, [replace(change, new=change.old) for change in changes])
    assert all(value_of(back, name) == value_of(config, name) for name in ADJUSTABLE)


@given(
    name=st.sampled_from(sorted(ADJUSTABLE)),
    text=st.one_of(
        st.text(max_size=8), st.floats().map(str), st.integers().map(str), st.sampled_from(["null", "1e3", "-1", ""])
    ),
)
def test_whatever_is_typed_either_holds_in_a_valid_configuration_or_is_one_line(name: str, text: str) -> None:
    config = run_config("shampoo")
    try:
        request = parse_request([f"{name}={text}"], config)
    except ValueError as error:
        assert "\n" not in " ".join(str(error).split()) and str(error)
        return
    changed = apply(config, changes_of(request, config, 0))
    rebuilt = {field: getattr(changed, field) for field in asdict(changed)}
    assert RunConfig(**rebuilt) == changed


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["learning_rat=1"], "'learning_rat' cannot be adjusted; did you mean learning_rate"),
        (["sav"], "did you mean save"),
        (["zzz=1"], "'zzz' cannot be adjusted while a run goes; what can: learning_rate, weight_decay"),
        (["training.batch_size=8"], "'training.batch_size' cannot be adjusted"),
        (["learning_rate"], "learning_rate needs a value: learning_rate=0.0001 is what it has now"),
        (["learning_rate=fast"], "optimizer.lr=fast is not a finite number$"),
        (["learning_rate=nan"], "optimizer.lr=nan is not a finite number$"),
        (["learning_rate=inf"], "optimizer.lr=inf is not a finite number$"),
        (["learning_rate=null"], "optimizer.lr=null is not a finite number$"),
        (["log_every=1.5"], "training.log_every=1.5 is not a whole number$"),
        (["min_clip_score=x"], "data.min_clip_score=x is not a finite number or null$"),
        (["learning_rate=-1"], "optimizer cannot be used: lr=-1.0 must be at least 0"),
        (["log_every=0", "save_every=0"], "log_every=0 must be at least 1; save_every=0"),
        (["blank_caption_prob=1.5"], r"blank_caption_prob=1.5 must lie in \[0, 1\]"),
        (["min_clip_score=0.5", "max_clip_score=0.4"], "min_clip_score=0.5 must not exceed max_clip_score=0.4"),
        (["beta1=1"], r"beta1=1.0 must lie in \[0, 1\)"),
        (["preconditioning_compute_steps=5"], "has no effect with optimizer.name=adamw"),
        (["max_grad_norm=null"], "clipping cannot be turned on or off"),
        (["learning_rate=1e-4"], "nothing to change: optimizer.lr is 0.0001 already"),
        (["learning_rate=1", "optimizer.lr=2"], "optimizer.lr is set twice"),
        ([], "nothing to do"),
    ],
)
def test_mistakes_are_told(words: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_request(words, run_config())


def test_settings_that_the_run_does_not_have_are_told() -> None:
    with pytest.raises(
        ValueError, match="optimizer.beta1 has no effect with optimizer.name=adafactor; optimizer.beta2"
    ):
        parse_request(["beta1=0.5", "beta2=0.5"], run_config("adafactor"))
    with pytest.raises(ValueError, match="samples.every=5 needs the VQGAN|without prompts"):
        parse_request(["sample_every=5"], run_config(samples=SamplesConfig()))
    with pytest.raises(ValueError, match="scores cannot be used: every=5 without prompts: name some"):
        parse_request(["score_every=5"], run_config(scores=ScoresConfig()))


def test_bounds_that_depend_on_each_other_may_move_together() -> None:
    config = run_config(data=DataConfig(train=["x"], min_clip_score=0.2, max_clip_score=0.3))
    request = parse_request(["min_clip_score=0.5", "max_clip_score=0.6"], config)
    changed = apply(config, changes_of(request, config, 0))
    assert (changed.data.min_clip_score, changed.data.max_clip_score) == (0.5, 0.6)


def test_what_holds_already_is_told_beside_what_changes() -> None:
    request = parse_request(["learning_rate=1e-4", "log_every=7", "save", "stop", "save"], run_config())
    assert dict(request.settings) == {"training.log_every": 7}
    assert request.unchanged == ("optimizer.lr is 0.0001 already",)
    assert request.words == ("save", "stop")


def test_shampoos_defaults_are_what_a_run_without_the_section_has() -> None:
    config = run_config("shampoo")
    request = parse_request(["preconditioning_compute_steps=25"], config)
    (change,) = changes_of(request, config, 3)
    assert change.old == ShampooConfig().preconditioning_compute_steps
    assert apply(config, [change]).optimizer.shampoo == ShampooConfig(preconditioning_compute_steps=25)


@pytest.fixture
def mailbox(tmp_path) -> Mailbox:  # type: ignore[no-untyped-def]
    return Mailbox([str(tmp_path / "control")])


def test_orders_of_a_run(mailbox: Mailbox) -> None:
    config, history = run_config(), History()
    first = mailbox.send(parse_request(["learning_rate=5e-5", "log_every=7"], config))
    second = mailbox.send(parse_request(["learning_rate=2e-5", "stop"], config))
    orders = take_orders(mailbox, history, config, 12)
    assert [(c.name, c.old, c.new, c.step) for c in orders.changes] == [
        ("optimizer.lr", 1e-4, 5e-5, 12), ("training.log_every", 50, 7, 12), ("optimizer.lr", 5e-5, 2e-5, 12),
    ]  # fmt: skip
    assert orders.save and orders.stop
    other = Orders.from_json(json.loads(json.dumps(orders.to_json())))
    assert (other.changes, other.save, other.stop) == (orders.changes, True, True)
    assert apply(config, other.changes).optimizer.lr == 2e-5
    orders.confirm(mailbox, 12)
    answers = [mailbox.answer(key) for key in (first, second)]
    assert [len(answer.changes) for answer in answers if answer] == [2, 1]
    assert not take_orders(mailbox, history, apply(config, orders.changes), 13)


def test_a_request_that_no_longer_fits_is_answered_with_the_reason(mailbox: Mailbox) -> None:
    config, history = run_config(data=DataConfig(train=["x"], max_clip_score=0.6)), History()
    low = mailbox.send(parse_request(["min_clip_score=0.5"], config))
    lower = mailbox.send(parse_request(["max_clip_score=0.4"], config))
    orders = take_orders(mailbox, history, config, 1)
    orders.confirm(mailbox, 1)
    assert [change.name for change in orders.changes] == ["data.min_clip_score"]
    assert (mailbox.answer(low).error, mailbox.answer(lower).changes) == (None, ())  # type: ignore[union-attr]
    assert "min_clip_score=0.5 must not exceed max_clip_score=0.4" in str(mailbox.answer(lower).error)  # type: ignore[union-attr]


def test_a_run_killed_between_history_and_answer_makes_the_change_once_at_its_step(tmp_path, mailbox: Mailbox) -> None:  # type: ignore[no-untyped-def]
    config, path = run_config(), tmp_path / "history.jsonl"
    key = mailbox.send(parse_request(["learning_rate=5e-5"], config))
    take_orders(mailbox, History(path), config, 12)
    # Killed here; it goes on from a checkpoint of step 10, with a mailbox of its own.
    again, history = Mailbox([str(tmp_path / "control")]), History(path)
    learning_rates = []
    for step in range(10, 14):
        orders = take_orders(again, history, config, step)
        config = apply(config, orders.changes)
        orders.confirm(again, step)
        learning_rates.append(config.optimizer.lr)
    assert learning_rates == [1e-4, 1e-4, 5e-5, 5e-5]
    assert len(history) == 1 and again.answer(key).changes[0].step == 12  # type: ignore[union-attr]


@given(
    wishes=st.lists(
        st.tuples(st.integers(0, 15), st.sampled_from(sorted(NUMBERS)), st.integers(0, 2)), min_size=1, max_size=8
    ),
    resumed=st.integers(0, 15),
)
def test_a_resumed_run_has_the_same_settings_at_every_step(wishes: list, resumed: int) -> None:
    """All changes of an unbroken run, replayed from any checkpoint through its list alone."""
    config = run_config("shampoo", training=TrainingConfig(log_every=1))
    choices = {name: [0.25, 0.125, 0.5] for name in NUMBERS} | {
        name: [3, 5, 9] for name in NUMBERS if ADJUSTABLE[name].type is int
    } | {"data.max_clip_score": [0.6, 0.7, None]}  # fmt: skip
    history, now, seen = History(), config, []
    for step in range(16):
        for i, (at, name, choice) in enumerate(wishes):
            if at == step and value_of(now, name) != choices[name][choice]:
                # Times rise with steps, as in an unbroken run.
                time = f"2026-01-01T00:{step:02d}:{i:02d}+00:00"
                change = Change(name, value_of(now, name), choices[name][choice], step, time, f"r{i}", "me@here")
                history.record([change])
                now = apply(now, [change])
        seen.append(now)
    saved = json.loads(json.dumps(history.to_list()))
    again = History(saved=saved)
    now = again.config_at(config, resumed)
    for step in range(resumed, 16):
        now = apply(now, again.at(step))
        assert all(value_of(now, name) == value_of(seen[step], name) for name in ADJUSTABLE)
    assert again.config_at(config) == now


def test_optimizers_configuration_is_left_alone_by_no_changes() -> None:
    config = run_config(optimizer=OptimizerConfig(name="shampoo"))
    assert apply(config, []) == config
