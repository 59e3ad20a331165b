"""The page of `loraq results --html`: its structure, that it needs nothing from outside, and that it runs nothing."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field, replace
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path

import pytest
from cli_fakes import Command, FakeClient, two_trials, two_trials_answers

from cli.page import charts

VOID = {"meta", "link", "br", "hr", "img", "input", "circle", "line", "path"}
MARKUP = '<script>alert("1")</script> & <img src=x onerror=alert(2)>'


@dataclass
class Element:
    tag: str
    attributes: dict[str, str]
    path: tuple[str, ...]
    text: str = ""


@dataclass
class Document(HTMLParser):
    """Every element with its text; refuses tags that do not match."""

    elements: list[Element] = field(default_factory=list)
    open: list[Element] = field(default_factory=list)

    def __post_init__(self) -> None:
        super().__init__(convert_charrefs=True)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        known = {name: value or "" for name, value in attrs}
        element = Element(tag, known, tuple(parent.tag for parent in self.open))
        self.elements.append(element)
        if tag not in VOID:
            self.open.append(element)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:
            assert self.open.pop().tag == tag

    def handle_data(self, data: str) -> None:
        for element in self.open:
            element.text += data

    def all(self, tag: str) -> list[Element]:
        return [element for element in self.elements if element.tag == tag]


def parsed(html: str) -> Document:
    document = Document()
    document.feed(html)
    document.close()
    assert not document.open
    return document


@pytest.fixture
def html(command: Command, client: FakeClient, tmp_path: Path) -> str:
    """Of a batch with an improvement, no difference, and a failure; labels and questions try to be markup."""
    client.known["medqa"] = [
        replace(job, trial=f"{job.trial} {MARKUP}" if job.trial else "", message=job.message and MARKUP)
        for job in two_trials()
    ]
    client.answers = two_trials_answers(question=MARKUP)
    result = command("results", "medqa", "--html", str(tmp_path / "page.html"))
    assert result.exit_code == 0, result.output
    return (tmp_path / "page.html").read_text(encoding="utf-8")


def test_page_is_well_formed_and_names_every_trial(html: str) -> None:
    document = parsed(html)
    cells = [" ".join(cell.text.split()) for cell in document.all("th") if cell.attributes.get("scope") == "row"]

    for rate in ("0.0002", "0.0001", "0.1"):
        assert f"learning_rate={rate} r=8 {MARKUP}" in cells
    assert "base model (4-bit)" in cells
    [failed] = [p for p in document.all("p") if p.attributes.get("class") == "failed"]
    assert failed.text == f"learning_rate=0.1 r=8 {MARKUP} failed (nan_loss): {MARKUP}"
    assert [h.text for h in document.all("h1")] == ["Results of medqa"]


def test_page_says_where_no_difference_is_shown(html: str) -> None:
    document = parsed(html)
    findings = [td.text for td in document.all("td") if td.attributes.get("data-label") == "finding"]

    assert findings == ["better", "no difference shown", "-", "-"]


def test_page_runs_nothing_and_loads_nothing(html: str) -> None:
    """Everything that was submitted is text: a question, a label, a message."""
    document = parsed(html)

    assert not {"script", "img", "iframe", "object", "embed"} & {element.tag for element in document.elements}
    for element in document.elements:
        assert not any(name.startswith("on") for name in element.attributes)
        assert not {"src", "srcset", "xlink:href", "action"} & element.attributes.keys()
        assert element.attributes.get("href", "data:,") == "data:,"
    assert not re.search(r"https?://|@import|url\(", html)
    [policy] = [m for m in document.all("meta") if m.attributes.get("http-equiv") == "Content-Security-Policy"]
    assert "default-src 'none'" in policy.attributes["content"]
    assert any(p.text == MARKUP for p in document.all("p"))


def test_page_shows_curves_parameters_and_questions(html: str) -> None:
    document = parsed(html)

    assert [caption.text for caption in document.all("figcaption")] == [
        "Training loss by step",
        "Accuracy (likelihood) by training.learning_rate",
    ]
    assert len(document.all("polyline")) == 2
    assert len([g for g in document.all("g") if g.attributes.get("class", "").startswith("point")]) == 2
    assert [summary.text.rpartition(": ")[2] for summary in document.all("summary")][:2] == ["24", "2"]
    assert sum(h.text.startswith("Question ") for h in document.all("h3")) == 26
    captions = [caption.text for caption in document.all("caption")]
    assert captions[2:] == ["base model", f"learning_rate=0.0002 r=8 {MARKUP}"]


def test_page_can_be_read_without_seeing_it(html: str) -> None:
    document = parsed(html)

    assert document.all("html")[0].attributes["lang"] == "en"
    for drawing in document.all("svg"):
        assert drawing.attributes.get("aria-hidden") == "true" or (
            drawing.attributes["role"] == "img" and "0.0002" in drawing.attributes["aria-label"]
        )
    for table in document.all("th"):
        assert table.attributes.get("scope") in ("row", "col")
    levels = [int(e.tag[1]) for e in document.elements if re.fullmatch("h[1-6]", e.tag)]
    assert all(after - before <= 1 for before, after in pairwise(levels))
    assert 'name="viewport"' in html


def palette(css: str) -> dict[str, str]:
    return dict(re.findall(r"--([\w-]+): (#[0-9a-f]{3,6});", css))


def contrast(one: str, other: str) -> float:
    """WCAG 2.2, relative luminance and contrast ratio."""

    def luminance(colour: str) -> float:
        digits = colour[1:] if len(colour) == 7 else "".join(2 * digit for digit in colour[1:])
        shares = [int(digits[i : i + 2], 16) / 255 for i in (0, 2, 4)]
        linear = [s / 12.92 if s <= 0.04045 else ((s + 0.055) / 1.055) ** 2.4 for s in shares]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


def test_colours_have_contrast_in_light_in_dark_and_on_paper(html: str) -> None:
    """Text 4.5 to 1, lines and marks 3 to 1: WCAG 2.2, success criteria 1.4.3 and 1.4.11."""
    looks = [palette(part) for part in re.findall(r":root \{(.*?)\}", html, re.DOTALL)]

    assert len(looks) == 3
    assert "@media (prefers-color-scheme: dark)" in html
    for look in looks:
        for ground in (look["ground"], look["sheet"]):
            assert all(contrast(look[name], ground) >= 4.5 for name in ("text", "quiet", "good", "bad"))
            curves = [f"c{place}" for place in range(charts.COLOURS)]
            assert min(contrast(look[name], ground) for name in curves) >= 3


def test_page_of_several_batches_has_a_part_for_each(command: Command, client: FakeClient, tmp_path: Path) -> None:
    client.known |= {"medqa": two_trials(), "other": two_trials("other")}

    command("results", "medqa", "other", "--filter", "state!=failed", "--html", str(tmp_path / "page.html"))

    document = parsed((tmp_path / "page.html").read_text(encoding="utf-8"))
    assert [h.text for h in document.all("h2") if h.attributes.get("class") == "batch"] == ["medqa", "other"]
    assert len(document.all("polyline")) == 4


def test_page_of_a_batch_that_has_just_begun(command: Command, client: FakeClient, tmp_path: Path) -> None:
    client.known["medqa"] = [replace(job, outcome={}, history=[]) for job in two_trials()]

    result = command("results", "medqa", "--html", str(tmp_path / "page.html"))

    assert result.exit_code == 0, result.output
    assert not parsed((tmp_path / "page.html").read_text(encoding="utf-8")).all("figure")


def test_page_that_cannot_be_written_is_said_in_a_line(command: Command, client: FakeClient, tmp_path: Path) -> None:
    client.known["medqa"] = two_trials()

    result = command("results", "medqa", "--html", str(tmp_path / "nowhere" / "page.html"))

    assert result.exit_code == 1
    assert "No such file or directory" in result.stderr


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (0, 1, [0, 0.2, 0.4, 0.6, 0.8, 1.0]),
        (0, 60, [0, 20, 40, 60]),
        (29.1, 97.3, [20, 40, 60, 80, 100]),
        (-0.3, 2.1, [-0.5, 0, 0.5, 1, 1.5, 2, 2.5]),
        (0, 0, [0, 0.2]),
        (5, 5, [5, 6]),
    ],
)
def test_ticks_are_round_and_enclose(low: float, high: float, expected: list[float]) -> None:
    assert charts.ticks(low, high) == expected


def test_many_values_stand_on_a_logarithmic_scale() -> None:
    rates = [10 ** (-5 + place / 4) for place in range(13)]
    points = [charts.Point(rate, f"{rate:g}", 50.0, 45.0, 55.0, 0, "") for rate in rates]

    drawn = str(charts.point_chart("t", "learning_rate", points, None))

    at = [float(x) for x in re.findall(r'<circle cx="([\d.]+)"', drawn)]
    steps = [after - before for before, after in pairwise(at)]
    assert max(steps) - min(steps) < 0.2
    assert math.isclose(at[0], charts.LEFT)
    assert ">0.001</text>" in drawn
