"""Charts: real PNG files, the same each time."""

import io

import numpy as np
import pytest
from PIL import Image

from dalle_torch.reports import charts

CURVES = {"a": charts.Curve([1, 2, 3], [3, 2, 1], [2, 1, 0.5], [4, 3, 2]), "b": charts.Curve([1, 2], [1, 2])}
DRAWN = {
    "lines": lambda: charts.lines(CURVES, x="step", y="loss", log_y=True),
    "histogram": lambda: charts.histogram([3, 5, 1], [0, 1, 2, 3], x="score", marks={"threshold": 1.5}),
    "scatter": lambda: charts.scatter(
        {"settings": ([1, 2], [3, 4])}, x="FID", y="score", labels={"settings": ["1", "2"]}, joined={"settings": True}
    ),
}


@pytest.mark.parametrize("name", DRAWN)
def test_a_chart_is_a_picture_with_something_on_it_and_the_same_each_time(name):
    data = DRAWN[name]()
    pixels = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
    assert pixels.shape[0] > 300 and len(np.unique(pixels.reshape(-1, 3), axis=0)) > 20
    assert data == DRAWN[name]()


def test_curves_show_where_they_are():
    """A curve more changes the picture."""
    both = charts.lines(CURVES, x="step", y="loss")
    assert both != charts.lines({"a": CURVES["a"]}, x="step", y="loss")


def test_without_matplotlib_it_is_said_what_to_install(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"pip install 'dalle-torch\[eval\]'"):
        charts.lines(CURVES, x="step", y="loss")
