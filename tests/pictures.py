"""What every picture must be, whatever it shows: looked at in its PNG and its words."""

import numpy as np
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.text import Text

from dspark_lab.plots import INK


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
