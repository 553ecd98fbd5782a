"""The pictures of a film: how many of them, and what is written below each."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from matplotlib.colors import to_rgb
from PIL import Image, ImageDraw, ImageFont

from pmoe_lightning.evaluation.figures import component_colors

_STRIP, _BAND, _MARGIN, _FONT = 46, 14, 8, 15  # pixels
_MIN_WIDTH = 400
_MAX_FPS = 30


def steps_between_pictures(length: int, max_frames: int, seconds_per_step: float) -> int:
    """Every how many steps to draw, so that an episode has about ``max_frames`` pictures and 30 a second at most."""
    affordable = math.ceil(length / max(max_frames - 1, 1))  # the first picture shows the state before any step
    useful = int(1 / (_MAX_FPS * seconds_per_step) + 1e-6)
    return max(1, affordable, useful)


def film_frame(
    picture: np.ndarray, caption: str, components: Sequence[int], num_components: int, length: int
) -> np.ndarray:
    """A picture above a strip with a caption, the acting component, and a band of those that acted so far.

    Args:
        picture: uint8 [H, W, 3]; enlarged by a whole number where the caption would not fit.
        caption: one line of text.
        components: the component that acted in every step so far, the present one last.
        num_components: K; with one component the band shows how far the episode is.
        length: steps of the whole episode, the width of the band.

    Returns:
        uint8 [H', W', 3] with even sides, which video formats ask for.
    """
    factor = -(-_MIN_WIDTH // picture.shape[1])
    picture = picture.repeat(factor, 0).repeat(factor, 1)
    height, width = (side // 2 * 2 for side in picture.shape[:2])  # cut a line rather than stretch the picture
    palette = np.array([to_rgb(color) for color in component_colors(num_components)]) * 255
    strip = np.full((_STRIP, width, 3), 255, np.uint8)
    strip[-_BAND:] = _band(components, palette, max(length, len(components)), width)
    image = Image.fromarray(np.concatenate([picture[:height, :width], strip]))
    draw, font = ImageDraw.Draw(image), ImageFont.load_default(_FONT)
    top = height + 7
    draw.text((_MARGIN, top), caption, fill="black", font=font)
    if num_components > 1 and len(components):
        said = f"component {components[-1]}"
        left = width - _MARGIN - draw.textlength(said, font=font)
        draw.text((left, top), said, fill="black", font=font)
        color = tuple(palette[components[-1]].astype(int))
        draw.rectangle((left - 26, top, left - 8, top + _FONT + 1), fill=color)
    return np.asarray(image)


def _band(components: Sequence[int], palette: np.ndarray, length: int, width: int) -> np.ndarray:
    """Colours [W, 3]: a stretch for every step of the episode, light grey for those to come."""
    steps = np.full((max(length, 1), 3), 225.0)
    if len(components):
        steps[: len(components)] = palette[np.asarray(components)]
    return steps[np.arange(width) * len(steps) // width].astype(np.uint8)
