"""The tar reader agrees with Python's own on every archive that is whole, and stops where one is damaged."""

import gzip
import io
import os
import tarfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dalle_torch.data.tar import BAD_NAME, BLOCK, DUPLICATE, MAX_KEY, TOO_LARGE, TarDamage, TarReader, count_samples
from tests.shard_files import read_tar, write_tar

LIMITS = {"txt": 5000, "npy": 3_000_000}


def read(data: bytes, limits=LIMITS, offset=0):
    """(samples, damage)."""
    samples = []
    try:
        for sample in TarReader(io.BytesIO(data), len(data), limits).samples(offset):
            samples.append(sample)
    except TarDamage as damage:
        return samples, str(damage)
    return samples, None


@settings(max_examples=60, deadline=None)
@given(
    sizes=st.lists(st.tuples(st.integers(0, 2000), st.sampled_from([0, 1, 511, 512, 513, 2_500_000])), max_size=6),
    name=st.text(st.characters(exclude_characters="./\0\\", exclude_categories=["Cs"]), min_size=1, max_size=150),
    format=st.sampled_from([tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT]),
)
def test_it_reads_what_tarfile_wrote(tmp_path_factory, sizes, name, format):
    path = tmp_path_factory.mktemp("tar") / "a.tar"
    name = f"dir/x{name[:80] if format == tarfile.USTAR_FORMAT else name}"
    try:
        write_tar(
            path, [(f"{name}{i}", {"txt": os.urandom(a), "npy": bytes(b)}) for i, (a, b) in enumerate(sizes)], format
        )
    except ValueError:
        return  # a name that the oldest format has no room for
    samples, damage = read(path.read_bytes())
    assert damage is None
    assert {sample.key: sample.members for sample in samples} == read_tar(path)
    assert [sample.problem for sample in samples] == [None] * len(sizes)
    for index, sample in enumerate(samples):
        again, _ = read(path.read_bytes(), offset=sample.offset)
        assert [other.key for other in again] == [other.key for other in samples[index:]]


def test_only_listed_members_are_read_and_only_up_to_their_limit(tmp_path):
    members = {"txt": b"a" * 5001, "pyd": b"x" * 9000, "npy": b"n"}
    data = write_tar(tmp_path / "a.tar", [("a", members), ("b", {"TXT": b"b", "cls": b"1"})]).read_bytes()
    (first, second), damage = read(data)
    assert damage is None
    assert (first.problem, set(first.members)) == (TOO_LARGE, {"npy"})
    assert (second.problem, second.members, second.seen) == (None, {"txt": b"b"}, ["txt", "cls"])


def test_a_member_that_comes_twice_spoils_its_sample(tmp_path):
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        for name in ("a.txt", "a.txt", "b.txt"):
            archive.addfile(tarfile.TarInfo(name))
    samples, _ = read((tmp_path / "a.tar").read_bytes())
    assert [(sample.key, sample.problem) for sample in samples] == [("a", DUPLICATE), ("b", None)]


def test_links_devices_folders_and_hidden_names_are_passed_over(tmp_path):
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        for name, kind in (("d", tarfile.DIRTYPE), ("l.txt", tarfile.SYMTYPE), ("h.txt", tarfile.LNKTYPE),
                           ("c.txt", tarfile.CHRTYPE), ("__meta.txt", tarfile.REGTYPE), ("__dotless", tarfile.REGTYPE),
                           (".hidden", tarfile.REGTYPE), ("f.txt", tarfile.REGTYPE)):  # fmt: skip
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, "/etc/passwd"
            archive.addfile(info)
    samples, damage = read((tmp_path / "a.tar").read_bytes())
    assert ([sample.key for sample in samples], damage) == (["f"], None)


@pytest.mark.parametrize("format", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_a_name_without_an_extension_or_too_long_makes_a_bad_sample(format, tmp_path):
    longest, longer = "x" * MAX_KEY, "y" * (MAX_KEY + 1)
    with tarfile.open(tmp_path / "a.tar", "w", format=format) as archive:
        for name in (
            "a",
            "a.txt",
            "sub/README",
            f"{longest}.txt",
            f"{longer}1.txt",
            f"{longer}1.npy",
            f"{longer}2.txt",
        ):
            archive.addfile(tarfile.TarInfo(name))
    data = (tmp_path / "a.tar").read_bytes()
    samples, damage = read(data)
    assert damage is None
    assert [(sample.key, sample.problem) for sample in samples] == [
        ("a", BAD_NAME), ("a", None), ("sub/README", BAD_NAME), (longest, None),
        (longer[:MAX_KEY], BAD_NAME), (longer[:MAX_KEY], BAD_NAME),
    ]  # fmt: skip
    assert not any(sample.members for sample in samples if sample.problem)
    assert count_samples(io.BytesIO(data), len(data)) == (6, None)


def whole(tmp_path: Path, count=4) -> bytes:
    return write_tar(
        tmp_path / "a.tar", [(str(i), {"txt": b"t" * 600, "npy": b"n" * 700}) for i in range(count)]
    ).read_bytes()


def test_wherever_it_is_cut_off_what_came_before_is_read(tmp_path):
    data = whole(tmp_path)
    sample_bytes = 2 * BLOCK + 2 * 1024
    for length in range(0, 4 * sample_bytes, 256):
        samples, damage = read(data[:length])
        assert damage, "a cut is noticed"
        assert all(sample.members.get("txt") == b"t" * 600 for sample in samples)
        # A sample whose last member may still have been to come counts as whole.
        assert length // sample_bytes <= len(samples) <= length // sample_bytes + 1
    assert read(data[: 4 * sample_bytes])[1] == "it ends without the mark of its end"


def test_a_wrong_byte_in_a_header_is_damage(tmp_path):
    data = bytearray(whole(tmp_path))
    data[2 * (BLOCK + 1024) + 3] ^= 1
    samples, damage = read(bytes(data))
    assert [sample.key for sample in samples] == ["0"]
    assert damage == "no header at byte 3,072"


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "cut off at byte 0"),
        (b"x", "cut off at byte 1"),
        (b"x" * 4096, "no header at byte 0"),
        (gzip.compress(bytes(5000)) * 40, "compressed with gzip; unpack it first"),
    ],
)
def test_what_is_no_tar_says_so(data, message):
    samples, damage = read(data)
    assert samples == []
    assert message in damage


def test_a_name_of_gigabytes_is_not_read():
    info = tarfile.TarInfo("x.txt")
    header = bytearray(info.tobuf(tarfile.GNU_FORMAT))
    info.type, info.size = tarfile.GNUTYPE_LONGNAME, 1 << 33
    header = info.tobuf(tarfile.GNU_FORMAT)[:BLOCK]
    assert "announces a name of" in read(header + bytes(BLOCK))[1]


def test_counting_reads_headers_alone(tmp_path):
    data = whole(tmp_path)

    class Watched(io.BytesIO):
        taken = 0

        def read(self, size=-1):
            found = super().read(size)
            Watched.taken += len(found)
            return found

    large = write_tar(tmp_path / "b.tar", [(str(i), {"bin": bytes(5_000_000)}) for i in range(4)]).read_bytes()
    assert count_samples(Watched(large), len(large)) == (4, None)
    assert Watched.taken < len(large) // 2, "large members are jumped over"
    count, damage = count_samples(io.BytesIO(data[:7000]), 7000)
    assert count == 2 and damage is not None
