"""The pages hold what they promise: links and anchors, commands and flags, length of lines and sentences, equations."""

import dataclasses
import re
import shlex

import pytest
from conftest import EVERY, ROOT

PAGES = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")] + sorted(
    (ROOT / "docs").glob("*.md")
)
NAMES = [str(page.relative_to(ROOT)) for page in PAGES]
MOST_WORDS = 35  # of a sentence
README_LINES = 130

# Commands of other packages, and files that a page asks its reader to make.
ELSEWHERE = {"pytest", "venv", "pip"}
READERS_OWN = {"my_algorithm.py"}


# --- Reading a page ---


def code_blocks(text):
    """The contents of a page's fenced blocks."""
    return re.findall(r"^```\w*\n(.*?)^```", text, flags=re.M | re.S)


def without_code(text):
    """A page without its fenced blocks, display equations and comments; lines keep their numbers."""
    blank = lambda match: "\n" * match[0].count("\n")
    text = re.sub(r"^```.*?^```", blank, text, flags=re.M | re.S)
    text = re.sub(r"^\$\$.*?\$\$$", blank, text, flags=re.M | re.S)
    return re.sub(r"<!--.*?-->", blank, text, flags=re.S)


def spans(text):
    """A page's text with each piece of code and each equation as one word."""
    return re.sub(r"`[^`]+`|\$[^$]+\$", "X", text)


def sentences(text):
    """The sentences of a page's prose: no tables, no headings; a list entry and a paragraph end one each."""
    paragraphs, lines = [], []
    for line in [*spans(without_code(text)).splitlines(), ""]:
        is_new = re.match(r"\s*([-*+]|\d+\.)\s", line) or line.startswith(("#", "|", "!", ">"))
        if is_new or not line.strip():
            paragraphs.append(" ".join(lines))
            lines = []
        if not line.startswith(("#", "|")):
            lines.append(re.sub(r"^\s*([-*+]|\d+\.)\s", "", line).strip())
    for paragraph in paragraphs:
        paragraph = re.sub(r"!?\[([^\]]*)\]\([^)]*\)", r"\1", paragraph)  # a link is its text
        paragraph = re.sub(r"\b(e\.g|i\.e|al|vs)\.", r"\1", paragraph)
        yield from re.split(r"(?<=[.?!])[*)\"_]*\s+(?=[\"'*_(\[]*[A-Z0-9])", paragraph)


def anchors(text):
    """The anchors that GitHub gives a page's headings."""
    found = []
    for heading in re.findall(r"^#{1,6} +(.*?) *$", without_code(text), flags=re.M):
        heading = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).replace("`", "").lower()
        slug = re.sub(r"[^\w\- ]", "", heading).replace(" ", "-")
        found.append(slug if slug not in found else f"{slug}-{found.count(slug)}")
    return found


def targets(text):
    """The targets of a page's links and images."""
    return re.findall(r"\]\(([^)\s]+)\)", re.sub(r"`[^`]+`", "", without_code(text)))


def commands(text):
    """The commands that start Python, in code blocks and in sentences, as words; without comments, lines joined."""
    inline = [span.replace("\n", " ") for span in re.findall(r"`(python [^`]+)`", without_code(text))]
    for block in code_blocks(text) + inline:
        for line in block.replace("\\\n", " ").splitlines():
            for part in line.split("&&"):
                if re.match(r"\s*python\s", part):
                    yield shlex.split(part.split(" #")[0].replace("|", " "))


# --- Tests ---


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_links_and_pictures_resolve_inside_the_repository(page):
    for target in targets(page.read_text()):
        if re.match(r"[a-z]+:", target):
            continue
        name, _, anchor = target.partition("#")
        path = (page.parent / name).resolve() if name else page
        assert path.is_relative_to(ROOT) and path.exists(), f"{page.name}: {target} does not exist"
        if anchor:
            assert anchor in anchors(path.read_text()), f"{page.name}: {path.name} has no heading for #{anchor}"


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_commands_name_files_modules_and_flags_that_exist(page):
    for words in commands(page.read_text()):
        own, passed_on = words, []
        if "--" in words:  # what follows goes to the algorithms
            own, passed_on = words[: words.index("--")], words[words.index("--") + 1 :]
        if words[1] == "-m":
            if words[2] in ELSEWHERE:
                continue
            source = module_source(words[2])
            assert source is not None, f"{page.name}: no module {words[2]}"
            known = set(re.findall(r"^    (\w+): ", source, flags=re.M))
        else:
            assert words[1] in READERS_OWN or (ROOT / words[1]).is_file(), f"{page.name}: no file {words[1]}"
            known = algorithm_flags(words[1].split("/")[-1].removesuffix(".py"))
        wrong = flags(own) - known
        for method in [word for word in own if word in EVERY] if passed_on else []:
            wrong |= flags(passed_on) - algorithm_flags(method)
        assert not wrong, f"{page.name}: {' '.join(words)}: no flag {', '.join(sorted(wrong))}"


def module_source(name):
    """The text of a module or package of this repository; None if there is none."""
    path = ROOT / name.replace(".", "/")
    files = sorted(path.glob("*.py")) if (path / "__main__.py").is_file() else [path.with_suffix(".py")]
    return "\n".join(file.read_text() for file in files) if files[0].is_file() else None


def flags(words):
    """The fields that a command line's flags set."""
    names = {re.match(r"--([\w-]+)", word)[1].replace("-", "_") for word in words if re.match(r"--\w", word)}
    return {name.removeprefix("no_") for name in names} - {"help"}


def algorithm_flags(name):
    """The fields of an algorithm's Args; of a reader's own file those of all."""
    modules = [EVERY[name]] if name in EVERY else EVERY.values()
    return {field.name for module in modules for field in dataclasses.fields(module.Args)}


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_no_sentence_has_more_words_than_one_reads_at_once(page):
    for sentence in sentences(page.read_text()):
        assert len(sentence.split()) <= MOST_WORDS, f"{page.name}: {len(sentence.split())} words: {sentence}"


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_lines_of_prose_can_be_read_and_compared(page):
    for number, line in enumerate(without_code(page.read_text()).splitlines(), 1):
        wide = len(line) > 120 and not line.lstrip().startswith("|") and "](http" not in line
        assert not wide, f"{page.name}:{number} has {len(line)} columns"


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_equations_are_in_the_form_that_github_renders(page):
    """Markdown takes a backslash before punctuation away, and a table splits at |; GitHub refuses \\operatorname."""
    text = re.sub(r"^```.*?^```|`[^`]+`", "", page.read_text(), flags=re.M | re.S)
    for equation in re.findall(r"\$\$.+?\$\$|\$[^$]+\$", text, flags=re.S):
        inner = equation.strip("$")
        assert inner.count("{") == inner.count("}"), equation
        assert "\\operatorname" not in inner, equation
        if not equation.startswith("$$"):
            assert inner == inner.strip() and "\n" not in inner, equation
            assert not re.search(r"\\[^A-Za-z]|[|*<>`]", inner), equation


def test_the_readme_stays_short():
    assert len((ROOT / "README.md").read_text().splitlines()) <= README_LINES


def test_every_page_is_in_the_index():
    index = (ROOT / "docs" / "index.md").read_text()
    missing = {page.name for page in (ROOT / "docs").glob("*.md") if f"({page.name}" not in index}
    assert missing <= {"index.md"}, missing
