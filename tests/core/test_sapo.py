"""SAPO: golden numbers of segment, buffer and EMA, and runs that are killed inside a round."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import ROOT, read_rows, run, tiny_checkpoint, write_rows
from cycle import command, counts, flags, inputs, one_line, stamps
from safetensors.torch import load_file

from formats.chat import Chat
from methods import online, sapo
from methods.online import make_rounds, move, presented
from methods.sapo import SapoOptions, new_pairs, replay, span, split, weights
from plumbing.options import RunOptions, parse_options
from plumbing.stage import content_hash, read_manifest

pytest_plugins = ["cycle"]
FP32 = RunOptions(dtype="float32")
OWN = ["--sapo.steps=5", "--sapo.segment=4", "--sapo.reference=4", "--sapo.refresh=2"]
OWN += ["--sapo.buffer=20"]


def sapo_run(world, out: Path, *more: str) -> dict:
    code, text, errors = command(sapo.main, flags(world, out, *OWN, *more))
    assert code == 0, errors
    return text


@pytest.fixture(scope="module")
def whole(world, tmp_path_factory) -> Path:
    """A run of two iterations that nothing has disturbed."""
    out = tmp_path_factory.mktemp("sapo") / "whole"
    sapo_run(world, out)
    return out


# -------------------------------------------------------------------------------- segments


@pytest.mark.parametrize(
    ("prompt", "answer", "length", "latest"),
    [
        (100, 40, 40, 0),
        (100, 256, 256, 0),
        (100, 258, 256, 0),
        (100, 259, 256, 0),
        (100, 260, 256, 1),
        (100, 600, 256, 341),
        (1700, 340, 256, 81),
        (1700, 400, 256, 92),  # longer than fits: the authors' program would always take 92
        (1790, 300, 256, 2),
        (2047, 300, 1, 0),  # room for one token
    ],
)
def test_where_a_segment_may_begin(prompt, answer, length, latest):
    assert span(prompt, answer, 256, 2048) == (length, latest)


@pytest.mark.parametrize(
    ("answer", "length", "latest"),
    [
        (10, 4, 3),
        (6, 4, 0),
        (7, 4, 0),
        (8, 4, 1),
        (3, 3, 0),
    ],
)
def test_where_a_short_segment_may_begin(answer, length, latest):
    assert span(3, answer, 4, 16) == (length, latest)


class Words:
    """A tokenizer of numbers, as in the golden example: 0 ends a text, and has none of its own."""

    def text(self, ids):
        return "".join(f"{i} " for i in ids if i)


def rejected(tmp_path: Path, written: str, ended: bool, gold=(*range(11, 20), 0), begin=2):
    """The rejected text where the model has written this in place of a segment of 4."""
    parts = split(Words(), list(gold), begin, 4)
    row = {
        "id": "a",
        "prompt": "x",
        **parts,
        "gold": Words().text(gold),
        "max_new_tokens": 4,
        "response": parts["prefix"] + written,
        "finish_reason": "stop" if ended else "length",
        "tokens": 4,
    }
    out = tmp_path / f"pairs{len(list(tmp_path.iterdir()))}.jsonl"
    file = write_rows(tmp_path / "written.jsonl", [row])
    [pair] = read_rows(new_pairs(file, out, FP32))
    assert pair["chosen"] == row["gold"]
    assert set(pair) == {"id", "prompt", "chosen", "rejected"}
    return pair["rejected"].strip(), counts(out)


def test_what_follows_a_segment_stays_unless_the_model_has_ended(tmp_path):
    text, found = rejected(tmp_path, "21 22 23 24 ", False)
    assert text == "11 12 21 22 23 24 17 18 19"
    assert found["ended"] == found["same"] == found["no_end"] == 0
    text, found = rejected(tmp_path, "21 ", True)
    assert text == "11 12 21"
    assert found["ended"] == 1
    assert rejected(tmp_path, "", True)[0] == "11 12"
    # half a character, where the limit cut
    text, _ = rejected(tmp_path, "21 \ufffd", False)
    assert text == "11 12 21 17 18 19"
    text, found = rejected(tmp_path, "13 14 15 16 ", False)
    assert text == "11 12 13 14 15 16 17 18 19"
    assert found["same"] == 1
    # nothing is left behind the segment, and the model was cut off
    text, found = rejected(tmp_path, "21 22 23 ", False, gold=(11, 12, 0), begin=0)
    assert text == "21 22 23"
    assert found["no_end"] == 1
    # the model ended at once: an empty text, which is kept
    text, found = rejected(tmp_path, "", True, begin=0)
    assert text == ""
    assert found["empty"] == 1


def test_a_cut_inside_a_character_moves_down(tmp_path):
    chat = Chat(tiny_checkpoint(tmp_path / "model", hidden_size=16))
    gold = "aé日b" * 3
    ids = chat.encode(gold)
    assert len(ids) > len(gold)
    for begin in range(len(ids)):
        parts = split(chat, ids, begin, 2)
        assert gold.startswith(parts["prefix"])
        assert gold.endswith(parts["rest"])
        assert "\ufffd" not in parts["prefix"] + parts["rest"]
        assert parts["last"] == (begin >= len(ids) - 2)
        middle = len(gold) - len(parts["prefix"]) - len(parts["rest"])
        assert 0 <= middle <= 3


# -------------------------------------------------------------------------------- replay buffer


def test_how_likely_a_pair_is_drawn():
    likely = weights([2, 0, 1, 0])
    shares = [one / sum(likely) for one in likely]
    assert shares == pytest.approx([0.1176470588, 0.3529411765, 0.1764705882, 0.3529411765])


def arrivals(steps: int, batch: int) -> list[list[dict]]:
    found = []
    for step in range(steps):
        found.append([{"id": f"{step} {i}"} for i in range(batch)])
    return found


def test_first_in_first_out():
    o = SapoOptions(run=FP32, buffer=4)
    for step, drawn in enumerate(replay(arrivals(40, 2), 2, o)):
        assert len(drawn) == 2
        for pair in drawn:
            came = int(pair["id"].split()[0])
            assert step - 1 <= came <= step  # four pairs are those of two steps
    # a pair can be drawn at the step at which it comes
    [only] = replay([[{"id": "a"}]], 3, SapoOptions(run=FP32))
    assert [pair["id"] for pair in only] == ["a", "a", "a"]


def test_the_draw_of_a_step_follows_from_what_came_until_then():
    o = SapoOptions(run=FP32, buffer=50)
    whole = replay(arrivals(25, 4), 4, o)
    for steps in (1, 8, 25):
        assert replay(arrivals(steps, 4), 4, o) == whole[:steps]
    other = replace(o, run=replace(FP32, seed=1))
    assert replay(arrivals(25, 4), 4, other) != whole


def test_epochs_are_joined_and_each_has_its_own_order():
    rows = [{"id": i} for i in range(5)]
    places = presented(rows, 3, 14, seed=0)
    assert [place for place, _ in places] == [*range(3, 14)]
    ids = [row["id"] for _, row in presented(rows, 0, 15, seed=0)]
    epochs = [ids[i : i + 5] for i in (0, 5, 10)]
    assert all(sorted(epoch) == [0, 1, 2, 3, 4] for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) > 1
    assert [row["id"] for _, row in places] == ids[3:14]
    assert rows == [{"id": i} for i in range(5)]


# -------------------------------------------------------------------------------- EMA and rounds


def test_the_average_of_weights_by_hand():
    average = torch.nn.Linear(1, 1, bias=False)
    model = torch.nn.Linear(1, 1, bias=False)
    torch.nn.init.zeros_(average.weight)
    found = []
    for theta in (0.0, 1.0, 2.0, 3.0):
        torch.nn.init.constant_(model.weight, theta)
        move(average, model, 0.5)
        found.append(average.weight.item())
    assert found == [0, 0.5, 1.25, 2.125]


def test_rounds_end_where_iteration_or_reference_end():
    folders = [Path("iter1"), Path("iter2"), Path("iter3"), Path("iter4")]
    rounds = make_rounds(Path("M_0"), folders, 100, 50, 108)
    ends = [r.last for r in rounds]
    assert ends == [50, 100, 108, 150, 200, 216, 250, 300, 324, 350, 400]
    folders = [r.folder.parent.name for r in rounds[:4]]
    assert folders == ["iter1", "iter1", "iter2", "iter2"]
    assert rounds[0].sampled == Path("M_0")
    assert rounds[3].sampled == rounds[2].average
    # the reference changes at every multiple of 108, step 0 included
    references = {r.first: sapo.last_reference(rounds, r.first, 108) for r in rounds}
    assert references[50] == Path("M_0")
    assert references[108] == references[200] == rounds[2].average
    assert references[216] == references[300] == rounds[5].average
    assert references[324] == rounds[8].average


# -------------------------------------------------------------------------------- whole runs


@pytest.mark.slow
def test_one_training_goes_on_through_all_rounds(whole, world):
    rounds = sorted(whole.glob("iter*/round*"), key=lambda path: int(path.name[5:]))
    names = [path.name for path in rounds]
    assert names == [f"round{step}" for step in (0, 2, 4, 5, 7, 8, 9)]
    M_0 = content_hash(Path(world["model"]))
    averages = [read_manifest(path / "average")["content"] for path in rounds]
    # the averages after 4 and after 8 steps
    references = [M_0, M_0, *[averages[1]] * 3, *[averages[4]] * 2]
    sampled = [M_0, *averages]
    for i, path in enumerate(rounds):
        read = inputs(path / "average")
        assert read["model"] == M_0
        assert read["average"] == sampled[i]
        assert inputs(path / "segments.jsonl")["model"] == sampled[i]
        assert read["reference"] == references[i]
    # the learning rate is that of one schedule, and the metrics those of all steps
    lines = []
    for t in (1, 2):
        lines += read_rows(whole / f"iter{t}/policy/metrics.jsonl")
    assert [line["step"] for line in lines] == [*range(1, 11)]
    assert lines[0]["preference_loss"] == pytest.approx(0.693147, abs=1e-4)
    rates = [line["lr"] for line in lines]
    assert rates == sorted(rates, reverse=True)
    assert rates[0] > 0
    # what no later round reads is gone
    assert not list(whole.glob("iter*/round*/training"))
    # but the last average
    [kept] = whole.glob("iter*/round*/average/*.safetensors")
    assert kept.parent.parent.name == "round9"


def test_a_rejected_response_of_the_same_tokens_is_trained_on(world, tmp_path):
    """Texts may differ where tokens do not, such as in a space that the tokenizer takes away."""
    o = parse_options(sapo.Options, flags(world, tmp_path, *OWN))
    end = Chat(o.model, o.run).end_text
    rows = []
    for i in range(o.policy.batch):
        row = {"id": f"{i}", "prompt": "p", "chosen": "a b", "rejected": f"a b{end if i else 'c'}"}
        rows.append({**row, "prompt": f"p {i}"})
    D = write_rows(tmp_path / "drawn.jsonl", rows)
    r = online.Round(o.model, tmp_path / "round0", None, 0, 1, 5)
    sapo.train_on_pairs(r, Path(D), o.model, o, tmp_path / "cache")
    assert counts(r.average)["pairs"] == o.policy.batch


@pytest.mark.slow
def test_drawn_pairs_are_gold_against_gold_with_a_segment(whole):
    gold = {row["id"]: row["response"] for row in read_rows(whole / "seeds.jsonl")}
    for path in whole.glob("iter*/round*/drawn.jsonl"):
        made = {}
        for earlier in whole.glob("iter*/round*/pairs.jsonl"):
            made |= {row["id"]: row for row in read_rows(earlier)}
        for row in read_rows(path):
            name = row["id"].split(" drawn ")[0]
            assert row["rejected"] == made[name]["rejected"]
            assert row["chosen"] == gold[name.split()[0]]


@pytest.mark.slow
@pytest.mark.parametrize("kill", [1, 4])
def test_a_round_is_repeated_after_a_kill(whole, world, tmp_path, monkeypatch, kill):
    out = tmp_path / "killed"
    saves = []

    # the average is there, the training is not
    def dies(folder, *args):
        saves.append(folder)
        if len(saves) == kill:
            raise KeyboardInterrupt
        real(folder, *args)

    real = online.save_checkpoint
    monkeypatch.setattr(online, "save_checkpoint", dies)
    with pytest.raises(KeyboardInterrupt):
        sapo_run(world, out)
    monkeypatch.undo()
    # the trainings of the last two rounds, and no other
    left = sorted(path.parent.name for path in out.glob("iter*/round*/training"))
    assert left == {1: [], 4: ["round2", "round4"]}[kill]
    sapo_run(world, out)
    for path in whole.glob("iter*/round*/*.jsonl"):
        assert (out / path.relative_to(whole)).read_bytes() == path.read_bytes()
    for t in (1, 2):
        ours = read_manifest(out / f"iter{t}/policy")["content"]
        assert ours == read_manifest(whole / f"iter{t}/policy")["content"]
        steps = [row["step"] for row in read_rows(out / f"iter{t}/policy/metrics.jsonl")]
        assert steps == [*range(5 * t - 4, 5 * t + 1)]


@pytest.mark.slow
def test_two_processes_make_the_same_pairs_of_the_same_model(whole, world, tmp_path):
    args = flags(world, tmp_path / "two", *OWN, "--iters", "1")
    code, _, errors = run(["-m", "methods.sapo", *args], nproc=2)
    assert code == 0, errors
    for name in ("cut", "segments", "pairs", "drawn"):
        file = f"iter1/round0/{name}.jsonl"
        assert (tmp_path / "two" / file).read_bytes() == (whole / file).read_bytes()
    # and train on: the averages are the same but for rounding
    ours = load_file(tmp_path / "two/iter1/policy/model.safetensors")
    theirs = load_file(whole / "iter1/policy/model.safetensors")
    for name, weight in theirs.items():
        assert torch.allclose(ours[name], weight, atol=2e-3), name


@pytest.mark.slow
def test_any_refresh_draws_alike_until_texts_differ(whole, world, tmp_path):
    """The first round samples the same texts, so its pairs are the first steps of a longer one."""
    out = tmp_path / "longer"
    sapo_run(world, out, "--iters", "1", "--sapo.refresh", "4")
    longer = read_rows(out / "iter1/round0/drawn.jsonl")
    first = read_rows(whole / "iter1/round0/drawn.jsonl")
    assert first == longer[: len(first)]
    assert len(longer) == 2 * len(first)


@pytest.mark.slow
def test_a_training_that_has_lost_its_state_says_so(whole, world, tmp_path):
    (whole / "iter1/policy").rename(tmp_path / "policy")
    try:
        code, _, errors = command(sapo.main, flags(world, whole, *OWN))
        assert "what training goes on from is gone" in one_line(code, errors)
    finally:
        (tmp_path / "policy").rename(whole / "iter1/policy")
    before = stamps(whole)
    sapo_run(world, whole)
    assert stamps(whole) == before


@pytest.mark.slow
def test_more_iterations_later_are_refused(whole, world):
    args = flags(world, whole, *OWN, "--iters", "3")
    code, _, errors = command(sapo.main, args)
    assert "total = 10, now 15" in one_line(code, errors)


@pytest.mark.slow
def test_losses_without_a_reference_train_too(world, tmp_path):
    out = tmp_path / "orpo"
    sapo_run(world, out, "--iters", "1", "--policy.loss", "orpo")
    assert len(read_rows(out / "iter1/policy/metrics.jsonl")) == 5


@pytest.mark.parametrize(
    ("given", "problem"),
    [
        (["--sapo.decay", "1"], "--sapo.decay 1.0: give a number from 0 to below 1"),
        (["--data", "fresh"], "--data fresh: not for this method"),
        (["--policy.max-length", "4"], "leaves room for a response in 4 tokens"),
    ],
)
def test_what_sapo_cannot_do_gets_one_line(world, tmp_path, given, problem):
    args = flags(world, tmp_path / "out", *OWN, *given)
    code, _, errors = command(sapo.main, args)
    assert problem in one_line(code, errors)


def test_a_loss_that_reads_other_models_is_refused(world, tmp_path):
    second = ["--policy.loss", "mrpo", "--policy.second-reference", world["model"]]
    args = flags(world, tmp_path / "out", *OWN, *second)
    code, _, errors = command(sapo.main, args)
    assert "--policy.loss mrpo: not for this method" in one_line(code, errors)


def test_sapos_recipe_is_the_demos_but_where_it_says_so():
    here = parse_options(sapo.Options, ["--config", str(ROOT / "recipes/methods/sapo.toml")])
    demo = parse_options(sapo.Options, ["--config", str(ROOT / "recipes/demo.toml")])
    o = {"lr": 1e-4, "epochs": 1, "save_every": 0}
    assert here.policy == replace(demo.policy, **o)
    assert here.answers == demo.answers
    assert here.sapo.steps % here.sapo.refresh == 0
