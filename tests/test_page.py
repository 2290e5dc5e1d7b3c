"""HTML pages: they work offline, escape text, and colour labels as figure 3 does."""

import html.parser
import re

import pytest

from maknet_jax.explain.truth import outcome
from maknet_jax.figures import page


def check_page(text):
    """Checks that a page is well formed and loads nothing from outside; counts its pictures."""

    class Reader(html.parser.HTMLParser):
        open_tags, pictures = [], 0

        def handle_starttag(self, tag, attrs):
            for name, value in attrs:
                if name in ("src", "href", "data-map", "action", "srcset", "poster"):
                    assert value.startswith("data:image/"), (tag, name, value[:60])
                    self.pictures += 1
            assert tag not in ("link", "iframe", "object", "base")
            if tag not in ("meta", "img", "input", "br"):
                self.open_tags.append(tag)

        def handle_endtag(self, tag):
            assert self.open_tags.pop() == tag

    reader = Reader()
    reader.feed(text)
    assert reader.open_tags == []
    bare = re.sub(r"data:image/\w+;base64,[\w+/=]+", "", text)
    for outside in ("http:", "https:", "//", "url(", "@import", "fetch(", "XMLHttp"):
        assert outside not in bare, outside
    assert "width=device-width" in text
    return reader.pictures


@pytest.mark.parametrize(
    "known, predicted, mark",
    [
        ("true", True, "✓"),
        ("false", True, "✗"),
        ("false", False, "–"),  # correctly rejected: not a mistake
        ("unknown", True, "·"),
        ("unknown", False, "·"),
    ],
)
def test_only_false_positives_are_crossed_out(known, predicted, mark):
    entry = {"label": "liver", "outcome": outcome(known, predicted), "reason": "<why>"}
    entry |= {"confidence": 0.5, "map": None}
    model = {"name": "m", "labels": [entry], "missed": [], "uris": ["data:image/x"]}
    card = str(page.attribution_card("i", "data:image/x", [model]))
    state = {"label": "lung", "state": "gone"}
    columns = [{"title": "original", "uri": "data:image/x", "labels": [entry | state]}]
    both = card + str(page.perturbation_card("i", [{"name": "m", "columns": columns}]))
    assert both.count(mark) == 2 and both.count(f'class="{entry["outcome"]}"') == 2
    assert (both.count("✗") > 0) == (entry["outcome"] == "false_positive")
    assert "<why>" not in both


def test_names_and_titles_are_escaped():
    model = {"name": "<m>", "labels": [], "missed": [["<b>", 0.5]], "uris": ["data:image/x"]}
    text = page.document("<t>", "", [page.attribution_card("<i>", "data:image/x", [model])])
    for tag in ("<m>", "<b>", "<t>", "<i>"):
        assert tag not in text.replace("<i></i>", "")
