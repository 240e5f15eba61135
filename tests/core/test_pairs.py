"""The filter: each reason to drop a pair, and what the kept ones look like."""

from pathlib import Path

import pytest
from conftest import last_json, read_rows, run, write_rows

import scorers.load as load_file
from losses import preference_of
from pairs import PairOptions, make_pairs, own_words, repetition
from plumbing.files import InputError
from plumbing.options import RunOptions
from plumbing.stage import counts_of
from scorers.base import Revision
from scorers.likelihood import likelihood

FP32 = RunOptions(dtype="float32")
TURNS = [
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Hello"},
    {"role": "user", "content": "Bye"},
]
TALK = {"id": "talk", "messages": TURNS, "response": "See you", "finish_reason": "stop"}


@pytest.mark.parametrize(
    ("text", "share"),
    [
        ("", 0),
        ("one two three", 0),
        ("all of these words differ from each other", 0),
        ("a b c a b c", 0.25),
        ("A b  c\na B c", 0.25),
        ("no " * 10, 7 / 8),
        ("so it goes and so it goes", 0.2),
    ],
)
def test_repetition(text, share):
    assert repetition(text) == pytest.approx(share)


# -------------------------------------------------------------------------------------- the filter


def answers(texts: list[str], **more) -> list[dict]:
    rows = []
    for i, text in enumerate(texts):
        row = {"id": f"x{i}", "prompt": f"Prompt {i}?", "response": text, "finish_reason": "stop"}
        rows.append({**row, **more})
    return rows


def length_scorer(rows: list[dict]) -> list[float]:
    """A point for each word, so that gaps are whole numbers."""
    return [float(len(row["response"].split())) for row in rows]


class Maker:
    """make_pairs() on lists of records: maker(chosen, rejected, **options) -> (counts, pairs)."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.calls = 0

    def __call__(self, chosen, rejected, t: int = 1, base=None, **changes):
        self.calls += 1
        files = []
        for side, rows in (("chosen", chosen), ("rejected", rejected)):
            files.append(write_rows(self.folder / f"{side}{self.calls}.jsonl", rows))
        self.out = self.folder / f"pairs{self.calls}.jsonl"
        settings = {"run": FP32, "scorer": f"{Path(__file__)}:length_scorer", **changes}
        assert make_pairs(*files, self.out, PairOptions(**settings), base, t) == self.out
        return counts_of(self.out), read_rows(self.out)


@pytest.fixture
def make(tmp_path) -> Maker:
    return Maker(tmp_path)


def ids(pairs: list[dict]) -> list[str]:
    return [row["id"] for row in pairs]


CHOSEN = [
    "a good long answer",
    " the  same\n",
    "",
    "cut off in the",
    "again " * 9,
    "fine one here now",
    "short",
]
REJECTED = ["bad", "the same", "text", "no", "yes", "again " * 9, "longer than that"]


def test_each_reason_to_drop_a_pair_is_counted(make):
    chosen = answers(CHOSEN)
    rejected = answers(REJECTED)
    chosen[3]["finish_reason"] = "length"
    rejected[0]["finish_reason"] = "length"  # of the rejected one it does not matter
    counts, pairs = make(chosen, rejected)
    assert ids(pairs) == ["x0"]
    expected = {"identical": 1, "empty": 1, "cut_off": 1, "repetitive": 2, "small_gap": 1}
    expected |= {"candidates": 7, "valid": 1, "pairs": 1}
    assert expected.items() <= counts.items()
    assert ids(make(chosen, rejected, keep_cut_off=True)[1]) == ["x0", "x3"]
    assert ids(make(chosen, rejected, threshold=-5)[1]) == ["x0", "x6"]
    assert ids(make(chosen, rejected, max_repetition=0.9)[1]) == ["x0", "x4"]

    # without a scorer there is no gap, and all else stays
    counts, pairs = make(chosen, rejected, scorer="none")
    assert ids(pairs) == ["x0", "x6"]
    assert "small_gap" not in counts
    assert pairs[0]["score_chosen"] is pairs[0]["score_rejected"] is None


@pytest.mark.parametrize(
    ("threshold", "kept"),
    [
        (0, 3),
        (0.99, 3),
        (1, 2),
        (2, 1),
        (2.99, 1),
    ],
)
def test_threshold_itself_is_not_enough(make, threshold, kept):
    chosen = answers(["a b", "a b c", "a b c d"])
    counts, _ = make(chosen, answers(["x"] * 3), threshold=threshold)
    assert (counts["valid"], counts.get("small_gap", 0)) == (kept, 3 - kept)


def test_pairs_are_joined_by_id(make):
    chosen = answers(["a b", "c d e", "f g"])
    chosen[2]["id"] = "unknown"
    counts, pairs = make(chosen, answers(["x", "y", "z"])[::-1])
    assert counts["candidates"] == 2
    texts = [(row["chosen"], row["rejected"]) for row in pairs]
    assert texts == [("a b", "x"), ("c d e", "y")]


def test_samples_of_a_prompt_are_joined_one_by_one(make):
    chosen = answers(["a b", "c d e"], id="a", prompt="Why?")
    rejected = answers(["x", "y"], id="a", prompt="Why?")
    for side in (chosen, rejected):
        for i, row in enumerate(side):
            row["sample"] = i
    _, pairs = make(chosen, rejected)
    texts = [(row["chosen"], row["rejected"]) for row in pairs]
    assert texts == [("a b", "x"), ("c d e", "y")]
    # ids differ, or nobody could read the file
    assert pairs[0]["id"] == "a"
    assert pairs[1]["id"] != "a"


def test_texts_of_another_source_need_no_finish_reason(make):
    chosen, rejected = answers(["a b"]), answers(["x"])
    for row in chosen + rejected:
        del row["finish_reason"]
    assert make(chosen, rejected)[0]["pairs"] == 1


def test_another_threshold_scores_nothing_again(tiny, tmp_path, monkeypatch):
    """A filter that leaves nothing is told to lower its threshold; what was scored is kept for
    that.
    """
    scored = []

    def counted(model, run_options):
        score = likelihood(model, run_options)

        def scorer(rows):
            scored.extend(rows)
            return score(rows)

        return scorer

    monkeypatch.setattr(load_file, "likelihood", counted)
    chosen = write_rows(tmp_path / "chosen.jsonl", answers(["a b"]))
    rejected = write_rows(tmp_path / "rejected.jsonl", answers(["x"]))
    out = tmp_path / "pairs.jsonl"
    scratch = tmp_path / "pairs.jsonl.partial"
    with pytest.raises(InputError, match=r"no pair of 1 left .* lower the threshold"):
        make_pairs(chosen, rejected, out, PairOptions(run=FP32, threshold=1e3), tiny)
    assert len(scored) == 2
    make_pairs(chosen, rejected, out, PairOptions(run=FP32, threshold=-1e3), tiny)
    assert counts_of(out)["pairs"] == 1
    assert len(scored) == 2
    assert not scratch.exists()


def test_pairwise_scores_are_p_and_its_complement(tiny, make):
    chosen = answers(["a good answer", "yes"])
    rejected = answers(["bad", "no no"])
    counts, pairs = make(chosen, rejected, scorer=f"judge:{tiny}", threshold=-1)
    assert counts["pairs"] == 2
    sums = [row["score_chosen"] + row["score_rejected"] for row in pairs]
    assert sums == pytest.approx([1, 1])
    expected = load_file.load_scorer(f"judge:{tiny}", None, FP32)(chosen, rejected)
    assert [row["score_chosen"] for row in pairs] == pytest.approx(expected, abs=1e-4)
    # a loss that reads the preference gets P, not the sigmoid of P - (1 - P)
    assert [preference_of(row) for row in pairs] == pytest.approx(expected, abs=1e-4)


def test_a_pair_that_the_scorer_cannot_read_is_dropped_and_counted(make, tiny):
    """Either side may be longer than the context; the rules about texts come first."""
    texts = ["y" * 600, "a b c", "ok fine", "", "x y z"]
    rejected = answers(["bad", "y" * 600, "no no", "z" * 600, "a"])
    counts, pairs = make(answers(texts), rejected, scorer=f"judge:{tiny}", threshold=-1)
    assert ids(pairs) == ["x2", "x4"]
    expected = {"candidates": 5, "not_scored": 2, "empty": 1, "valid": 2, "pairs": 2}
    assert expected.items() <= counts.items()
    gaps = [row["score_chosen"] - row["score_rejected"] for row in pairs]
    # of all pairs that have one
    assert counts["mean_gap"] == pytest.approx(sum(gaps) / 2, abs=1e-4)


def short_scorer(rows: list[dict]) -> list[float | None]:
    """None for texts of more than two words."""
    lengths = length_scorer(rows)
    return [length if length < 3 else None for length in lengths]


def test_where_no_pair_is_scored_the_error_says_so(make):
    problem = r"no pair of 2 left \({'not_scored': 2}\); score gaps none"
    with pytest.raises(InputError, match=problem):
        scorer = f"{Path(__file__)}:short_scorer"
        make(answers(["a b c", "a b"]), answers(["x", "x y z"]), scorer=scorer)


def test_pairs_of_settled_follow_from_how_the_improver_is_asked(tiny, tmp_path):
    """Another template or feedback is refused; with another scorer it does not count."""
    hints = tmp_path / "hints.py"
    hints.write_text("def hints(rows):\n    return [{'hint': 'shorter'} for row in rows]\n")
    chosen = write_rows(tmp_path / "chosen.jsonl", answers(["a b", "c d e"]))
    rejected = write_rows(tmp_path / "rejected.jsonl", answers(["x", "y"]))
    first = Revision(template="{prompt} {draft}", feedback=f"{hints}:hints")

    def made(scorer: str, revision: Revision) -> Path:
        o = PairOptions(run=FP32, scorer=scorer, threshold=-9.0)
        out = tmp_path / f"{scorer}.jsonl"
        return make_pairs(chosen, rejected, out, o, tiny, revision=revision)

    rows = read_rows(made("settled", first))
    expected = load_file.load_scorer("settled", tiny, FP32, revision=first)(
        answers(["a b", "c d e"])
    )
    assert [row["score_chosen"] for row in rows] == pytest.approx(expected)
    made("settled", first)
    made("likelihood", first)
    others = {
        "template": Revision(template="{draft}", feedback=first.feedback),
        "feedback": Revision(template=first.template),
    }
    for name, other in others.items():
        with pytest.raises(InputError, match=rf"settled\.jsonl: made with (option|input) {name}"):
            made("settled", other)
        made("likelihood", other)
    hints.write_text(hints.read_text() + "\n")
    with pytest.raises(InputError, match=r"settled\.jsonl: made with input feedback_files"):
        made("settled", first)
    made("likelihood", first)


def test_columns(make):
    chosen = [{**answers(["much better"])[0], "draft": "d"}, TALK]
    rejected = [*answers(["bad"]), {**TALK, "response": "x"}]
    _, pairs = make(chosen, rejected, t=3)
    scores = {"score_chosen": 2.0, "score_rejected": 1.0, "iteration": 3}
    first = {"id": "x0", "prompt": "Prompt 0?", "chosen": "much better", "rejected": "bad"}
    second = {"id": "talk", "messages": TURNS, "chosen": "See you", "rejected": "x"}
    assert pairs == [{**first, **scores}, {**second, **scores}]


def test_counts_hold_gap_and_lengths(make):
    counts, _ = make(answers(["a b c", "a b"]), answers(["x", "y z"]))
    assert counts["mean_gap"] == 1.0
    # words: of kept pairs
    assert (counts["chosen_words"], counts["rejected_words"]) == (3.0, 1.0)


def test_cap_draws_at_random_and_again_the_same(make):
    chosen = answers([f"good answer {i}" for i in range(50)])
    rejected = answers(["bad"] * 50)
    counts, first = make(chosen, rejected, max_pairs=10)
    assert (counts["valid"], counts["pairs"], len(first)) == (50, 10, 10)
    numbers = [int(name[1:]) for name in ids(first)]
    assert numbers == sorted(set(numbers))
    assert numbers != list(range(10))
    assert make(chosen, rejected, max_pairs=10)[1] == first

    # another seed or iteration draws others
    other_seed = RunOptions(seed=1, dtype="float32")
    for changes in ({"run": other_seed}, {"t": 2}):
        _, others = make(chosen, rejected, max_pairs=10, **changes)
        assert ids(others) != ids(first)
    assert make(chosen, rejected, max_pairs=50)[0]["pairs"] == 50


def test_nothing_left_says_what_the_gaps_are(make):
    chosen = answers(["a b", "a b c", "a b c d"])
    problem = r"no pair of 3 left \({'small_gap': 3}\); score gaps 1 1 2 3 3; lower"
    with pytest.raises(InputError, match=problem):
        make(chosen, answers(["x"] * 3), threshold=3)
    assert not make.out.exists()


def test_answers_to_other_prompts_are_not_joined(make):
    chosen = answers(["a b", "a b c"])
    unknown = answers(["x"], id="unknown")
    problem = r"chosen1.jsonl: none of its ids occurs in .*rejected1.jsonl; give"
    with pytest.raises(InputError, match=problem):
        make(chosen, unknown)
    # two files that were numbered from 0, of different prompts
    others = answers(["x", "y"])
    others[1]["prompt"] = "Another?"
    problem = r"chosen2.jsonl: line 2: another prompt than that of .*rejected2.jsonl: line 2.* 'x1'"
    with pytest.raises(InputError, match=problem):
        make(chosen, others)
    # ids are texts: 7 and "7" are one
    numbers = [{**answers([text])[0], "id": name} for text, name in (("a b", 7), ("x", "7"))]
    assert make(numbers[:1], numbers[1:])[1][0]["id"] == "7"


# ------------------------------------------------------------------------------------- the command


@pytest.mark.slow
@pytest.mark.ranks
def test_two_processes_score_as_one(tiny, tmp_path):
    words = "one two three four five".split()
    chosen = answers([" ".join(words[:i]) for i in range(1, 6)])
    rejected = [{**row, "response": f"No. {row['prompt']}"} for row in chosen]
    files = []
    for side, rows in (("chosen", chosen), ("rejected", rejected)):
        files += [f"--{side}", write_rows(tmp_path / f"{side}.jsonl", rows)]
    out = tmp_path / "two.jsonl"
    scorer = ["--scorer", "likelihood", "--base", tiny, "--threshold", -9, "--dtype", "float32"]
    code, stdout, stderr = run(["pairs.py", *scorer, *files, "--out", out], nproc=2)
    assert code == 0, stderr
    result = last_json(stdout)
    assert result["pairs"] == 5
    assert result["seconds"] > 0
    for side, rows in (("chosen", chosen), ("rejected", rejected)):
        scores = [row[f"score_{side}"] for row in read_rows(out)]
        assert scores == pytest.approx(likelihood(tiny, FP32)(rows), abs=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("scorer", ["likelihood", "settled"])
def test_command_needs_the_model_of_its_scorer(tmp_path, scorer):
    rows = write_rows(tmp_path / "rows.jsonl", answers(["a"]))
    out = tmp_path / "out.jsonl"
    files = ["--chosen", rows, "--rejected", rows, "--out", out]
    code, _, stderr = run(["pairs.py", "--scorer", scorer, *files])
    assert code == 2
    expected = f"error: --scorer {scorer} scores under a model; give --base DIR"
    assert stderr.splitlines()[-1] == expected


@pytest.mark.slow
def test_command_asks_for_a_revision(tiny, tmp_path):
    """settled by the command line: one line without a template, scores with one."""
    chosen = write_rows(tmp_path / "chosen.jsonl", answers(["a b"]))
    rejected = write_rows(tmp_path / "rejected.jsonl", answers(["x"]))
    files = ["--chosen", chosen, "--rejected", rejected, "--out", tmp_path / "out.jsonl"]
    command = ["pairs.py", "--scorer", "settled", "--base", tiny, "--dtype", "float32", *files]
    code, _, stderr = run(command)
    assert code == 2
    expected = "error: --scorer settled asks to revise; give --revision.template"
    assert stderr.splitlines()[-1] == expected
    more = ["--revision.template", "{prompt} {draft}", "--threshold", -9]
    code, _, stderr = run([*command, *more])
    assert code == 0, stderr
    [pair] = read_rows(tmp_path / "out.jsonl")
    revision = Revision(template="{prompt} {draft}")
    [score] = load_file.load_scorer("settled", tiny, FP32, revision=revision)(answers(["a b"]))
    assert pair["score_chosen"] == pytest.approx(score, rel=1e-4)


def test_chosen_text_needs_words_of_its_own(make):
    chosen = answers(["Prompt 0 indeed", "It is fine", "Indeed indeed, fine"])
    rejected = answers(["x", "y", "z"])
    counts, pairs = make(chosen, rejected, min_own_words=3, max_repetition=1)
    assert ids(pairs) == ["x1", "x2"]
    assert counts["echo"] == 1
    talk = {"id": "t", "messages": [*TURNS[:1]], "response": TURNS[0]["content"] + " new"}
    assert own_words(talk) == 1
