"""Scorers against transformers, and the filter: each reason to drop a pair, and what the kept ones look like."""
import random

import pytest
import torch
from conftest import last_json, read_rows, run, tiny_checkpoint, write_rows

from data import Chat, Common, InputError
from reward import FilterOptions, likelihood, load_scorer, make_pairs, quantiles, repetition, reward

FP32 = Common(dtype="float32")
ROWS = [{"id": f"r{i}", "prompt": f"Say {i} things.", "response": " ".join(f"thing {j}" for j in range(i))} for i in range(6)]
CHAT = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}, {"role": "user", "content": "Bye"}]
TALK = {"id": "talk", "messages": CHAT, "response": "See you"}


@pytest.fixture(scope="module")
def judge(tmp_path_factory):
    """A reward model with random weights."""
    return tiny_checkpoint(tmp_path_factory.mktemp("judge") / "model", seed=3, id2label={"0": "LABEL_0"}, num_labels=1,
                           architectures=["LlamaForSequenceClassification"])


# ---- scorers ----

def test_likelihood_is_the_mean_logp_of_answer_and_end(tiny):
    from transformers import AutoModelForCausalLM
    model, chat = AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32), Chat(tiny)
    for row, score in zip([*ROWS, TALK], likelihood([*ROWS, TALK], tiny, FP32), strict=True):
        prompt, response = chat.prompt_ids(row), [*chat.encode(row["response"]), 0]
        with torch.no_grad():
            logps = model(torch.tensor([prompt + response])).logits[0, len(prompt) - 1:-1].log_softmax(-1)  # (T, V)
        assert score == pytest.approx(logps[range(len(response)), response].mean().item(), abs=1e-4)
    assert load_scorer("likelihood", tiny, FP32)(ROWS) == pytest.approx(likelihood(ROWS, tiny, FP32), rel=1e-5)


def test_reward_is_the_score_of_the_last_token(judge):
    from transformers import AutoModelForSequenceClassification, AutoTokenizer
    model = AutoModelForSequenceClassification.from_pretrained(judge, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(judge)
    scores = load_scorer(str(judge), "", FP32)([*ROWS, TALK])
    assert len(set(scores)) == len(scores)
    for row, score in zip([*ROWS, TALK], scores, strict=True):
        turns = row.get("messages") or [{"role": "user", "content": row["prompt"]}]
        ids = tokenizer.apply_chat_template([*turns, {"role": "assistant", "content": row["response"]}], return_dict=False)
        with torch.no_grad():
            assert score == pytest.approx(model(torch.tensor([ids])).logits.item(), abs=1e-4)


def test_scores_do_not_depend_on_their_batch(tiny, judge):
    shuffled = random.Random(0).sample(ROWS, len(ROWS))
    for scorer, model in ((likelihood, tiny), (reward, judge)):
        scores = dict(zip((row["id"] for row in ROWS), scorer(ROWS, model, FP32), strict=True))
        again = scorer(shuffled, model, FP32)
        assert again == pytest.approx([scores[row["id"]] for row in shuffled], abs=1e-5)
        assert scorer([], model, FP32) == []
    assert reward(ROWS, judge, FP32, budget=40) == pytest.approx(reward(ROWS, judge, FP32), abs=1e-5)


def test_scorer_of_ones_own(tmp_path):
    (tmp_path / "mine.py").write_text("def words(rows):\n    return [float(len(r['response'].split())) for r in rows]\n")
    assert load_scorer(f"{tmp_path}/mine.py:words", "", FP32)(ROWS) == [0, 2, 4, 6, 8, 10]
    assert load_scorer("none", "", FP32) is None
    with pytest.raises(InputError, match="has no function letters"):
        load_scorer(f"{tmp_path}/mine.py:letters", "", FP32)
    with pytest.raises(InputError, match="no such file"):
        load_scorer(f"{tmp_path}/yours.py:words", "", FP32)
    with pytest.raises(InputError, match=r"no config\.json"):
        load_scorer(f"{tmp_path}/nowhere", "", FP32)


def test_scorer_needs_one_output(tiny, tmp_path):
    two = tiny_checkpoint(tmp_path / "two", id2label={"0": "bad", "1": "good"},
                          architectures=["LlamaForSequenceClassification"])
    for model in (two, tiny):
        with pytest.raises(InputError, match="needs a sequence-classification checkpoint with one output"):
            load_scorer(str(model), "", FP32)


def test_texts_beyond_the_context_are_named(tiny, judge):
    long = {"id": "long", "prompt": "x" * 600, "response": "y"}
    with pytest.raises(InputError, match="record long: its prompt fills the context"):
        likelihood([ROWS[0], long], tiny, FP32)
    with pytest.raises(InputError, match=r"record long: 60\d tokens, the context of .* is 512"):
        reward([ROWS[0], long], judge, FP32)


@pytest.mark.parametrize(("text", "share"), [
    ("", 0), ("one two three", 0), ("all of these words differ from each other", 0), ("a b c a b c", 0.25),
    ("A b  c\na B c", 0.25), ("no " * 10, 7 / 8), ("so it goes and so it goes", 0.2)])
def test_repetition(text, share):
    assert repetition(text) == pytest.approx(share)


# ---- the filter ----

def answers(texts: list[str], **more) -> list[dict]:
    return [{"id": f"x{i}", "prompt": f"Prompt {i}?", "response": text, "finish_reason": "stop", **more}
            for i, text in enumerate(texts)]


def length_scorer(rows: list[dict]) -> list[float]:
    """A point for each word, so that gaps are whole numbers."""
    return [float(len(row["response"].split())) for row in rows]


def make(chosen, rejected, tmp_path, scorer=length_scorer, **changes) -> tuple[dict, list[dict]]:
    counts = make_pairs(chosen, rejected, tmp_path / "pairs.jsonl", scorer, FilterOptions(**changes))
    return counts, read_rows(tmp_path / "pairs.jsonl")


def test_each_reason_to_drop_a_pair_is_counted(tmp_path):
    chosen = answers(["a good long answer", " the  same\n", "", "cut off in the", "again " * 9, "fine one here now", "short"])
    rejected = answers(["bad", "the same", "text", "no", "yes", "again " * 9, "longer than that"])
    chosen[3]["finish_reason"] = rejected[0]["finish_reason"] = "length"  # of the rejected one it does not matter
    counts, pairs = make(chosen, rejected, tmp_path)
    assert [row["id"] for row in pairs] == ["x0"]
    reasons = {name: counts[name] for name in ("identical", "empty", "cut_off", "repetitive", "small_gap")}
    assert reasons == {"identical": 1, "empty": 1, "cut_off": 1, "repetitive": 2, "small_gap": 1}
    assert (counts["candidates"], counts["valid"], counts["pairs"]) == (7, 1, 1)
    assert [row["id"] for row in make(chosen, rejected, tmp_path, keep_cut_off=True)[1]] == ["x0", "x3"]
    assert [row["id"] for row in make(chosen, rejected, tmp_path, threshold=-5)[1]] == ["x0", "x6"]
    assert [row["id"] for row in make(chosen, rejected, tmp_path, repetition=0.9)[1]] == ["x0", "x4"]
    # without a scorer there is no gap, and all else stays
    counts, pairs = make(chosen, rejected, tmp_path, scorer=None)
    assert [row["id"] for row in pairs] == ["x0", "x6"] and "small_gap" not in counts
    assert pairs[0]["score_chosen"] is pairs[0]["score_rejected"] is None


@pytest.mark.parametrize(("threshold", "kept"), [(0, 3), (0.99, 3), (1, 2), (2, 1), (2.99, 1)])
def test_threshold_itself_is_not_enough(tmp_path, threshold, kept):
    counts, _ = make(answers(["a b", "a b c", "a b c d"]), answers(["x"] * 3), tmp_path, threshold=threshold)
    assert (counts["valid"], counts.get("small_gap", 0)) == (kept, 3 - kept)


def test_pairs_are_joined_by_id(tmp_path):
    chosen, rejected = answers(["a b", "c d e", "f g"]), answers(["x", "y", "z"])[::-1]
    chosen[2]["id"] = "unknown"
    counts, pairs = make(chosen, rejected, tmp_path)
    assert counts["candidates"] == 2
    assert [(row["chosen"], row["rejected"]) for row in pairs] == [("a b", "x"), ("c d e", "y")]


def test_columns(tmp_path):
    chosen = [{**answers(["much better"])[0], "draft": "d"}, {**TALK, "finish_reason": "stop"}]
    rejected = [*answers(["bad"]), {**TALK, "response": "x"}]
    make_pairs(chosen, rejected, tmp_path / "pairs.jsonl", length_scorer, FilterOptions(), iteration=3)
    assert read_rows(tmp_path / "pairs.jsonl") == [
        {"id": "x0", "prompt": "Prompt 0?", "chosen": "much better", "rejected": "bad", "score_chosen": 2.0,
         "score_rejected": 1.0, "iteration": 3},
        {"id": "talk", "messages": CHAT, "chosen": "See you", "rejected": "x", "score_chosen": 2.0, "score_rejected": 1.0,
         "iteration": 3}]


def test_counts_hold_gap_and_lengths(tmp_path):
    counts, _ = make(answers(["a b c", "a b"]), answers(["x", "y z"]), tmp_path)
    assert (counts["mean_gap"], counts["chosen_words"], counts["rejected_words"]) == (1.0, 3.0, 1.0)  # words: of kept pairs


def test_cap_draws_at_random_and_again_the_same(tmp_path):
    chosen, rejected = answers([f"good answer {i}" for i in range(50)]), answers(["bad"] * 50)
    counts, first = make(chosen, rejected, tmp_path, pairs=10)
    assert (counts["valid"], counts["pairs"], len(first)) == (50, 10, 10)
    numbers = [int(row["id"][1:]) for row in first]
    assert numbers == sorted(set(numbers)) != list(range(10))
    assert make(chosen, rejected, tmp_path, pairs=10)[1] == first
    for changes in ({"seed": 1}, {"iteration": 2}):
        make_pairs(chosen, rejected, tmp_path / "pairs.jsonl", length_scorer, FilterOptions(pairs=10), **changes)
        assert [row["id"] for row in read_rows(tmp_path / "pairs.jsonl")] != [row["id"] for row in first]
    assert make(chosen, rejected, tmp_path, pairs=50)[0]["pairs"] == 50


def test_nothing_left_says_what_the_gaps_are(tmp_path):
    with pytest.raises(InputError, match=r"no pair of 3 left \({'small_gap': 3}\); score gaps 1 1 2 3 3; lower"):
        make(answers(["a b", "a b c", "a b c d"]), answers(["x"] * 3), tmp_path, threshold=3)
    with pytest.raises(InputError, match=r"no pair of 0 left \({}\); score gaps none"):
        make([], answers(["x"]), tmp_path)
    assert not (tmp_path / "pairs.jsonl").exists()
    assert quantiles([5, 1, 2, 4, 3]) == "1 2 3 4 5"


# ---- the command ----

def test_two_processes_score_as_one(tiny, tmp_path):
    chosen = [{**row, "finish_reason": "stop"} for row in ROWS[1:]]
    rejected = [{**row, "response": "No. " + row["prompt"]} for row in chosen]
    files = [write_rows(tmp_path / f"{name}.jsonl", rows) for name, rows in (("chosen", chosen), ("rejected", rejected))]
    args = ["reward.py", "--scorer", "likelihood", "--model", tiny, "--chosen", files[0], "--rejected", files[1],
            "--out", tmp_path / "two.jsonl", "--dtype", "float32", "--threshold", -9]
    code, stdout, stderr = run(args, nproc=2)
    assert code == 0, stderr
    assert (result := last_json(stdout))["pairs"] == 5 and result["seconds"] > 0
    for side, rows in (("chosen", chosen), ("rejected", rejected)):
        scores = [row[f"score_{side}"] for row in read_rows(tmp_path / "two.jsonl")]
        assert scores == pytest.approx(likelihood(rows, tiny, FP32), abs=1e-5)


def test_command_needs_the_model_of_likelihood(tmp_path):
    rows = write_rows(tmp_path / "rows.jsonl", answers(["a"]))
    code, _, stderr = run(["reward.py", "--chosen", rows, "--rejected", rows, "--out", tmp_path / "out.jsonl"])
    assert code == 2 and stderr.splitlines()[-1] == "error: --scorer likelihood scores under a model; give --model DIR"
