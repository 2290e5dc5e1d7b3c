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
    entry |= {"confidence": 0.5, "threshold": 0.3, "predicted": predicted, "map": None}
    model = {"name": "m", "labels": [entry], "missed": [], "uris": ["data:image/x"]}
    card = str(page.attribution_card("i", "data:image/x", [model]))
    state = {"label": "lung", "state": "gone"}
    columns = [{"title": "original", "uri": "data:image/x", "labels": [entry | state]}]
    both = card + str(page.perturbation_card("i", [{"name": "m", "columns": columns}]))
    assert both.count(mark) == 2 and both.count(f'class="{entry["outcome"]}"') == 2
    assert (both.count("✗") > 0) == (entry["outcome"] == "false_positive")
    assert "<why>" not in both
    # The threshold is a number and a tick; the confidence is bold where it is reached.
    assert both.count("(0.30)") == both.count("--p:50.0%;--t:30.0%") == 2
    assert both.count("<b>0.50</b>") == 2 * predicted


def luminance(colour):
    digits = colour[1:] if len(colour) == 7 else "".join(2 * digit for digit in colour[1:])
    linear = []
    for start in (0, 2, 4):
        value = int(digits[start : start + 2], 16) / 255
        linear.append(value / 12.92 if value <= 0.04045 else ((value + 0.055) / 1.055) ** 2.4)
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def test_text_has_the_contrast_of_wcag_aa():
    """At least 4.5 on white and on the grey of the confidence bars."""
    style = page.render("document", title="t", lead="", cards=[])
    rules = re.findall(r"([^{}]*)\{[^{}]*(?<![-\w])color: (#[0-9a-f]{3,6});", style)
    rules = [(name.strip(), colour) for name, colour in rules if "abbr" not in name]
    assert len(rules) >= 6 and re.search("#eee var", style)
    for name, colour in rules:
        for background in ("#fff", "#eee"):
            contrast = (luminance(background) + 0.05) / (luminance(colour) + 0.05)
            assert contrast >= 4.5, (name, colour, background)
    assert luminance("#fff") == pytest.approx(1) and luminance("#000") == 0


def test_pictures_have_alternative_texts():
    model = {"name": "m", "missed": [], "uris": ["data:image/x", "data:image/y"], "labels": []}
    for number, label in enumerate(("liver", "lung")):
        entry = {"label": label, "outcome": "unknown", "reason": "", "flagged": False}
        entry |= {"confidence": 0.5, "threshold": 0.3, "predicted": True, "map": number}
        model["labels"].append(entry)
    card = str(page.attribution_card("a:7", "data:image/z", [model], facts=["split test"]))
    alternatives = re.findall(r'alt="([^"]*)"', card)
    assert alternatives == ["CT slice a:7", "CT slice a:7", "map of liver"]
    assert 'data-label="lung"' in card and "split test" in card


def test_names_and_titles_are_escaped():
    model = {"name": "<m>", "labels": [], "missed": [["<b>", 0.5]], "uris": ["data:image/x"]}
    text = page.document("<t>", "", [page.attribution_card("<i>", "data:image/x", [model])])
    for tag in ("<m>", "<b>", "<t>", "<i>"):
        assert tag not in text.replace("<i></i>", "")
