"""HTML pages: they work offline, escape text, and colour labels as figure 3 does."""

import html.parser
import re

import pytest

from maknet_jax import console
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
    assert both.count("≥ 0.30" if predicted else "&lt; 0.30") == 2
    assert both.count("--p:50.0%;--t:30.0%") == 2
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


def test_a_card_opens_on_the_most_confident_label_that_has_a_map():
    def model(*confidences):
        entries = [
            {"label": f"label {k}", "outcome": "unknown", "reason": "", "flagged": False}
            | {"confidence": confidence, "threshold": 0.3, "predicted": True, "map": k}
            for k, confidence in enumerate(confidences)
        ]
        entries[-1]["map"] = None
        uris = [f"data:image/{k}" for k in range(len(confidences) - 1)]
        return {"name": "m", "missed": [], "uris": uris, "labels": entries}

    card = str(page.attribution_card("a", "data:image/z", [model(0.2, 0.7, 0.9)]))
    assert 'class="map" src="data:image/1" alt="map of label 1"' in card
    pressed = re.findall(r'data-label="([^"]*)"\s+aria-pressed="true"', card)
    assert pressed == ["label 1"] and card.count("no map") == 1
    # Two networks show the same label.
    both = [model(0.2, 0.7, 0.9), model(0.8, 0.1, 0.1)]
    card = str(page.attribution_card("a", "data:image/z", both))
    assert card.count('alt="map of label 1"') == 2 and card.count('aria-pressed="true"') == 2


def test_pages_carry_the_notice_and_cards_their_warnings():
    model = {"name": "m", "labels": [], "missed": [], "uris": ["data:image/x"]}
    cards = [
        page.attribution_card("i", "data:image/x", [model], warnings=["outside: <unlike>"]),
        page.perturbation_card("i", [{"name": "m", "columns": []}], warnings=["outside: <unlike>"]),
    ]
    text = page.document("t", "", cards)
    assert text.count("outside: &lt;unlike&gt;") == 2 and text.count(console.NOTICE) == 1


def test_cards_state_the_change_its_scale_and_thresholds_of_missed_labels():
    entry = {"label": "liver", "outcome": "unknown", "reason": "", "flagged": False}
    entry |= {"confidence": 0.46, "threshold": 0.5, "predicted": False, "map": 0}
    entry["effect"] = "baseline 0.01, change +0.45"
    model = {"name": "m", "labels": [entry], "uris": ["data:image/x"]}
    model["missed"] = [["lung", 0.2, 0.35], ["of an earlier version", 0.1]]
    scale = (0.00123, "change of the confidence per pixel")
    card = str(page.attribution_card("i", "data:image/x", [model], scale=scale))
    assert entry["effect"] in card and "change of the confidence per pixel" in card
    assert "−0.0012 lowers" in card and "raises +0.0012" in card
    assert "lung 0.20 (threshold 0.35)," in card and "earlier version 0.10" in card


@pytest.mark.parametrize("known", [True, False])
def test_the_key_explains_truth_only_where_something_is_annotated(known):
    summary = {"trained_on": "", "output": "probability", "steps": 2, "refine": 0, "images": 1}
    summary |= {"method": "trapezoid", "baseline": "black", "complete": {"m": 1.0}, "groups": 1}
    summary |= {"flagged": {"m": 0}, "selected": "the first 1 of 3 slices"}
    lead = str(page.attribution_lead(summary, 1, 1, truth_known=known))
    assert "the first 1 of 3 slices" in lead and "not annotated" in lead
    assert [mark in lead for mark in "✓✗–"] == [known] * 3


def test_names_and_titles_are_escaped():
    model = {"name": "<m>", "labels": [], "missed": [["<b>", 0.5]], "uris": ["data:image/x"]}
    text = page.document("<t>", "", [page.attribution_card("<i>", "data:image/x", [model])])
    for tag in ("<m>", "<b>", "<t>", "<i>"):
        assert tag not in text.replace("<i></i>", "")
