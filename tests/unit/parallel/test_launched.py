"""What a launcher tells is checked before anybody waits for others."""

import pytest

from dalle_torch.parallel.launched import launched_processes

WHOLE = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}


def test_a_whole_environment_says_how_many_there_are():
    assert launched_processes(WHOLE) == 2
    assert launched_processes({}) == 1
    # torchrun with one process, and what schedulers leave behind
    assert launched_processes({"WORLD_SIZE": "1", "RANK": "0"}) == 1
    assert launched_processes({"MASTER_ADDR": "host"}) == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"RANK": None}, "WORLD_SIZE=2 without RANK in the environment: start every process with torchrun"),
        ({"MASTER_ADDR": None, "MASTER_PORT": ""}, "WORLD_SIZE=2 without MASTER_ADDR, MASTER_PORT"),
        ({"WORLD_SIZE": None}, "RANK=1 without WORLD_SIZE"),
        ({"RANK": "2"}, "RANK=2 must be below WORLD_SIZE=2"),
        ({"RANK": "-1"}, "RANK='-1' in the environment must be a whole number of at least 0"),
        ({"WORLD_SIZE": "0"}, "WORLD_SIZE='0' in the environment must be a whole number of at least 1"),
        ({"WORLD_SIZE": "two"}, "WORLD_SIZE='two'"),
        ({"MASTER_PORT": "99999"}, "MASTER_PORT='99999' in the environment must be a whole number from 1 to 65535"),
    ],
)
def test_what_cannot_be_is_told_with_the_remedy(change, message):
    environment = {name: value for name, value in (WHOLE | change).items() if value is not None}
    with pytest.raises(ValueError, match=message):
        launched_processes(environment)
