"""bench/tables.py: figures as a benchmark keeps them, tables as pages show them."""

import json

import pytest
from conftest import ROOT

from bench import tables
from plumbing.files import InputError, write_text

ROWS = [
    {"sampler": "ours", "tokens/s": "1234 1250", "ratio": "1.00x", "seconds": 0.25},
    {"sampler": "vLLM", "tokens/s": "-", "ratio": "-", "seconds": 12},
]
TABLE = """\
| sampler | tokens/s | ratio | seconds |
| --- | ---: | ---: | ---: |
| ours | 1234 1250 | 1.00x | 0.250 |
| vLLM | - | - | 12 |
"""


def test_the_pages_show_their_figures():
    """Rerun python -m bench.tables if this fails."""
    assert tables.update(ROOT, check=True) == []


def test_rows_become_a_table():
    assert tables.markdown(ROWS) == TABLE


@pytest.fixture
def root(tmp_path, monkeypatch):
    """A project with two pages and the figures of two benchmarks."""
    argv = ["/x/bench/sampler.py", "--model", "DIR", "--json", "FILE", "--only", "compare"]
    monkeypatch.setattr("sys.argv", argv)
    folder = tmp_path / "docs/figures"
    tables.write_figures(folder / "plain.json", ROWS)
    monkeypatch.setattr("sys.argv", ["/x/bench/sampler.py", "--json=FILE"])
    tables.write_figures(folder / "several.json", {"one": ROWS[:1], "two": ROWS[1:]})
    page = "# Title\n<!-- table: plain -->\nold\n<!-- end -->\nText.\n"
    write_text(tmp_path / "README.md", page)
    page = (
        "<!-- table: several/two -->\n<!-- end -->\n\n<!-- table: several/one -->\n<!-- end -->\n"
    )
    write_text(tmp_path / "docs/performance.md", page)
    write_text(tmp_path / "docs/design.md", "No table.\n")
    return tmp_path


def test_figures_say_how_they_were_measured(root):
    kept = json.loads((root / "docs/figures/plain.json").read_text())
    assert kept.keys() == {"commit", "command", "cpu", "torch", "threads", "figures"}
    assert kept["command"] == "python -m bench.sampler --model DIR --only compare"
    assert kept["figures"] == ROWS and kept["cpu"] and kept["threads"] >= 1
    kept = json.loads((root / "docs/figures/several.json").read_text())
    assert kept["command"] == "python -m bench.sampler"
    tables.write_figures(None, ROWS)  # without --json, nothing


def test_pages_are_rewritten_once(root):
    pages = [root / "README.md", root / "docs/performance.md"]
    before = [page.read_text() for page in pages]
    assert tables.update(root, check=True) == pages
    assert [page.read_text() for page in pages] == before
    assert tables.update(root, check=False) == pages
    text = pages[0].read_text()
    assert text.startswith(f"# Title\n<!-- table: plain -->\n{TABLE}\n`python -m bench.sampler ")
    assert text.endswith("\n<!-- end -->\nText.\n") and "old" not in text
    both = pages[1].read_text()
    assert both.index("vLLM") < both.index("ours") and both.count("<!-- end -->") == 2
    assert tables.update(root, check=True) == [] and tables.update(root, check=False) == []


def test_a_page_typed_by_hand_is_told(root, monkeypatch, capsys):
    monkeypatch.setattr(tables, "ROOT", root)
    monkeypatch.setattr("sys.argv", ["tables.py"])
    with pytest.raises(SystemExit) as ended:
        tables.main()
    assert not ended.value.code and "README.md: rewritten" in capsys.readouterr().out
    page = (root / "README.md").read_text().replace("1234", "9999")
    write_text(root / "README.md", page)
    monkeypatch.setattr("sys.argv", ["tables.py", "--check"])
    with pytest.raises(SystemExit) as ended:
        tables.main()
    assert ended.value.code == 1
    assert capsys.readouterr().out == "README.md: out of date\n"
    assert (root / "README.md").read_text() == page


@pytest.mark.parametrize("name, said", [("none", "none.json"), ("several/six", "no table 'six'")])
def test_a_marker_without_figures(root, name, said):
    write_text(root / "README.md", f"<!-- table: {name} -->\n<!-- end -->\n")
    with pytest.raises(InputError, match=said):
        tables.update(root, check=True)
