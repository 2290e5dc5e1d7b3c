"""The Markdown files: links, command lines, the table of rooms, the version to cite."""

import argparse
import pathlib
import re
import shlex

import pytest
from test_layering import ROOMS

import maknet_jax
from maknet_jax import cli
from maknet_jax.runs import config as configs

REPO = pathlib.Path(__file__).resolve().parents[1]
PAGES = [REPO / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "data/README.md")]
PAGES += [REPO / "benchmarks" / "RESULTS.md", *sorted((REPO / "docs").glob("*.md"))]
# The README announces the Python door; its page comes with the module.
FENCE = re.compile(r"^```[^\n]*\n(.*?)^```$", re.M | re.S)


def prose(text):
    """The text without its code blocks."""
    return FENCE.sub("", text)


def anchor(heading):
    """The anchor that GitHub makes of a heading."""
    plain = re.sub(r"[^\w\- ]", "", heading.strip().lower())
    return plain.replace(" ", "-")


def broken_links(page):
    """The relative links of a page that lead nowhere."""
    targets = re.findall(r"\]\(([^)\s]+)\)", prose(page.read_text(encoding="utf-8")))
    for target in targets:
        if re.match(r"[a-z]+:", target):
            continue
        name, _, part = target.partition("#")
        path = (page.parent / name) if name else page
        if not path.exists():
            yield target
        elif part:
            headings = re.findall(r"^#+ (.*)$", prose(path.read_text(encoding="utf-8")), re.M)
            if part not in map(anchor, headings):
                yield target


def commands(text):
    """The command lines in the code blocks of a text, continued lines joined, without comments."""
    for block in FENCE.findall(text):
        for line in block.replace("\\\n", " ").splitlines():
            if line.startswith(("maknet ", "python ", "make ")):
                yield shlex.split(line, comments=True)


def subparsers(parser):
    """Name -> parser of the commands that a parser has."""
    actions = [a for a in parser._actions if isinstance(a, argparse._SubParsersAction)]
    return {name: child for action in actions for name, child in action.choices.items()}


def refused(words):
    """Why a command line is wrong, or None."""
    program, *arguments = words
    if program == "make":
        targets = re.findall(r"^([\w-]+):", (REPO / "Makefile").read_text(encoding="utf-8"), re.M)
        return None if arguments[0] in targets else f"no target {arguments[0]}"
    if program == "python":
        source = REPO / arguments[0]
        if not source.is_file():
            return f"no file {arguments[0]}"
        names = ("paper_table", "organ_maps")
        shared = ("harness.py", "speed/torch_worker.py", *(f"experiments/{n}.py" for n in names))
        files = [source, *(REPO / "benchmarks" / name for name in shared)]
        code = "".join(file.read_text(encoding="utf-8") for file in files)
        unknown = [word for word in arguments if word.startswith("--") and f'"{word}"' not in code]
        return f"unknown {unknown}" if unknown else None
    if arguments == ["VERB"]:
        return None
    try:
        chosen, changes = cli._parser().parse_known_args(arguments)
    except SystemExit:
        return "does not parse"
    unknown = [text for text in changes if not text.startswith("--config.")]
    if unknown or (changes and not chosen.takes_config):
        return f"unknown {unknown or changes}"
    if chosen.takes_config and (configs.folder() / f"{chosen.config}.py").is_file():
        configs.load(chosen.config, [text.removeprefix("--config.") for text in changes])
    return None


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(REPO)))
def test_relative_links_lead_to_files_and_headings(page):
    assert list(broken_links(page)) == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(REPO)))
def test_command_lines_are_accepted(page):
    wrong = [(words, refused(words)) for words in commands(page.read_text(encoding="utf-8"))]
    assert [each for each in wrong if each[1] is not None] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(REPO)))
def test_verbs_and_options_in_sentences_exist(page):
    verbs = subparsers(cli._parser())
    parsers = [*verbs.values(), *subparsers(verbs["prepare"]).values()]
    options = {name for parser in parsers for name in parser._option_string_actions}
    text = prose(page.read_text(encoding="utf-8")).replace("\n", " ")
    for span in re.findall(r"`([^`]+)`", text):
        words = span.split()
        if words[0] == "maknet" and len(words) > 1:
            assert words[1] in verbs, span
        if words[0] == "maknet" or words[0].startswith("--") or words[0] in verbs:
            named = {word.partition("=")[0] for word in words if word.startswith("--")}
            assert {name for name in named if not name.startswith("--config.")} <= options, span


def test_readme_is_short_and_shows_a_picture():
    text = (REPO / "README.md").read_text(encoding="utf-8")
    assert len(text.splitlines()) < 120
    (picture,) = re.findall(r"!\[[^]]+\]\(([^)]+)\)", text)
    assert 0 < (REPO / picture).stat().st_size < 300_000


def test_contributing_lists_the_rooms_with_their_imports():
    text = (REPO / "CONTRIBUTING.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `(\w+)` \|[^|]*\|([^|]*)\|$", text, re.M)
    listed = {room: set(re.findall(r"`(\w+)`", imports)) for room, imports in rows}
    assert listed == {room: imports - {""} for room, imports in ROOMS.items()}


def test_the_version_to_cite_is_that_of_the_package():
    text = (REPO / "CITATION.cff").read_text(encoding="utf-8")
    assert re.findall(r"^version: (.*)$", text, re.M) == [maknet_jax.__version__]
