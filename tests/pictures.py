"""What every picture must be, whatever it shows: looked at in its PNG and its words."""

import io
import warnings
from collections.abc import Callable, Mapping
from functools import cache

import numpy as np
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.text import Text
from PIL import Image

from dspark_lab.explore import png
from dspark_lab.explore.style import INK


def gallery(
    pictures: Mapping[str, Callable[[], Figure]],
) -> tuple[Callable[[str], Figure], Callable[[str], np.ndarray]]:
    """Each picture by name, and its pixels; made once, and without a warning."""

    @cache
    def picture_of(name: str) -> Figure:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            return pictures[name]()

    @cache
    def pixels_of(name: str) -> np.ndarray:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            return pixels(picture_of(name))

    return picture_of, pixels_of


def pixels(figure: Figure) -> np.ndarray:
    """The figure's PNG as [row, column, red green blue alpha], 0 to 255."""
    file = png(figure)
    assert file.startswith(b"\x89PNG\r\n\x1a\n")
    return np.asarray(Image.open(io.BytesIO(file)).convert("RGBA")).astype(int)


def has_no_background(pixels: np.ndarray) -> None:
    """``pixels``: [row, column, red green blue alpha], 0 to 255."""
    alpha = pixels[..., 3]
    assert alpha[0, 0] == alpha[-1, -1] == 0
    assert (alpha == 0).mean() > 0.2


def vanishes_nowhere(pixels: np.ndarray) -> None:
    """Neither on a black nor on a white page."""
    opaque = pixels[pixels[..., 3] > 128]
    assert opaque[:, :3].max(axis=-1).min() > 80
    assert opaque[:, :3].min(axis=-1).max() < 160


def has_mid_grey_words(figure: Figure) -> None:
    """All that are seen; of a figure that was drawn."""
    words = [text for text in figure.findobj(Text) if text.get_text().strip()]
    assert len(words) > 5
    assert {to_hex(text.get_color()) for text in words if text.get_visible()} == {INK}
