"""Pages of one file."""

import base64
import io
import re
from html.parser import HTMLParser

import pytest
from PIL import Image

from dalle_torch.reports.html import Page, data_uri, number


class Reader(HTMLParser):
    """Every address that a page asks for, its text, and whether each tag that was opened is closed."""

    EMPTY = frozenset({"meta", "img", "br", "link"})

    def __init__(self):
        super().__init__()
        self.addresses, self.text, self.open = [], [], []

    def handle_starttag(self, tag, attributes):
        self.addresses += [value for name, value in attributes if name in ("src", "href")]
        if tag not in self.EMPTY:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


def read(page):
    reader = Reader()
    reader.feed(page.render())
    assert not reader.open
    return reader


def full_page():
    page = Page("Scores of <b>", 'a "model"')
    page.heading("<script>alert(1)</script>")
    page.paragraph("a & b")
    page.notice("not the standard score")
    page.table(["name", "loss\nnats"], [["<i>x</i>", 0.5], [None, 12345]], caption="runs")
    page.facts({"settings": {"<k>": [1, 2]}, "sum": 0.1})
    page.image(Image.new("RGB", (4, 4), "red"), "a red square", width=40)
    page.gallery([Image.new("RGB", (4, 4)), "images/a&b.png"], ["<u>one</u>", "two"])
    return page


def test_a_page_is_well_formed_and_needs_nothing_from_elsewhere():
    reader = read(full_page())
    assert [address for address in reader.addresses if not address.startswith("data:image/")] == 2 * ["images/a&b.png"]


def test_pictures_are_read_out_by_their_prompts_and_files_open_by_a_click():
    page = Page("x")
    page.gallery([Image.new("RGB", (4, 4)), "a.png"], ["seed 1", "seed 2"], alts=['a "cat"', "a dog"])
    html = page.render()
    assert 'alt="a &quot;cat&quot;"' in html and 'alt="a dog"></a>' in html and html.count('loading="lazy"') == 2
    assert html.count("<a ") == 1 and '<a href="a.png">' in html


def test_what_comes_in_is_text_and_never_markup():
    html = full_page().render()
    for word in ("<b>", "<i>", "<u>", "<k>", "alert(1)</script>"):
        assert word not in html
    assert "<i>x</i>" in "".join(read(full_page()).text)


def test_pictures_come_back_as_they_were():
    image = Image.effect_noise((9, 7), 80).convert("RGB")
    kind, data = re.fullmatch(r"data:image/(\w+);base64,(.*)", data_uri(image)).groups()
    assert kind == "png"
    assert Image.open(io.BytesIO(base64.b64decode(data))).tobytes() == image.tobytes()


def test_a_page_is_written_whole_with_captions_that_no_file_can_hold(tmp_path):
    page = Page("x")
    page.paragraph("half a pair \ud800 of UTF-16")
    page.save(tmp_path / "page.html")
    assert "half a pair ? of" in (tmp_path / "page.html").read_text(encoding="utf-8")
    assert len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.123456, "0.1235"), (12345, "12,345"), (12345.6, "12,346"), (1e-5, "1e-05"), (True, "yes"), (0.0, "0"),
        (float("nan"), "nan"), (2_587_521_024, "2,587,521,024"), (1.5e9, "1.5e+09"), (999.96, "1,000"),
    ],
)  # fmt: skip
def test_numbers_have_four_digits(value, text):
    assert number(value) == text
