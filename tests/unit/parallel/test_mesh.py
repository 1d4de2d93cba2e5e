"""The arithmetic of meshes and batches."""

import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dalle_torch.config import MeshConfig
from dalle_torch.config_io import load_config
from dalle_torch.parallel.mesh import BatchPlan, MeshPlan, plan_mesh

MEGA = MeshPlan(devices=256, hosts=32, devices_per_host=8, mp=8)
few = st.integers(min_value=1, max_value=12)


@st.composite
def meshes(draw: st.DrawFn) -> MeshPlan:
    hosts, groups, mp = draw(few), draw(few), draw(few)
    return MeshPlan(hosts * groups * mp, hosts, groups * mp, mp)


def test_the_mesh_and_batch_of_mega() -> None:
    assert MEGA.sizes == {"dp": 32, "mp": 8}
    assert str(MEGA) == "dp 32 x mp 8 = 256 devices (32 hosts x 8, 1 mp groups a host)"
    batch = BatchPlan(MEGA, batch_size=1408, accumulation_steps=3)
    assert (batch.per_group, batch.per_host, batch.per_update) == (44, 44, 4224)
    assert str(batch) == "44 samples x 32 (dp) x 3 accumulation steps = 4224 samples an update, 132 of each host"


def test_one_device_is_a_mesh() -> None:
    plan = plan_mesh(MeshConfig(), devices=1, hosts=1, devices_per_host=1)
    assert plan == MeshPlan(1)
    assert plan.device_order([[0]]) == (0,)
    assert BatchPlan(plan, 5).per_update == 5


@given(meshes(), st.randoms(use_true_random=False))
def test_groups_cover_all_devices_and_never_cross_hosts(plan: MeshPlan, random: object) -> None:
    numbers = list(range(plan.devices))
    random.shuffle(numbers)  # type: ignore[attr-defined]
    size = plan.devices_per_host
    of_hosts = [numbers[start : start + size] for start in range(0, plan.devices, size)]
    order = plan.device_order(of_hosts)
    assert plan.dp * plan.mp == plan.devices
    assert plan.groups_per_host * plan.hosts == plan.dp
    assert sorted(order) == list(range(plan.devices))
    for row in range(plan.dp):
        group = set(order[row * plan.mp : (row + 1) * plan.mp])
        # Rows follow the hosts, as the samples that a host reads do.
        assert group <= set(of_hosts[row // plan.groups_per_host])


@given(meshes(), few, few)
def test_samples_are_shared_out_whole(plan: MeshPlan, per_group: int, steps: int) -> None:
    batch = BatchPlan(plan, per_group * plan.dp, steps)
    assert batch.per_group == per_group
    assert batch.per_host * plan.hosts == batch.batch_size
    assert batch.per_update == per_group * plan.dp * steps
    numbers = re.findall(r"\d+", str(batch))
    assert [int(number) for number in numbers] == [
        per_group, plan.dp, steps, batch.per_update, batch.per_update // plan.hosts,
    ]  # fmt: skip
    assert "\n" not in f"{plan}{batch}"


@given(few, few, few)
def test_an_mp_that_does_not_divide_a_host_is_refused(hosts: int, devices_per_host: int, mp: int) -> None:
    if devices_per_host % mp == 0:
        assert MeshPlan(hosts * devices_per_host, hosts, devices_per_host, mp).mp == mp
        return
    with pytest.raises(ValueError, match=rf"mesh.mp={mp} does not divide the {devices_per_host} devices of a host"):
        MeshPlan(hosts * devices_per_host, hosts, devices_per_host, mp)


@given(meshes(), st.integers(min_value=-3, max_value=2000))
def test_a_batch_that_does_not_divide_is_refused_with_the_nearest_that_do(plan: MeshPlan, batch_size: int) -> None:
    if batch_size >= 1 and batch_size % plan.dp == 0:
        assert BatchPlan(plan, batch_size).per_group * plan.dp == batch_size
        return
    with pytest.raises(ValueError, match=f"training.batch_size={batch_size} ") as caught:
        BatchPlan(plan, batch_size)
    advised = re.search(r"set training.batch_size to ([\d or]+),", str(caught.value))
    assert advised is not None
    for size in advised[1].split(" or "):
        assert BatchPlan(plan, int(size)).batch_size % plan.dp == 0


@pytest.mark.parametrize(
    ("config", "devices", "words"),
    [
        (MeshConfig(mp=16), (256, 32, 8), ["mesh.mp=16", "8 devices of a host", "set mesh.mp to one of 1, 2, 4, 8"]),
        (MeshConfig(mp=3), (8, 1, 8), ["mesh.mp=3", "1, 2, 4, 8"]),
        (MeshConfig(dp=16, mp=8), (256, 32, 8), ["mesh.dp=16 x mesh.mp=8 = 128", "256 devices (32 hosts x 8)",
                                                "set mesh.dp to 32 or to null"]),
        (MeshConfig(), (255, 32, 8), ["32 hosts x 8 devices a host = 256", "255 devices"]),
        (MeshConfig(mp=3), (255, 32, 8), ["255 devices", "mesh.mp=3"]),
        (MeshConfig(), (0, 1, 0), ["devices=0 must be at least 1", "devices_per_host=0"]),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_told_with_every_number(
    config: MeshConfig, devices: tuple[int, int, int], words: list[str]
) -> None:
    with pytest.raises(ValueError, match="the mesh does not fit the devices") as caught:
        plan_mesh(config, *devices)
    assert all(word in str(caught.value) for word in words)
    assert "\n" not in str(caught.value)


def test_both_numbers_of_a_batch_are_told() -> None:
    with pytest.raises(ValueError) as caught:
        BatchPlan(MEGA, batch_size=1409, accumulation_steps=0)
    assert str(caught.value) == (
        "the batch does not fit the mesh: training.accumulation_steps=0 must be at least 1; training.batch_size=1409 "
        "is no multiple, from 32 up, of dp=32 (dp = 256 devices / mesh.mp=8): set training.batch_size to 1408 or 1440, "
        "or change mesh.mp"
    )


@pytest.mark.parametrize(
    ("of_hosts", "word"),
    [
        ([[0, 1, 2, 3]], "hosts were found with 4:"),
        ([[0, 1, 2, 3], [4, 5]], "hosts were found with 4, 2:"),
        ([[0, 1, 2, 3], [3, 5, 6, 7]], "0 to 7, each on one host, but hosts have 0, 1, 2, 3; 3, 5, 6, 7"),
        ([], "found with none"),
    ],
)
def test_devices_that_lie_otherwise_are_refused(of_hosts: list[list[int]], word: str) -> None:
    with pytest.raises(ValueError, match="the mesh does not fit the devices") as caught:
        MeshPlan(8, hosts=2, devices_per_host=4, mp=2).device_order(of_hosts)
    assert word in str(caught.value)


def test_the_config_names_every_offender() -> None:
    with pytest.raises(ValueError) as caught:
        MeshConfig(dp=0, mp=0, uneven="drop")  # type: ignore[arg-type]
    assert str(caught.value) == (
        "mesh cannot be used: mp=0 must be at least 1; dp=0 must be at least 1; uneven='drop' is not one of refuse, pad"
    )


def test_a_file_names_the_mesh(tmp_path: Path) -> None:
    path = tmp_path / "mesh.yaml"
    path.write_text("mp: 8\nuneven: pad\n", encoding="utf-8")
    assert load_config(MeshConfig, path) == MeshConfig(dp=None, mp=8, uneven="pad")
    assert load_config(MeshConfig, path, ["dp=32"]).dp == 32
    with pytest.raises(ValueError, match="uneven"):
        load_config(MeshConfig, path, ["uneven=drop"])
