"""Every kind of input to samples; what cannot be used is a skip with its reason, not an error."""

import io
import json
import os
import tarfile

import pytest

from dalle_torch.data.captions import (
    BAD_JSON,
    CAPTION_TOO_LONG,
    NO_CAPTION,
    NOT_UTF8,
    plain_fields,
    read_caption,
    safe_key,
)
from dalle_torch.data.decoding import Decoder, decoded
from dalle_torch.data.sources import NO_IMAGE, SHARD_DAMAGED, RawSample, Skip, check_captions, find_parts
from dalle_torch.data.tar import BAD_NAME, DUPLICATE, MAX_KEY, TOO_LARGE
from tests.shard_files import captioned, good_tar, jsonl, picture, write_tar


def parts_of(*inputs, caption_key=None, image_key="image", lines_a_part=100):
    return find_parts([str(name) for name in inputs], caption_key, image_key, lines_a_part)


def read(*inputs, **options):
    """(good samples, {key: reason}) of all parts."""
    items = [item for part in parts_of(*inputs, **options) for item in part.samples()]
    good = [item for item in items if isinstance(item, RawSample)]
    return good, {item.key: item.reason for item in items if isinstance(item, Skip)}


def write_parquet(path, **columns):
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.table(columns), path)
    return path


@pytest.mark.parametrize("extension", ["jpg", "jpeg", "png", "webp", "JPG"])
def test_a_tar_with_text_or_json(tmp_path, extension):
    members = {"json": json.dumps({"caption": "from json", "clip_score": 0.5, "list": [1]}).encode()}
    write_tar(tmp_path / "a.tar", [
        ("x/1", {extension: b"image", "txt": " a caption\n".encode("utf-8-sig")}),
        ("x/2", {extension: b"image", **members}),
        ("x/3", {extension: b"image", "txt": b"text first", **members}),
    ])  # fmt: skip
    good, skipped = read(tmp_path / "a.tar")
    assert skipped == {}
    assert [(item.key, item.caption) for item in good] == [
        ("x/1", "a caption"),
        ("x/2", "from json"),
        ("x/3", "text first"),
    ]
    assert good[1].metadata == {"clip_score": 0.5}
    good, _ = read(tmp_path / "a.tar", caption_key="caption")
    assert [item.caption for item in good] == ["from json", "from json"]


def test_what_a_tar_may_lack(tmp_path):
    write_tar(tmp_path / "a.tar", [
        ("good", captioned(0)),
        ("no-image", {"txt": b"x"}),
        ("no-caption", {"jpg": b"x"}),
        ("blank", {"jpg": b"x", "txt": b" \n"}),
        ("latin", {"jpg": b"x", "txt": "café".encode("latin-1")}),
        ("json", {"jpg": b"x", "json": b"{"}),
        ("deep", {"jpg": b"x", "json": b"[" * 100_000}),
        ("long", {"jpg": b"x", "txt": b"x" * 100_000}),
        ("number", {"jpg": b"x", "json": b'{"caption": 3}'}),
        ("half", {"jpg": b"x", "json": b'{"caption": "\\ud800"}'}),
        ("good", captioned(1)),
        ("end", captioned(2)),
    ])  # fmt: skip
    good, skipped = read(tmp_path / "a.tar")
    assert [item.key for item in good] == ["good", "end"]
    assert skipped == {"no-image": NO_IMAGE, "no-caption": NO_CAPTION, "blank": NO_CAPTION, "latin": NOT_UTF8,
                       "json": BAD_JSON, "deep": BAD_JSON, "long": TOO_LARGE, "number": NO_CAPTION, "half": NOT_UTF8,
                       "good": DUPLICATE}  # fmt: skip


def test_a_tar_that_is_cut_off_or_empty_gives_what_it_has(tmp_path):
    data = good_tar(tmp_path / "a.tar", 4).read_bytes()
    (tmp_path / "a.tar").write_bytes(data[: data.index(b"picture 2")])
    (tmp_path / "b.tar").write_bytes(b"")
    good, skipped = read(tmp_path / "a.tar", tmp_path / "b.tar")
    assert [item.key for item in good] == ["00000", "00001"]
    assert skipped == {"a.tar": SHARD_DAMAGED, "b.tar": SHARD_DAMAGED}


def test_a_folder_with_metadata(tmp_path):
    (tmp_path / "sub.d").mkdir()
    for name in ("a.jpg", "sub.d/b.c.png", "__c.jpg"):
        (tmp_path / name).write_bytes(picture())
    jsonl(tmp_path / "metadata.jsonl", [
        {"file_name": "a.jpg", "text": "first", "width": 3},
        {"file_name": "sub.d/b.c.png", "caption": ["second", "other"]},
        b"",
        {"file_name": "../secret.jpg", "text": "x"},
        {"file_name": "/etc/passwd", "text": "x"},
        {"text": "no name"},
        b"no json",
        b'{"text": "' + b"x" * (1 << 21) + b'"}',
        {"file_name": "a.jpg", "text": "again"},
        {"file_name": "__c.jpg", "text": "third"},
    ])  # fmt: skip
    for lines_a_part in (100, 1, 4):
        good, skipped = read(tmp_path, lines_a_part=lines_a_part)
        good = [item for item in good if item.caption != "again"]  # seen as a duplicate within a part
        assert [(item.key, item.caption) for item in good] == [("a", "first"), ("sub_d/b_c", "second"), ("_c", "third")]
        assert good[0].metadata == {"width": 3}
        assert all(item.image() == picture() for item in good)
        reasons = [NO_IMAGE] * 3 + [BAD_JSON] * 2
        assert [
            skipped[f"line {number}"] for number in (3, 4, 5, 6, 7) if f"line {number}" in skipped
        ] or lines_a_part == 1
        if lines_a_part == 100:
            assert skipped == {
                **{f"line {n}": reason for n, reason in zip(range(3, 8), reasons, strict=True)},
                "a": DUPLICATE,
            }
    assert len(parts_of(tmp_path, lines_a_part=4)) == 3
    assert parts_of(f"{tmp_path}/metadata.jsonl")[0].name == f"{tmp_path.name}-00000"


def test_names_in_metadata_that_are_no_file(tmp_path):
    (tmp_path / "folder.jpg").mkdir()
    os.mkfifo(tmp_path / "pipe.jpg")
    (tmp_path / "loop.jpg").symlink_to("loop.jpg")
    (tmp_path / "null.jpg").symlink_to("/dev/null")
    (tmp_path / "good.jpg").write_bytes(picture())
    names = ["folder.jpg", "pipe.jpg", "loop.jpg", "null.jpg", "good.jpg/x", "nul\0.jpg", "x" * 300, "\ud800.jpg",
             "good.jpg"]  # fmt: skip
    jsonl(tmp_path / "metadata.jsonl", [{"file_name": name, "text": "x"} for name in names])
    decoder = Decoder(resolution=16, max_pixels=1 << 20, text=None)
    with decoded(parts_of(tmp_path), decoder, threads=1, ahead=4) as items:
        found = list(iter(lambda: next(items), None))
    assert [item.reason for item in found[:-1]] == [NO_IMAGE] * 8
    assert not isinstance(found[-1], Skip)


def test_parquet_with_bytes_or_the_hubs_structs(tmp_path):
    images = [b"one", b"", None, b"four", b"five"]
    captions = ["a", "b", "c", None, "e"]
    scores = [0.1, 0.2, 0.3, 0.4, 0.5]
    write_parquet(tmp_path / "a.parquet", image=images, caption=captions, clip_score=scores)
    write_parquet(tmp_path / "b.parquet", image=[{"bytes": b"one", "path": None}], text=["x"], url=["http://u"])
    good, skipped = read(tmp_path / "a.parquet")
    assert [(item.key, item.image, item.caption) for item in good] == [
        ("000000000", b"one", "a"),
        ("000000004", b"five", "e"),
    ]
    assert good[1].metadata == {"clip_score": 0.5}
    assert list(skipped.values()) == [NO_IMAGE, NO_IMAGE, NO_CAPTION]
    (item,), _ = read(tmp_path / "b.parquet")
    assert (item.image, item.caption, item.metadata) == (b"one", "x", {"url": "http://u"})


def test_text_in_parquet_that_is_not_utf8(tmp_path):
    import pyarrow as pa

    def strings(*values, kind=None):
        return pa.array(list(values), pa.binary()).view(pa.string()).cast(kind or pa.string())

    bad = strings(b"good", b"caf\xe9", "ä".encode())
    large = pa.array([b"good", b"caf\xe9", "ä".encode()], pa.large_binary()).view(pa.large_string())
    lists = pa.ListArray.from_arrays(pa.array([0, 1, 2, 3]), bad)
    images = pa.StructArray.from_arrays([pa.array([b"x"] * 3), bad], ["bytes", "path"])
    numbers = pa.array([1, 2, 3])
    for number, captions in enumerate((bad, large, lists, bad.dictionary_encode())):
        path = write_parquet(tmp_path / f"{number}.parquet", image=images, caption=captions, n=numbers, url=bad)
        good, skipped = read(path)
        assert [(item.caption, item.image, item.metadata) for item in good] == [
            ("good", b"x", {"n": 1, "url": "good"}),
            ("ä", b"x", {"n": 3, "url": "ä"}),
        ]
        assert skipped == {"000000001": NOT_UTF8}
    (good, other, _), skipped = read(write_parquet(tmp_path / "u.parquet", image=[b"x"] * 3, text=["t"] * 3, url=bad))
    assert (good.metadata, other.metadata, skipped) == ({"url": "good"}, {}, {})


def test_a_damaged_parquet_file_is_skipped(tmp_path):
    data = write_parquet(tmp_path / "a.parquet", image=[bytes(1000)] * 50, caption=["x"] * 50).read_bytes()
    (tmp_path / "a.parquet").write_bytes(data[:-20])
    (tmp_path / "b.parquet").write_bytes(b"")
    assert read(tmp_path / "a.parquet", tmp_path / "b.parquet") == (
        [],
        {"a.parquet": SHARD_DAMAGED, "b.parquet": SHARD_DAMAGED},
    )


def test_a_caption_that_does_not_exist_is_told_at_once(tmp_path):
    write_parquet(tmp_path / "a.parquet", image=[b"x"], caption=["a"])
    many = [(f"{number:04d}", {"jpg": b"x", "json": b'{"title": "t"}'}) for number in range(300)]
    for path in (write_tar(tmp_path / "many.tar", many), write_tar(tmp_path / "few.tar", many[:3])):
        with pytest.raises(ValueError, match="no sample has the caption key alt; the keys it has: title"):
            check_captions(parts_of(path, caption_key="alt"))
        check_captions(parts_of(path, caption_key="title"))
    jsonl(tmp_path / "folder" / "metadata.jsonl", [{"file_name": "a.jpg", "text": "x"}])
    for name, message in (
        ("a.parquet", "has no column alt; it has: image, caption"),
        ("folder", "no sample has the caption key alt; the keys it has: file_name, text"),
    ):
        with pytest.raises(ValueError, match=message):
            check_captions(parts_of(tmp_path / name, caption_key="alt"))
    with pytest.raises(ValueError, match="has no column picture; it has: image, caption"):
        check_captions(parts_of(tmp_path / "a.parquet", image_key="picture"))


def no_alt(count, first=0):
    return [(f"{n:04d}", captioned(n, json=b'{"title": "t"}')) for n in range(first, first + count)]


def test_a_part_that_lacks_the_caption_key_others_have_is_counted(tmp_path):
    write_tar(tmp_path / "0.tar", no_alt(3))
    write_tar(tmp_path / "1.tar", [(str(n), captioned(n, json=b'{"alt": "y"}')) for n in range(3)])
    write_tar(tmp_path / "2.tar", no_alt(150, 200))
    check_captions(parts_of(tmp_path, caption_key="alt"))
    good, skipped = read(tmp_path, caption_key="alt")
    assert [item.caption for item in good] == ["y"] * 3
    assert list(skipped.values()) == [NO_CAPTION] * 153
    for number in range(20):
        write_tar(tmp_path / "many" / f"{number:02d}.tar", no_alt(10))
    with pytest.raises(ValueError, match=r"many/00.tar: no sample has the caption key alt; the keys it has: title"):
        check_captions(parts_of(tmp_path / "many", caption_key="alt"))
    with pytest.raises(ValueError, match="no sample has the caption key alt"):
        read(tmp_path / "many", caption_key="alt")


def test_a_caption_key_where_tars_hold_only_text(tmp_path):
    good_tar(tmp_path / "a.tar", 3)
    with pytest.raises(ValueError) as caught:
        check_captions(parts_of(tmp_path / "a.tar", caption_key="alt"))
    assert str(caught.value) == (
        f"{tmp_path}/a.tar: no sample has the caption key alt; its samples have no JSON; without --caption-key "
        "captions are taken from txt"
    )


def test_a_parquet_file_that_lacks_the_caption_column_others_have_is_counted(tmp_path):
    write_parquet(tmp_path / "0.parquet", image=[b"x"] * 2, caption=["a", "b"])
    write_parquet(tmp_path / "1.parquet", image=[b"x"] * 3, title=["a"] * 3)
    for key in (None, "caption"):
        good, skipped = read(tmp_path / "*.parquet", caption_key=key)
        assert (len(good), list(skipped.values())) == (2, [NO_CAPTION] * 3)
    with pytest.raises(ValueError, match=r"1.parquet has no column caption; it has: image, title"):
        read(tmp_path / "1.parquet")


@pytest.mark.parametrize(
    ("values", "kind"), [([1, 2], "int64"), ([1.5, None], "double"), ([[1], [2]], "int64"), ([True, False], "bool")]
)
def test_a_caption_column_of_numbers_is_told_at_once(values, kind, tmp_path):
    write_parquet(tmp_path / "a.parquet", image=[b"x"] * 2, caption=values)
    with pytest.raises(ValueError, match=f"a.parquet: its column caption is {kind}, and captions are strings"):
        check_captions(parts_of(tmp_path / "a.parquet"))
    write_parquet(tmp_path / "a.parquet", image=[b"x"] * 2, caption=[None, None])
    assert read(tmp_path / "a.parquet") == ([], {f"{n:09d}": NO_CAPTION for n in range(2)})


def test_names_that_no_shard_can_hold_are_counted(tmp_path):
    longest = "x" * MAX_KEY
    write_tar(tmp_path / "a.tar", [(longest, captioned(0)), (longest + "y", captioned(1)), ("b", captioned(2))])
    with tarfile.open(tmp_path / "a.tar", "a") as archive:
        archive.addfile(tarfile.TarInfo("README"))
    good, skipped = read(tmp_path / "a.tar")
    assert ([item.key for item in good], skipped) == ([longest, "b"], {longest: BAD_NAME, "README": BAD_NAME})
    name = "/".join(["d" * 200] * 6)
    jsonl(tmp_path / "metadata.jsonl", [{"file_name": f"{name}/a.jpg", "text": "x"}])
    assert read(tmp_path)[1] == {f"{name}/a"[:MAX_KEY]: BAD_NAME}


def test_two_pictures_of_one_stem(tmp_path):
    names = ("a.jpg", "a.png", "a.png", "b.png")
    for name in names:
        (tmp_path / name).write_bytes(name.encode())
    jsonl(tmp_path / "metadata.jsonl", [{"file_name": name, "text": name} for name in names])
    good, skipped = read(tmp_path)
    assert [(item.key, item.caption, item.image()) for item in good] == [
        ("a", "a.jpg", b"a.jpg"), ("a_png", "a.png", b"a.png"), ("b", "b.png", b"b.png"),
    ]  # fmt: skip
    assert skipped == {"a": DUPLICATE}
    write_tar(tmp_path / "t" / "a.tar", [("a", {"png": b"mask", "jpg": b"picture", "txt": b"x"})])
    (item,), skipped = read(tmp_path / "t")
    assert (item.image, skipped) == (b"picture", {}), "in a tar they are members of one sample, of which jpg goes first"


def test_a_folder_of_pictures_alone_is_told_what_it_lacks(tmp_path):
    (tmp_path / "a.jpg").write_bytes(picture())
    with pytest.raises(FileNotFoundError) as caught:
        parts_of(tmp_path)
    assert str(caught.value) == (
        f"{tmp_path} has no tar, no parquet file and no metadata.jsonl. A folder of pictures needs metadata.jsonl in "
        'it, with a line for each picture: {"file_name": "a.jpg", "text": "a red car"}'
    )
    with pytest.raises(FileNotFoundError, match="^no shard matches"):
        parts_of(tmp_path / "*.tar")


def test_a_folder_of_pictures_with_brackets_in_its_name(tmp_path):
    folder = tmp_path / "my {photos} [1]"
    jsonl(folder / "metadata.jsonl", [{"file_name": "a[1].jpg", "text": "x"}])
    (folder / "a[1].jpg").write_bytes(b"picture")
    (item,), skipped = read(folder)
    assert (item.key, item.image(), skipped) == ("a[1]", b"picture", {})


def test_files_of_one_name_in_two_folders_become_two_shards(tmp_path):
    for folder in ("x", "y"):
        good_tar(tmp_path / folder / "0.tar", 1)
    assert [part.name for part in parts_of(tmp_path / "x", tmp_path / "y")] == ["x-0", "y-0"]
    assert [part.name for part in parts_of(tmp_path / "x")] == ["0"]
    for folder in ("p/x", "q/x", "p/y"):
        good_tar(tmp_path / folder / "0.tar", 1)
        good_tar(tmp_path / folder / "only-p-y.tar" if folder == "p/y" else tmp_path / folder / "1.tar", 1)
    names = [part.name for part in parts_of(tmp_path / "p" / "x", tmp_path / "q" / "x", tmp_path / "p" / "y")]
    assert names == ["only-p-y", "p-x-0", "p-x-1", "q-x-0", "q-x-1", "y-0"]
    (tmp_path / "x" / "0.parquet").write_bytes(b"")
    first, second = [part.name for part in parts_of(tmp_path / "x")]
    assert first != second and first.endswith(("-0", "0-" + first[-8:]))


def test_parts_tell_where_they_are_from(tmp_path, monkeypatch):
    path = good_tar(tmp_path / "x" / "0.tar", 1)
    monkeypatch.chdir(tmp_path / "x")
    for name in (path, "0.tar", f"file://{path}"):
        (part,) = parts_of(name)
        assert (part.origin, part.source, part.size) == ("x/0.tar", "0.tar", path.stat().st_size)
    jsonl(tmp_path / "x" / "metadata.jsonl", [{"file_name": f"{n}.jpg", "text": "x"} for n in range(3)])
    first, second = parts_of(".", lines_a_part=2)
    assert second.origin == f"{tmp_path.name}/x/metadata.jsonl:2+1"
    assert (first.size, second.size) == (72, 36)


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("a", ("a", "")),
        (b"\xef\xbb\xbf a ", ("a", "")),
        (["a", "b"], ("a", "")),
        ([], ("", NO_CAPTION)),
        (None, ("", NO_CAPTION)),
        (1.5, ("", NO_CAPTION)),
        ("\ud83d", ("", NOT_UTF8)),
        (b"\xff", ("", NOT_UTF8)),
        ("ä" * 40_000, ("", CAPTION_TOO_LONG)),
    ],
)
def test_captions(value, expected):
    assert read_caption(value) == expected


def test_only_plain_fields_are_kept():
    values = {"caption": "x", "alt": "y", "n": 1, "f": float("nan"), "s": "x" * 2000, "b": True, "l": [1], "k" * 99: 1}
    assert plain_fields(values, "alt") == {"n": 1, "b": True}
    assert len(plain_fields({str(n): n for n in range(1000)}, None)) == 64


@pytest.mark.parametrize(
    ("key", "expected"),
    [("a/b", "a/b"), ("../../etc/x", "etc/x"), ("/abs", "abs"), ("a.b/c.d", "a_b/c_d"), ("__x", "_x"), ("a/", "a/_"),
     ("..\\x", "___x".replace("___", "_"))],
)  # fmt: skip
def test_keys_lead_nowhere(key, expected):
    assert safe_key(key) == expected
    assert io.BytesIO(safe_key(key).encode()).read()
