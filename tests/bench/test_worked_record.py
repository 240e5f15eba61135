"""bench/worked_record.py: the numbers of docs/design.md's record follow from its own texts."""

import json
import math
import re
import shutil

import pytest
from conftest import ROOT, read_rows, refusal

from bench import worked_record

pytest_plugins = ["cycle"]
PAGE = ROOT / "docs/design.md"
STEPS = ("prompting", "training", "rewriting", "filtering", "pair", "losing", "machine")


def read_record(page: str) -> dict[str, dict[str, str]]:
    """Step -> label -> value, of each block between the markers; wrapped lines are joined again."""
    part = re.search(r"<!-- worked record -->(.*?)<!-- end -->", page, re.DOTALL)[1]
    blocks = re.findall(r"```text\n(.*?)\n```", part, re.DOTALL)
    return {step: read_block(block) for step, block in zip(STEPS, blocks, strict=True)}


def read_block(block: str) -> dict[str, str]:
    rows: dict[str, str] = {}
    label = ""
    for line in block.split("\n"):
        name, value = line[:15].strip(), line[15:].strip()
        if name:
            label = name
            rows[label] = value
        else:
            rows[label] += " " + value
    return rows


def numbers(text: str) -> list[float]:
    return [float(word) for word in text.split()]


def repeated(text: str) -> float:
    """Share of word trigrams that occurred before, counted one by one."""
    words = text.lower().split()
    seen = []
    again = 0
    for i in range(len(words) - 2):
        trigram = words[i : i + 3]
        again += trigram in seen
        seen.append(trigram)
    return again / len(seen)


def check_texts(record: dict) -> None:
    """Each model reads what the one before it wrote."""
    asking = record["prompting"]
    prompt = record["pair"]["prompt"]
    assert asking["keywords"] in asking["G reads"]
    assert f"<question>{prompt}</question>" in asking["G writes"]
    training = record["training"]
    assert training["y'"] in training["R reads"]
    assert training["x*"] in training["R reads"]
    rewriting = record["rewriting"]
    assert rewriting["y"] in rewriting["R reads"]
    assert prompt in rewriting["R reads"]
    assert rewriting["y_0"] == record["pair"]["rejected"]


def check_rewrite(record: dict) -> None:
    """The candidate with the highest score was picked."""
    pair = record["pair"]
    rows = record["rewriting"]
    found = [rows[name].split("  ", 1) for name in rows if name.startswith("candidate")]
    score, text = max(found, key=lambda one: float(one[0]))
    assert text == pair["chosen"]
    assert float(score) == pytest.approx(float(pair["score_chosen"]), abs=2e-4)


def check_filter(record: dict) -> None:
    """Repetition, gap and decision."""
    pair = record["pair"]
    filtering = record["filtering"]
    sides = [pair["chosen"], pair["rejected"]]
    repetition = [repeated(side) for side in sides]
    gap = float(pair["score_chosen"]) - float(pair["score_rejected"])
    assert numbers(filtering["words"]) == [len(side.split()) for side in sides]
    assert numbers(filtering["repetition"]) == pytest.approx(repetition, abs=1e-4)
    assert float(filtering["gap"]) == pytest.approx(gap, abs=2e-4)

    # all of them must hold
    criteria = {
        "differ": sides[0].split() != sides[1].split(),
        "not empty": all(sides),
        "not cut off": filtering["finish_reason"].split()[0] == "stop",
        "not repetitive": max(repetition) <= float(filtering["max_repetition"]),
        "gap": gap > float(filtering["threshold"]),
    }
    assert criteria == dict.fromkeys(criteria, True)
    assert filtering["decision"] == "kept"


def check_loss(record: dict) -> None:
    """Margin and loss of both policies from their log-probs; ln 2 at step 0."""
    rows = record["losing"]
    beta = float(rows["beta"])
    rc, rr = numbers(rows["reference"])
    for policy in ("step 0", "trained"):
        pc, pr = numbers(rows[policy])
        h = (pc - pr) - (rc - rr)
        loss = -math.log(1 / (1 + math.exp(-beta * h)))
        assert float(rows[f"{policy}: h"]) == pytest.approx(h, abs=5e-4)
        assert float(rows[f"{policy}: loss"]) == pytest.approx(loss, abs=1e-4)
    assert float(rows["step 0: h"]) == pytest.approx(0, abs=1e-4)
    assert rows["step 0: loss"] == f"{math.log(2):.4f}"

    # the scorer is the reference: a score is its log-prob per token
    tokens = numbers(rows["tokens"])
    for side, logp, count in zip(("chosen", "rejected"), (rc, rr), tokens, strict=True):
        score = float(record["pair"][f"score_{side}"])
        assert logp / count == pytest.approx(score, abs=2e-4)


def check(record: dict) -> None:
    check_texts(record)
    check_rewrite(record)
    check_filter(record)
    check_loss(record)
    assert int(record["machine"]["threads"]) > 0


@pytest.fixture
def record() -> dict[str, dict[str, str]]:
    return read_record(PAGE.read_text("utf-8"))


def test_the_page_agrees_with_itself(record):
    check(record)


def test_the_page_shows_no_corner_case(record):
    pair = record["pair"]
    texts = {record["rewriting"]["y"], pair["chosen"], pair["rejected"]}
    assert len(texts) == 3
    assert min(numbers(record["filtering"]["repetition"])) > 0
    assert float(record["filtering"]["gap"]) > 0
    assert float(record["losing"]["trained: loss"]) < math.log(2)


@pytest.mark.parametrize(
    "step, label, value",
    [
        ("filtering", "repetition", "0.1  0.2"),
        ("filtering", "gap", "0.9"),
        ("filtering", "threshold", "0.9"),
        ("filtering", "decision", "small_gap"),
        ("losing", "trained: h", "1.0"),
        ("losing", "trained: loss", "0.6"),
        ("losing", "step 0: loss", "0.6930"),
    ],
)
def test_a_wrong_number_fails(record, step, label, value):
    record[step][label] = value
    with pytest.raises(AssertionError):
        check(record)


@pytest.mark.slow
def test_the_command_writes_the_record_of_a_run(copy, tmp_path, monkeypatch):
    page = shutil.copy(PAGE, tmp_path / "design.md")
    monkeypatch.setattr(worked_record, "PAGE", page)
    # the run took the only rewrite of each draft; a scorer shows its score
    config = json.loads((copy / "config.json").read_text())
    config["rewrites"]["scorer"] = "likelihood"
    (copy / "config.json").write_text(json.dumps(config))

    prompt = read_rows(copy / "iter2/pairs.jsonl")[0]["prompt"]
    worked_record.main(copy, prompt)
    check(read_record(page.read_text("utf-8")))

    # only the blocks differ
    pages = [path.read_text("utf-8") for path in (PAGE, page)]
    words = [re.sub(r"```.*?```", "", text, flags=re.DOTALL) for text in pages]
    assert words[0] == words[1]
    assert pages[0] != pages[1]
    assert "no pair has this prompt" in refusal(worked_record.main, copy, "another")
