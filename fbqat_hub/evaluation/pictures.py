"""Pictures of results: grids, side-by-side sheets with labels, and the curve of a training run."""

from __future__ import annotations

import math
import os
import re
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from fbqat_hub.files import whole

_INK, _MUTED, _LINE, _PAPER = "#1d2433", "#667085", "#e4e7ec", "#ffffff"
_TILE, _GAP = 144, 10  # 64 px pictures at 2.25 times their size
_LOSS, _WIDTH = "#3355c8", "#d1671f"


def grid(images: Sequence[Image.Image], columns: int, tile: int | None = None, gap: int = 4) -> Image.Image:
    """Pictures side by side, row by row, on white.

    Args:
        images: pictures; each is resized to ``tile`` x ``tile``.
        columns: pictures in a row, at least 1.
        tile: side in pixels; the first picture's width if None.
        gap: white pixels around each picture.

    Returns:
        RGB picture; a short last row is padded with white.

    Raises:
        ValueError: no pictures, or fewer than one column.
    """
    if not images:
        raise ValueError("No pictures to lay out: the list is empty.")
    if columns < 1:
        raise ValueError(f"columns is {columns}; at least 1 is needed.")
    side = tile or images[0].width
    columns = min(columns, len(images))
    rows = math.ceil(len(images) / columns)
    sheet = Image.new("RGB", (columns * (side + gap) + gap, rows * (side + gap) + gap), _PAPER)
    for number, image in enumerate(images):
        row, column = divmod(number, columns)
        sheet.paste(_tile(image, side), (gap + column * (side + gap), gap + row * (side + gap)))
    return sheet


def comparison_sheet(
    columns: Mapping[str, Sequence[Image.Image]], prompts: Sequence[str], tile: int = _TILE
) -> Image.Image:
    """One row per prompt, one labelled column per model: what each draws from the same prompt and seed.

    Args:
        columns: label -> pictures, one for each prompt, in the order to show; usually the teacher first.
        prompts: the text of each row.
        tile: side of a picture on the sheet in pixels.

    Returns:
        RGB picture.

    Raises:
        ValueError: no columns, no prompts, or a column whose pictures are not as many as the prompts.

    >>> white = Image.new("RGB", (64, 64), "white")
    >>> comparison_sheet({"teacher": [white], "W4A8": [white]}, ["red heart"], tile=64).mode
    'RGB'
    """
    if not columns or not prompts:
        raise ValueError(f"A sheet needs at least one column and one prompt, got {len(columns)} and {len(prompts)}.")
    for label, images in columns.items():
        if len(images) != len(prompts):
            raise ValueError(f"Column {label!r} has {len(images)} pictures for {len(prompts)} prompts; give one each.")
    head_font, row_font = ImageFont.load_default(size=tile * 0.115), ImageFont.load_default(size=tile * 0.1)
    head_width, row_width = int(tile * 0.98), int(tile * 1.05)
    labels = {label: _wrap(label, head_font, head_width) for label in columns}
    head_height = _GAP + math.ceil(max(_height(text, head_font) for text in labels.values())) + _GAP
    left = _GAP + row_width + _GAP
    size = (left + len(columns) * (tile + _GAP) + _GAP, head_height + len(prompts) * (tile + _GAP) + _GAP)
    sheet = Image.new("RGB", size, _PAPER)
    draw = ImageDraw.Draw(sheet)
    for column, (label, images) in enumerate(columns.items()):
        x = left + column * (tile + _GAP)
        draw.multiline_text((x + tile / 2, head_height / 2), labels[label], _INK, head_font, "mm", align="center")
        for row, image in enumerate(images):
            y = head_height + row * (tile + _GAP)
            sheet.paste(_tile(image, tile), (x, y))
            draw.rectangle((x - 1, y - 1, x + tile, y + tile), outline=_LINE)
    for row, prompt in enumerate(prompts):
        middle = head_height + row * (tile + _GAP) + tile / 2
        text = _wrap(prompt, row_font, row_width)
        draw.multiline_text((_GAP + row_width, middle), text, _MUTED, row_font, "rm", align="right")
    return sheet


def training_curve(log: Sequence[Mapping[str, float]], path: str | os.PathLike[str]) -> Path:
    """Draw a run: loss on a logarithmic axis, beside it the bit width where logged.

    Args:
        log: one mapping a logged step with ``step`` and ``loss`` (> 0), and where they apply ``bit_width``
            and ``validation_loss``; other keys are ignored.
        path: PNG to write.

    Returns:
        The file.

    Raises:
        ValueError: nothing logged, or an entry without ``step`` or ``loss``.
    """
    if not log:
        raise ValueError("No training curve to draw: the log is empty.")
    for position, entry in enumerate(log):
        if "step" not in entry or "loss" not in entry:
            raise ValueError(f"Entry {position} of the log has {sorted(entry)}; step and loss are needed.")
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    figure = Figure(figsize=(8, 3.6), dpi=150, layout="constrained")
    canvas = FigureCanvasAgg(figure)
    axis = figure.add_subplot()
    steps, losses = [e["step"] for e in log], [e["loss"] for e in log]
    axis.plot(steps, losses, color=_LOSS, alpha=0.25, linewidth=0.8)
    axis.plot(steps, _smooth(losses), color=_LOSS, linewidth=1.8, label="loss")
    validation = [(e["step"], e["validation_loss"]) for e in log if e.get("validation_loss") is not None]
    if validation:
        axis.plot(*zip(*validation, strict=True), "o-", color=_INK, markersize=4, linewidth=1, label="held-out loss")
    axis.set_yscale("log")
    axis.set_xlabel("step")
    axis.set_ylabel("distillation loss", color=_LOSS)
    axis.tick_params(axis="y", which="both", colors=_LOSS)
    axis.grid(color=_LINE, linewidth=0.8)
    axis.spines[["top", "right"]].set_visible(False)
    axis.margins(x=0.01)
    handles, names = axis.get_legend_handles_labels()

    shown = axis  # the topmost axis carries the legend, so that no line is drawn over it
    widths = [(e["step"], e["bit_width"]) for e in log if e.get("bit_width") is not None]
    if len({width for _, width in widths}) > 1:
        shown = axis.twinx()
        shown.spines["top"].set_visible(False)
        drawn = shown.plot(*zip(*widths, strict=True), color=_WIDTH, linewidth=1.6, drawstyle="steps-post")
        handles, names = [*handles, *drawn], [*names, "bit width"]
        shown.set_ylabel("bit width", color=_WIDTH)
        shown.tick_params(axis="y", colors=_WIDTH)
        shown.set_ylim(bottom=0)
    elif widths:  # a constant is a line of the legend, not an axis
        handles, names = [*handles, Patch(alpha=0)], [*names, f"bit width {widths[0][1]:g} throughout"]
    shown.legend(handles, names, loc="upper right", frameon=True, framealpha=0.9, edgecolor=_LINE)

    path = Path(path)
    with whole(path) as partial, partial.open("wb") as file:
        canvas.print_png(file, metadata={"Software": None})
    return path


def widths_picture(models: Mapping[str, Mapping[str, int]], path: str | os.PathLike[str]) -> Path:
    """Draw which layers have how many bits: a panel per model, a row per kind of layer, a column per block.

    Args:
        models: title of the panel -> layer's full name -> bits, from 3 to 8.
        path: PNG to write.

    Returns:
        The file.

    Raises:
        ValueError: no model, or one without layers.
    """
    if not models or not all(models.values()):
        raise ValueError("No widths to draw: give the bits of at least one layer.")
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.colors import LinearSegmentedColormap
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    grids = {title: _by_block(widths) for title, widths in models.items()}
    cell, names, head, foot = 0.17, 2.9, 0.35, 0.75  # inches
    sides = [(names + 2 * cell * len(next(iter(grid.values()))), cell * len(grid)) for grid in grids.values()]
    width, height = sum(side[0] for side in sides) + 0.2, head + max(side[1] for side in sides) + foot
    figure = Figure(figsize=(width, height), dpi=120)
    canvas = FigureCanvasAgg(figure)
    colours = LinearSegmentedColormap.from_list("bits", [_PAPER, "#c9d3f2", _WIDTH])
    left = 0.0
    for (title, grid), (wide, high) in zip(grids.items(), sides, strict=True):
        place = (left + names, height - head - high, wide - names, high)
        axis = figure.add_axes((place[0] / width, place[1] / height, place[2] / width, place[3] / height))
        left += wide
        values = [[math.nan if bits is None else bits for bits in row] for row in grid.values()]
        axis.pcolormesh(values, cmap=colours, vmin=2, vmax=8, edgecolors=_PAPER, linewidth=1)
        axis.set_yticks([row + 0.5 for row in range(len(grid))], list(grid), fontsize=7)
        axis.set_xticks([column + 0.5 for column in range(len(values[0]))], range(len(values[0])), fontsize=6)
        axis.tick_params(length=0, colors=_MUTED)
        axis.invert_yaxis()
        axis.set_xlabel("block", fontsize=7, color=_MUTED)
        axis.set_title(title, fontsize=9, loc="right")  # names of layers leave room on the left
        axis.spines[:].set_visible(False)
    used = sorted({bits for widths in models.values() for bits in widths.values()})
    patches = [Patch(facecolor=colours((bits - 2) / 6), edgecolor=_MUTED, label=f"{bits} bits") for bits in used]
    figure.legend(handles=patches, loc="lower center", ncols=len(used), fontsize=8, frameon=False)
    path = Path(path)
    with whole(path) as partial, partial.open("wb") as file:
        canvas.print_png(file, metadata={"Software": None})
    return path


def _by_block(widths: Mapping[str, int]) -> dict[str, list[int | None]]:
    """Kind of layer, its name with the block's number left out -> bits by block; a layer of no block is in the first.

    >>> _by_block({"proj": 8, "blocks.0.to_q": 4, "blocks.1.to_q": 8})
    {'proj': [8, None], 'blocks.*.to_q': [4, 8]}
    """
    found: dict[str, dict[int, int]] = {}
    for name, bits in sorted(widths.items(), key=lambda item: (bool(re.search(r"\.\d+\.", item[0])), item[0])):
        number = re.search(r"\.(\d+)\.", name)
        kind = name if number is None else f"{name[: number.start()]}.*.{name[number.end() :]}"
        found.setdefault(kind, {})[int(number[1]) if number else 0] = bits
    columns = 1 + max(number for row in found.values() for number in row)
    return {kind: [row.get(column) for column in range(columns)] for kind, row in found.items()}


def _tile(image: Image.Image, side: int) -> Image.Image:
    image = image.convert("RGB")
    return image if image.size == (side, side) else image.resize((side, side), Image.Resampling.LANCZOS)


def _wrap(text: str, font: ImageFont.ImageFont | ImageFont.FreeTypeFont, width: int) -> str:
    """The text broken into lines no wider than ``width`` pixels, at most 4; a word that is too wide is cut."""
    characters = max(4, int(width / (font.getlength("abcdefghijklmnopqrstuvwxyz") / 26)))
    return "\n".join(textwrap.wrap(text, characters, max_lines=4, placeholder=" …"))


def _height(text: str, font: ImageFont.ImageFont | ImageFont.FreeTypeFont) -> float:
    box = ImageDraw.Draw(Image.new("RGB", (1, 1))).multiline_textbbox((0, 0), text, font)
    return box[3] - box[1]


def _smooth(values: Sequence[float]) -> list[float]:
    """Mean over a centred window of a fiftieth of the run, in the logarithm: a straight line stays one."""
    reach = max(1, len(values) // 100)
    logs = [math.log(max(value, 1e-30)) for value in values]
    windows = (logs[max(0, i - reach) : i + reach + 1] for i in range(len(logs)))
    return [math.exp(sum(window) / len(window)) for window in windows]
