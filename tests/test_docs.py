"""The documentation: its code runs, it prints what it says, and every public name is on a page."""

import contextlib
import inspect
import io
import pkgutil
import re
import runpy
import sys
from pathlib import Path
from types import ModuleType

import pytest

import funcnet as fn

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", *sorted(DOCS.rglob("*.md"))]
HOOKS = runpy.run_path(str(DOCS / "scripts" / "hooks.py"))

# A text block right behind a Python block is what that prints.
BLOCK = re.compile(r"^```python\n(.*?)^```$(?:\n+^```text\n(.*?)^```$)?", re.DOTALL | re.MULTILINE)


def blocks(page):
    """(line, code, what it prints or None) of each Python block."""
    text = page.read_text(encoding="utf-8")
    return [
        (text.count("\n", 0, match.start()) + 1, match[1], match[2])
        for match in BLOCK.finditer(text)
    ]


# Pages that quote a script, leaving lines out.
QUOTES = {DOCS / "denoiser.md": ROOT / "examples" / "denoise.py"}

RECIPES = DOCS / "recipes.md"


def sessions(page):
    """{name: the blocks that run together}: a page's; of the recipes, the head's and one's own."""
    if page != RECIPES:
        return {"": blocks(page)}
    lines = enumerate(page.read_text(encoding="utf-8").splitlines(), 1)
    starts = {line: text.removeprefix("## ") for line, text in lines if text.startswith("## ")}
    parts = {name: [] for name in ["", *starts.values()]}
    for block in blocks(page):
        parts[next((starts[line] for line in sorted(starts)[::-1] if line < block[0]), "")] += [
            block
        ]
    head = parts.pop("")
    return {name: head + own for name, own in parts.items() if own}


SESSIONS = [
    pytest.param(page, session, id=f"{page.relative_to(ROOT).as_posix()} {name}".strip())
    for page in PAGES
    if blocks(page) and page not in QUOTES
    for name, session in sessions(page).items()
]


# torch's own forward-mode code warns of itself.
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.usefixtures("rows_are_restored")
@pytest.mark.parametrize(("page", "session"), SESSIONS)
def test_code_runs(page, session, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    module = ModuleType("docs_page")  # files name classes by their module
    monkeypatch.setitem(sys.modules, "docs_page", module)
    for line, code, expected in session:
        # Tracebacks and warnings then point into the page.
        compiled = compile("\n" * line + code, str(page), "exec")
        out = io.StringIO()
        with contextlib.redirect_stdout(out):
            exec(compiled, module.__dict__)
        if expected is not None:
            assert out.getvalue() == expected, f"{page.name}, line {line}, prints something else"


@pytest.mark.parametrize("page", QUOTES, ids=lambda page: page.name)
def test_quotes_are_lines_of_the_script_in_its_order(page):
    for line, code, _ in blocks(page):
        script = map(str.strip, QUOTES[page].read_text(encoding="utf-8").splitlines())
        quoted = filter(None, map(str.strip, code.splitlines()))
        missing = [text for text in quoted if text not in script]  # which goes on behind the last
        assert not missing, f"{page.name}, line {line}"


def test_every_block_is_found():
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        assert len(re.findall(r"```\s*(?:python|py)\b", text)) == len(blocks(page)), page


def documented():
    """The names that mkdocstrings is asked for, over all pages."""
    texts = (page.read_text(encoding="utf-8") for page in PAGES)
    return [name for text in texts for name in re.findall(r"^::: (\S+)", text, re.MULTILINE)]


def test_every_public_name_is_on_one_page():
    shown = [pkgutil.resolve_name(name) for name in documented()]
    times = {name: sum(value is getattr(fn, name) for value in shown) for name in fn.__all__}
    assert {name: n for name, n in times.items() if n != 1} == {}


@pytest.mark.parametrize("module", [fn.schedules, fn.initializers, fn.interop, fn.distributed])
def test_every_name_of_a_module_is_on_its_page(module):
    texts = "".join(page.read_text(encoding="utf-8") for page in PAGES)
    members = re.search(rf"::: {re.escape(module.__name__)}\n.*members: \[(.*?)\]", texts)
    assert members is not None
    assert sorted(members[1].split(", ")) == sorted(module.__all__)


def test_every_public_name_has_an_example():
    modules = [fn, fn.schedules, fn.initializers, fn.interop, fn.distributed]
    values = [(name, getattr(module, name)) for module in modules for name in module.__all__]
    without = {
        name
        for name, value in values
        if not isinstance(value, ModuleType) and ">>>" not in (inspect.getdoc(value) or "")
    }
    states = {name for name in without if name.endswith("State")}  # their optimisers have one
    assert without - states == {"CheckpointError"}


@pytest.fixture(scope="module")
def read_by_the_site():
    """The package as mkdocstrings reads it."""
    griffe = pytest.importorskip("griffe", reason="needs pip install -e '.[docs]'")
    extensions = griffe.load_extensions(str(DOCS / "scripts" / "docstrings.py"))
    return griffe.load("funcnet", search_paths=[ROOT], extensions=extensions)


def test_the_site_shows_the_real_arguments(read_by_the_site):
    for name in documented():
        value = pkgutil.resolve_name(name)
        # A NamedTuple's constructor is not written anywhere, and errors take anything.
        if callable(value) and not (
            isinstance(value, type) and issubclass(value, tuple | Exception)
        ):
            shown = read_by_the_site[name.removeprefix("funcnet.")].parameters
            names = [p.name.lstrip("*") for p in shown if p.name not in ("self", "/")]
            assert names == list(inspect.signature(value).parameters), name


def test_the_site_shows_doctests_as_code_and_formulas_as_they_are(read_by_the_site):
    linear = read_by_the_site["Linear"].docstring.value
    assert "\n\n```pycon\n>>> import funcnet as fn\n" in linear
    assert "torch.Size([32, 10])\n```" in linear
    assert "\n\n    dW = dyᵀ·x,  db = Σ dy over the rows,  dx = dy·W.\n\n" in linear
    assert "\n\nParameters: {" in linear
    assert "\n\n<https://docs.pytorch.org/docs/stable/generated/torch.nn.Linear.html>\n\n" in linear


@pytest.mark.parametrize(
    ("text", "suffix", "found"),
    [
        ('<script src="https://unpkg.com/x"></script>', ".html", ["https://unpkg.com/x"]),
        ("<link rel=stylesheet href=//fonts.org/a.css>", ".html", ["//fonts.org/a.css"]),
        ('<img alt="a" src="http://a.org/b.png">', ".html", ["http://a.org/b.png"]),
        ('<a href="https://pytorch.org">a link</a> <img src="a//b.png">', ".html", []),
        ("a { background: url(https://a.org/b.png) }", ".css", ["https://a.org/b.png"]),
        ('@import "https://a.org/b.css";', ".css", ["https://a.org/b.css"]),
        ("a { background: url(data:image/png;base64,AAAA) }", ".css", []),
    ],
)
def test_what_a_site_loads_from_elsewhere_is_found(text, suffix, found):
    assert HOOKS["loaded_from_elsewhere"](text, suffix) == found


def test_a_site_that_loads_from_elsewhere_is_refused(tmp_path):
    (tmp_path / "sub").mkdir()
    page = tmp_path / "sub" / "page.html"
    page.write_text('<script src="assets/main.js"></script>')
    HOOKS["on_post_build"]({"site_dir": tmp_path})
    page.write_text('<script src="https://a.org/main.js"></script>')
    with pytest.raises(SystemExit, match=r"page\.html: https://a\.org/main\.js"):
        HOOKS["on_post_build"]({"site_dir": tmp_path})
