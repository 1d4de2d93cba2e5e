"""Prompts from lines of text and JSON lines."""

import pytest

from dalle_torch.studies.prompts import MAX_SEED, Request, read_prompts


def read(tmp_path, text, name="prompts.txt"):
    path = tmp_path / name
    path.write_text(text, encoding="utf-8", newline="")
    return read_prompts([], str(path))


def test_json_lines_may_have_seeds(tmp_path):
    text = '{"prompt": "a cat", "seed": 7, "more": [1]}\r\n\n { "prompt": ""}\n{"prompt": "\u2028 two", "seed": null}\n'
    expected = [Request("a cat", 7), Request(""), Request("\u2028 two")]
    assert read(tmp_path, text) == expected
    assert read_prompts(["first"], str(tmp_path / "prompts.txt")) == [Request("first"), *expected]


def test_text_is_text_whatever_it_looks_like(tmp_path):
    assert read(tmp_path, 'a cat\n{"prompt": "a dog"}\n') == [Request("a cat"), Request('{"prompt": "a dog"}')]
    assert read(tmp_path, "{curly} letters\n") == [Request("{curly} letters")]


@pytest.mark.parametrize(
    ("second", "words"),
    [
        ("{", "line 3 is no JSON"),
        ("a cat", "line 3 is no JSON"),
        ('["a cat"]', 'line 3 has no "prompt"'),
        ('{"prompt": 3}', 'line 3 has no "prompt"'),
        ('{"caption": "a cat"}', 'line 3 has no "prompt"'),
        ('{"prompt": "a", "seed": -1}', "line 3: seed=-1"),
        ('{"prompt": "a", "seed": "1"}', "line 3: seed='1'"),
        ('{"prompt": "a", "seed": true}', "line 3: seed=True"),
        (f'{{"prompt": "a", "seed": {MAX_SEED + 1}}}', f"line 3: seed={MAX_SEED + 1}"),
    ],
)
def test_a_line_that_is_not_right_is_named(tmp_path, second, words):
    with pytest.raises(ValueError, match="prompts.txt, line 3") as error:
        read(tmp_path, f'{{"prompt": "a"}}\n\n{second}\n')
    assert words in str(error.value)


def test_the_name_says_json_too_and_an_empty_file_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"p\.jsonl, line 1 is no JSON"):
        read(tmp_path, "a cat\n", "p.jsonl")
    with pytest.raises(ValueError, match=r"no prompt: .*p\.jsonl holds none"):
        read(tmp_path, "\n \n", "p.jsonl")
