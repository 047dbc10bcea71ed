"""The page: one file that loads nothing, whose data are the trace's, and which is not too large."""

import base64
import hashlib
import io
import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch

from htm_pytorch.memory import Span
from htm_pytorch.report import Moment, Recalled, Recorder, Seen, Trace, write_report
from htm_pytorch.report.page import decoded, render
from htm_pytorch.report.png import sprite_sheet
from tests.report.makers import make_model, make_trace
from tests.test_public_api import BLOCK, run_python

VOID = {"meta", "img", "input", "br", "link"}


class Page(HTMLParser):
    """Parses strictly: every element is closed in its turn."""

    def __init__(self, text: str):
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.texts: dict[str, list[str]] = {}
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open:
            self.texts.setdefault(self.open[-1], []).append(data)

    def find(self, tag: str, **wanted: str) -> dict[str, str | None]:
        (found,) = [a for t, a in self.elements if t == tag and wanted.items() <= a.items()]
        return found


def data_of(text: str) -> dict[str, Any]:
    found = re.search(r'<script type="application/json" id="trace">(.*?)</script>', text, re.DOTALL)
    assert found
    return json.loads(found[1])


def test_it_is_html_whose_elements_close_in_turn() -> None:
    page = Page(render(make_trace()))
    assert page.texts["title"] == page.texts["h1"] == ["Nine <steps> & more"]
    assert page.find("input")["type"] == "range"
    assert page.find("input")["max"] == "8"
    assert page.find("input")["aria-label"]
    assert page.find("p", id="said")["aria-live"] == "polite"
    assert page.find("html")["lang"] == "en"
    assert page.find("meta", name="viewport")
    ids = [a["id"] for _, a in page.elements if "id" in a]
    assert len(ids) == len(set(ids))


def test_the_script_looks_for_elements_that_are_there() -> None:
    text = render(make_trace())
    ids = {attributes.get("id") for _, attributes in Page(text).elements}
    assert set(re.findall(r'\bel\("(\w+)"\)', text)) <= ids
    assert len(text.partition("<script>")[2].splitlines()) < 225


def test_nothing_is_loaded_and_the_policy_says_so() -> None:
    text = render(make_trace())
    addresses = set(re.findall(r"https?:[^\s\"'<>)]*", text))
    assert addresses == {"http://www.w3.org/2000/svg"}
    page = Page(text)
    policy = page.find("meta", **{"http-equiv": "Content-Security-Policy"})["content"]
    assert policy is not None
    rules = dict(rule.split(" ", 1) for rule in policy.split("; "))
    assert rules["default-src"] == rules["base-uri"] == rules["form-action"] == "'none'"
    assert rules["img-src"] == "data:"
    script = text.partition("<script>")[2].partition("</script>")[0]
    for name, part in (("style-src", page.texts["style"]), ("script-src", [script])):
        digest = hashlib.sha256("".join(part).encode()).digest()
        assert rules[name] == f"'sha256-{base64.b64encode(digest).decode()}'"
    # The policy comes before whatever it is to hold for.
    assert text.index("Content-Security-Policy") < text.index("<style>")
    assert not [a for _, a in page.elements if "style" in a or any(k[:2] == "on" for k in a)]
    sources = [a[k] for _, a in page.elements for k in ("src", "href") if k in a]
    assert len(sources) == 1 and str(sources[0]).startswith("data:image/png;base64,")


def test_the_data_inside_are_those_of_the_trace() -> None:
    trace = make_trace()
    data = data_of(render(trace))
    assert data["labels"] == [f"word{n}" for n in range(9)]
    assert data["rewards"] == [0] * 8 + [1]
    assert data["chunks"] == [[0, 0, 4, "", None], [1, 4, 4, "", None]]
    assert data["axis"] == [[0, 4, 0], [4, 4, 1], [8, 1, -1]]
    assert data["stops"] == [[s, {4: 0, 8: 1}.get(s, -1)] for s in range(9)]
    for got, moment in zip(data["moments"], trace.moments, strict=True):
        step, action, value, asked, layers, label = got
        assert (step, action, value, asked, label) == (
            moment.step,
            moment.action,
            moment.value,
            moment.asked,
            "",
        )
        for layer, same in zip(layers, moment.layers, strict=True):
            for (chunk, weight, text), one in zip(layer, same, strict=True):
                assert (chunk, weight) == (one.chunk, one.weight)
                assert decoded(text) == pytest.approx(one.step_weights, abs=1 / 8000)


def test_nothing_in_the_data_ends_the_script() -> None:
    steps = (Seen("</script><script>alert(1)</script>"), Seen("<!--"), Seen("&lt;")) * 3
    trace = make_trace(steps=steps, title="</title><script>alert(2)</script>")
    text = render(trace)
    assert data_of(text)["labels"] == [step.label for step in steps]
    scripts = [a for t, a in Page(text).elements if t == "script"]
    assert scripts == [{"type": "application/json", "id": "trace"}, {}]


def test_the_table_says_in_words_what_was_recalled() -> None:
    page = Page(render(make_trace()))
    cells = page.texts["td"]
    assert cells[:4] == ["4", "N", "0.5", "chunk 0 (100%) asked about"]
    assert cells[4:] == ["8", "S", "0.25", "chunk 1 (75%) asked about, chunk 0 (25%)"]


def test_frames_are_found_again_in_the_sheet() -> None:
    image = pytest.importorskip("PIL.Image")
    numpy = pytest.importorskip("numpy")
    frames = torch.randint(256, (7, 20, 24, 3), dtype=torch.uint8)
    few = torch.randint(2, (7, 20, 24, 1), dtype=torch.uint8).expand(-1, -1, -1, 3) * 200
    for given in (frames, few.contiguous()):
        given = torch.cat([given, given[:3]])
        png, places, columns, (width, height) = sprite_sheet(given, 10**9)
        assert (width, height) == (24, 20)
        assert len(set(places)) == 7 and places[:3] == places[7:]
        sheet = numpy.asarray(image.open(io.BytesIO(png)).convert("RGB"))
        for frame, place in zip(given, places, strict=True):
            top, left = place // columns * height, place % columns * width
            found = sheet[top : top + height, left : left + width]
            assert numpy.array_equal(found, frame.numpy())


def test_frames_are_made_smaller_where_they_are_too_many() -> None:
    frames = torch.randint(256, (40, 64, 64, 3), dtype=torch.uint8)
    made = sprite_sheet(frames, 200_000)
    assert made.size == (32, 32) and len(made.png) < 200_000
    assert made.places == list(range(40))
    large = torch.zeros(2, 1000, 501, 3, dtype=torch.uint8)
    assert sprite_sheet(large, 200_000).size == (126, 250)
    fewer = sprite_sheet(frames, 20_000)
    assert fewer.size == (16, 16) and len(fewer.png) < 20_000
    assert fewer.places == [n // 2 if n % 2 == 0 else -1 for n in range(40)]
    none = sprite_sheet(frames, 100)
    assert set(none.places) == {-1}


def long_trace(steps: int) -> Trace:
    """Every step is a moment, at which each of two layers recalls four chunks of 16."""
    count = steps // 16
    chunks = tuple(Span(n, 16 * n, 16, 0) for n in range(count))
    inside = tuple(float(w) for w in torch.rand(16).softmax(0))
    moments = tuple(
        Moment(step, (tuple(Recalled((step + n) % count, 0.25, inside) for n in range(4)),) * 2)
        for step in range(steps)
    )
    frames = torch.randint(256, (steps, 32, 32, 3), dtype=torch.uint8)
    return Trace("long", chunks, moments, (Seen("word"),) * steps, 0, frames)


def test_a_long_sequence_stays_within_the_size_and_says_what_it_left_out(tmp_path: Path) -> None:
    path = write_report(long_trace(1600), tmp_path / "long.html")
    assert 100_000 < path.stat().st_size <= 500_000
    text = path.read_text(encoding="utf-8")
    left_out = re.search(r"every moment but one in (\d+) of 1,600", text)
    assert left_out
    assert re.search(r"[\d,]+ of 1,600 left out", text)
    data = data_of(text)
    assert len(data["stops"]) == 1600
    assert len(data["moments"]) == 1600 // int(left_out[1])
    for step, which in data["stops"]:
        assert which == (step // int(left_out[1]) if step % int(left_out[1]) == 0 else -2)
        if which >= 0:
            assert data["moments"][which][0] == step


def test_what_cannot_be_written_is_refused(tmp_path: Path) -> None:
    trace = make_trace()
    with pytest.raises(ValueError, match="path: expected a file .html, got"):
        write_report(trace, tmp_path / "report.txt")
    with pytest.raises(ValueError, match="path: expected a file in a folder that exists, got"):
        write_report(trace, tmp_path / "nowhere" / "report.html")
    for path in (None, 3):
        with pytest.raises(ValueError, match="path: expected the path of a file, got"):
            write_report(trace, path)  # pyright: ignore[reportArgumentType]
    told = "trace: expected a page of at most 20,000 bytes, got .* with most_bytes="
    with pytest.raises(ValueError, match=told):
        write_report(replace(long_trace(1600), frames=None), tmp_path / "r.html", most_bytes=20_000)
    assert not list(tmp_path.iterdir())


def test_a_sequence_of_tokens_needs_no_frames() -> None:
    model = make_model()
    with Recorder(model) as recorder, torch.no_grad():
        model(torch.randn(1, 20, 8))
    text = render(recorder.trace("tokens", labels=[f"t{n}" for n in range(20)]))
    data = data_of(text)
    assert data["frames"] is None
    assert data["layers"] == 2
    assert len(data["moments"]) == len(data["stops"]) == 20


PLAIN = """
import torch
from htm_pytorch import HTMTransformer
from htm_pytorch.report import Recorder, write_report

model = HTMTransformer(dim=8, depth=1, topk_mems=1, mem_chunk_size=4, mem_chunks=5, window=4)
with Recorder(model) as recorder:
    model(torch.randn(1, 9, 8))
frames = torch.randint(256, (9, 16, 16, 3), dtype=torch.uint8)
write_report(recorder.trace("plain", frames=frames), "plain.html")
"""


def test_a_page_needs_no_optional_package(tmp_path: Path) -> None:
    run_python(BLOCK.replace("'gymnasium'", "'gymnasium', 'PIL'") + PLAIN, tmp_path)
    assert (tmp_path / "plain.html").stat().st_size > 10_000
