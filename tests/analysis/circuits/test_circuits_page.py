"""The page of circuits: what it says, and that it works in a browser, on a telephone too."""

from __future__ import annotations

import base64
import csv
import io
import json
import re

import pytest
import torch
from browser import Browser, find_chromium
from matplotlib.image import imread
from test_evolution import byte_model, dialogues

from toolmem.analysis.circuits import head
from toolmem.analysis.circuits import page as writing
from toolmem.analysis.circuits.evolution import material, one_attribute, removed, snapshot
from toolmem.analysis.circuits.page import shown_tokens, write_page
from toolmem.data.tokenizers import ByteTokenizer
from toolmem.errors import ToolmemError
from toolmem.models import Transformer

TOKENIZER = ByteTokenizer()


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Three checkpoints, measured and written; the first says nothing at all."""
    given = material(dialogues()[:6], TOKENIZER, one_attribute(dialogues(people=20)))
    models = [byte_model(), byte_model(conv_width=2), byte_model(qk_norm=True)]
    with torch.no_grad():
        models[0].head.weight.zero_()
    found = [snapshot(model, given, 10 * i) for i, model in enumerate(models)]
    few = material(dialogues("in_weight")[:1], TOKENIZER)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("toolmem.evaluation.recall.MARGIN", -40)  # few tokens: it never ends
        without = removed(models[2], TOKENIZER, few)
    out = tmp_path_factory.mktemp("page") / "mine.html"
    files = write_page(
        out, given, found, TOKENIZER, title="Circuits of <mine>",
        removed=without, circumstances=[("seed", "3 & 4")],
    )  # fmt: skip
    return given, found, files


def data_of(files):
    text = files[0].read_text(encoding="utf-8")
    return json.loads(
        re.search(r'<script type="application/json">(.*?)</script>', text, re.DOTALL)[1]
    )


def test_its_files(made):
    _, found, files = made
    names = [
        "mine.html", "mine_scores.png", "mine_scores.csv", "mine_ablation.png", "mine_ablation.csv",
        "mine_probe.png", "mine_probe.csv", "mine_recall.csv", "mine_neurons.csv", "mine_attention.png",
    ]  # fmt: skip
    assert [path.name for path in files] == names
    for path in files:
        assert path.stat().st_size > 100
    rows = list(csv.DictReader(io.StringIO(files[2].read_text())))
    assert len(rows) == 3 * 6 * 4
    for row in rows:
        by_head = found[int(row["step"]) // 10].scores[row["what"]]
        layer, index = map(int, row["head"].split("."))
        assert float(row["value"]) == pytest.approx(by_head[head(layer, index)])


def test_what_the_slider_moves_through(made):
    given, found, files = made
    data = data_of(files)
    assert data["steps"] == [0, 10, 20]
    assert len(data["tokens"]) == len(given.told[0].tokens)
    assert [one["label"] for one in data["heads"]] == ["0.0", "0.1", "1.0", "1.1"]
    image = base64.b64decode(data["heads"][3]["images"][2].partition("base64,")[2])
    pixels = (torch.from_numpy(imread(io.BytesIO(image), format="png")) * 255).round()[..., 0]
    assert torch.equal(255 - pixels.to(torch.uint8), found[2].weights[head(1, 1)])
    tables = {table["title"]: table for table in data["tables"]}
    assert list(tables) == [
        "Scores", "Activation patching", "Without a part", "Direct effect on the logits", "Logit lens",
        "Linear probes",
    ]  # fmt: skip
    scores = tables["Scores"]
    value = scores["values"][1][2][scores["columns"].index("induction")]
    assert value == round(found[1].scores["induction"][head(1, 0)], 3)
    patching = tables["Activation patching"]["values"]
    assert {cell for row in patching[0] for cell in row} == {None}  # the first says nothing at all
    assert all(cell is not None for row in patching[2] for cell in row)
    lens = tables["Logit lens"]
    assert "".join(name.split("\u200b")[0] for name in lens["columns"]).startswith("FIND")
    at = int(lens["columns"][4].split("\u200b")[1])
    assert lens["values"][2][1][4] == pytest.approx(
        found[2].lens["blocks.0.output"][at - 1].item(), abs=1e-3
    )
    for table in tables.values():
        assert len(table["values"]) == 3
        assert all(len(rows) == len(table["rows"]) for rows in table["values"])


def test_what_is_said_is_text(made):
    text = made[2][0].read_text(encoding="utf-8")
    assert "Circuits of &lt;mine&gt;" in text and "3 &amp; 4" in text
    assert "http://" not in text.replace("http://www.w3.org", "") and "https://" not in text


def test_tokens_as_one_reads_them():
    tokens = torch.tensor([256, *b"a b\n", 0xC3, 257, 258, 259])
    assert shown_tokens(tokens, TOKENIZER) == ["▸", "a", "␣", "b", "⏎", "·", "◂", "▪", "■"]


def test_another_ending_is_refused(made):
    given, found, _ = made
    with pytest.raises(ToolmemError, match=r"must end in \.html"):
        write_page("page.pdf", given, found, TOKENIZER, title="x")


def test_many_heads_are_cut(made, tmp_path, monkeypatch):
    given = material([one.dialogue for one in made[0].told[:3]], TOKENIZER)
    torch.manual_seed(0)
    model = Transformer(260, 14, n_layers=1, n_heads=7, head_dim=2, max_seq_len=192).eval()
    found = [snapshot(model, given, 1)]
    monkeypatch.setattr(writing, "MOST_HEADS", 5)
    files = write_page(tmp_path / "many.html", given, found, TOKENIZER, title="x")
    assert len(data_of(files)["heads"]) == 5
    assert "2 heads that lead in no score are left out" in files[0].read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def chromium():
    program = find_chromium()
    if program is None:
        pytest.skip("no Chromium on the PATH: the page of circuits is not tried in a browser")
    with Browser(program) as browser:
        yield browser


@pytest.mark.parametrize(("width", "height"), [(390, 844), (1200, 900)])
def test_it_works_in_a_browser(chromium, made, width, height):
    _, found, files = made
    chromium.events.clear()
    chromium.send(
        "Emulation.setDeviceMetricsOverride",
        width=width, height=height, deviceScaleFactor=1, mobile=width < 600,
    )  # fmt: skip
    address = files[0].as_uri()
    chromium.open(address)
    assert chromium.run("document.documentElement.scrollWidth") <= width
    table = "document.querySelector('.circuits .tables table')"
    read = f"[...{table}.querySelectorAll('td')].map(cell => cell.textContent)"
    for at in (2, 0, 1):
        chromium.run(
            f"(() => {{ const s = document.querySelector('#circuits-step'); s.value = {at};"
            " s.dispatchEvent(new Event('input')); })()"
        )
        assert chromium.run("document.querySelector('.circuits output').textContent") == (
            f"{10 * at} ({at + 1} of 3)"
        )
        shown = chromium.run(read)
        scores = found[at].scores
        expected = [f"{s[node]:.2f}" for node in scores["induction"] for s in scores.values()]
        assert [abs(float(a) - float(b)) < 0.011 for a, b in zip(shown, expected, strict=True)] == [
            True
        ] * 24
        hrefs = chromium.run(
            "[...document.querySelectorAll('.circuits image')].map(i => i.getAttribute('href'))"
        )
        assert hrefs == [one["images"][at] for one in data_of(files)["heads"]]
    # the diagonal of a row that looks at itself alone: the first token
    chromium.run(
        "(() => { const s = document.querySelector('.heads svg'), p = s.getBoundingClientRect(),"
        " v = s.viewBox.baseVal.width, n = +s.querySelector('image').getAttribute('width'), u = p.width / v;"
        " s.dispatchEvent(new PointerEvent('pointermove', {clientX: p.left + u * (v - n + .5),"
        " clientY: p.top + u * (v - n + .5)})); })()"
    )
    said = "document.querySelector('.heads p').textContent"
    assert chromium.wait(said) == "▸ (0) looks at ▸ (0): 1.00"
    chromium.run("document.querySelector('.heads svg').dispatchEvent(new MouseEvent('click'))")
    assert chromium.run("document.querySelector('.heads svg').getBoundingClientRect().width") > 900
    assert chromium.run("document.documentElement.scrollWidth") <= width
    fetched = [one for one in chromium.fetched() if not one.startswith("data:")]
    assert fetched == [address]
    assert chromium.problems() == []
