"""Bar charts as SVG, written with the standard library."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from xml.etree import ElementTree as xml

BAR, GAP, LEFT, WIDTH, TOP = 16, 5, 270, 640, 58
FONT = "system-ui, sans-serif"


@dataclass(frozen=True)
class Bar:
    """One bar of parts (colour, length, tooltip) that stand side by side, with a text behind it.

    title: set above the bar, where a group of bars begins.
    """

    label: str
    parts: Sequence[tuple[str, float, str]]
    text: str = ""
    title: str = ""


def chart(heading: str, bars: Sequence[Bar], legend: Sequence[tuple[str, str]], mark: float | None = None) -> str:
    """The chart as text. Lengths share one scale; `mark` is a length at which a line is drawn."""
    longest = max([sum(length for _, length, _ in bar.parts) for bar in bars] + [mark or 0.0]) or 1.0
    scale = WIDTH / longest
    height = TOP + sum(BAR + GAP + (22 if bar.title else 0) for bar in bars) + 12
    size = {"width": str(LEFT + WIDTH + 150), "height": str(height)}
    root = xml.Element("svg", {"xmlns": "http://www.w3.org/2000/svg", **size, "font-family": FONT})
    root.set("viewBox", f"0 0 {size['width']} {size['height']}")
    xml.SubElement(root, "rect", {"width": "100%", "height": "100%", "fill": "white"})
    _text(root, 12, 20, heading, size="14", weight="bold")
    x = 12.0
    for colour, name in legend:
        xml.SubElement(root, "rect", {"x": f"{x:g}", "y": "30", "width": "12", "height": "12", "fill": colour})
        _text(root, x + 17, 40, name)
        x += 34 + 6.6 * len(name)
    y = TOP
    texts = xml.Element("g")  # above the line
    for bar in bars:
        if bar.title:
            y += 22
            _text(texts, 12, y - 7, bar.title, weight="bold")
        _text(texts, LEFT - 8, y + 12, bar.label, anchor="end")
        at = float(LEFT)
        for colour, length, tip in bar.parts:
            place = {"x": f"{at:.1f}", "y": str(y), "width": f"{length * scale:.1f}", "height": str(BAR)}
            part = xml.SubElement(root, "rect", {**place, "fill": colour})
            xml.SubElement(part, "title").text = tip
            at += length * scale
        _text(texts, at + 6, y + 12, bar.text)
        y += BAR + GAP
    if mark is not None:
        x = LEFT + mark * scale
        line = {"x1": f"{x:.1f}", "x2": f"{x:.1f}", "y1": str(TOP - 6), "y2": str(y)}
        xml.SubElement(root, "line", {**line, "stroke": "#444", "stroke-dasharray": "3 3"})
    root.append(texts)
    xml.indent(root, " ")
    return xml.tostring(root, encoding="unicode") + "\n"


def _text(
    root: xml.Element, x: float, y: float, text: str, size: str = "12", weight: str = "normal", anchor: str = "start"
) -> None:
    place = {"x": f"{x:.1f}", "y": f"{y:g}", "font-size": size, "font-weight": weight, "text-anchor": anchor}
    halo = {"stroke": "white", "stroke-width": "4", "paint-order": "stroke"}
    xml.SubElement(root, "text", {**place, **halo}).text = text
