"""ALMoST: golden numbers of comparisons and of RLOO, and a run that is killed inside a round."""

from dataclasses import replace
from pathlib import Path

import micro
import pytest
import torch
from conftest import ROOT, read_rows, refusal, run, tiny_checkpoint, write_rows
from cycle import command, counts, flags, inputs, one_line, stamps

from formats.chat import Chat
from methods import almost, online, rlsf
from methods.almost import AlmostOptions, comparisons, is_bad, read_assistants
from methods.rlsf import RlsfOptions, advantages, clipped_loss, leave_one_out
from plumbing.files import InputError
from plumbing.options import RunOptions, parse_options
from plumbing.stage import content_hash, read_manifest
from scorers.classifier import bradley_terry
from train import Example

pytest_plugins = ["cycle"]
FP32 = RunOptions(dtype="float32")
OWN = ["--almost.assistants=sft:8,sft:0", "--almost.plain", "--almost.favourites=2"]
OWN += ["--rlsf.steps=3", "--rlsf.refresh=2", "--rlsf.batch=8", "--rlsf.samples=4"]
OWN += [
    "--sampling.max-new-tokens=16",
    "--rlsf.lr=1e-4",
    "--rlsf.max-length=64",
    "--rlsf.max-new-tokens=16",
]
OWN += ["--reward.batch=8", "--reward.lr=1e-3", "--reward.max-length=64"]
OWN += ["--demonstrations.batch=16", "--demonstrations.epochs=1", "--demonstrations.lr=1e-4"]


def almost_run(world, out: Path, *more: str) -> str:
    code, text, errors = command(almost.main, flags(world, out, *OWN, *more))
    assert code == 0, errors
    return text


@pytest.fixture(scope="module")
def whole(world, tmp_path_factory) -> Path:
    """A run of two iterations that nothing has disturbed."""
    out = tmp_path_factory.mktemp("almost") / "whole"
    almost_run(world, out)
    return out


# -------------------------------------------------------------------------------- comparisons

A, B, C, D = range(4)


@pytest.mark.parametrize(
    ("answers", "pairs"),
    [
        ([(A, 120), (B, 200), (C, 90), (D, 300)], [(0, 2), (1, 2)]),
        ([(A, 200), (B, 200), (C, 200), (D, 200)], [(0, 1), (1, 2), (2, 3)]),
        ([(A, 60), (B, 300), (C, 310), (D, 320)], [(1, 2), (2, 3)]),
        ([(A, 100), (D, 90)], [(0, 1)]),  # B and C are bad
        ([(A, 100)], []),
        ([], []),
        ([(A, 100), (A, 120), (C, 80)], [(0, 2)]),  # a rank is chosen once
        ([(A, 100), (C, 150), (D, 160)], [(1, 2)]),  # B is empty, and does not count
    ],
)
def test_comparisons_by_hand(answers, pairs):
    assert comparisons(answers) == pairs


@pytest.mark.parametrize(
    ("text", "bad"),
    [
        ("x" * 48 + ".", True),
        ("x" * 49 + ".", False),
        ("x" * 60 + " end?", True),
        ("x" * 60 + " end:", True),
        ("x" * 60 + " end", True),
        ("x" * 60 + " end!", False),
        ("Well, " + "x" * 60 + ".", True),
        ("Wells are " + "x" * 60 + ".", True),  # as in the authors' program
        ("x" * 60 + " I don't know.", True),
        ("x" * 60 + " I don\u2019t know.", True),
        ("x" * 60 + "\nHuman: more.", True),
        ("", True),
    ],
)
def test_which_answers_take_no_part(text, bad):
    assert is_bad({"response": text, "finish_reason": "stop"}) == bad


def test_plain_answers_may_be_short_but_not_cut_off():
    short = {"response": "fig kiwi", "finish_reason": "stop"}
    assert is_bad(short)
    assert not is_bad(short, plain=True)
    assert is_bad({**short, "finish_reason": "length"}, plain=True)
    assert is_bad({**short, "response": ""}, plain=True)
    assert is_bad({**short, "response": "I do not know"}, plain=True)


def test_pairs_of_assistants(tmp_path):
    texts = {
        "a": ["right one", "wrong"],
        "b": ["same", "same"],
        "c": ["", "late"],
    }
    files = []
    for i in range(2):
        rows = []
        for name, pair in texts.items():
            asked = {"id": name, "prompt": name, "keywords": ["k"]}
            rows.append({**asked, "response": pair[i], "finish_reason": "stop", "tokens": 2})
        files.append(write_rows(tmp_path / f"{i}.jsonl", rows))
    o = AlmostOptions(run=FP32, plain=True)
    out = almost.compare(files, [0, 1], tmp_path / "pairs.jsonl", o)
    assert read_rows(out) == [
        {
            "id": "a 0 1",
            "prompt": "a",
            "keywords": ["k"],
            "chosen": "right one",
            "rejected": "wrong",
            "assistant_chosen": 0,
            "assistant_rejected": 1,
        }
    ]
    found = counts(out)
    assert found["candidates"] == 2
    assert found["identical"] == found["bad"] == 1

    # none is left
    strict = replace(o, plain=False)
    with pytest.raises(InputError, match="no pair of 3 prompts left; 6 answers are bad"):
        almost.compare(files, [0, 1], tmp_path / "none.jsonl", strict)


def test_assistants_by_rank(tmp_path):
    (tmp_path / "big").mkdir()
    o = AlmostOptions(run=FP32, assistants=f"{tmp_path / 'big'} = sft:25, sft:0")
    assert read_assistants(o) == [
        (0, str(tmp_path / "big")),
        (0, "sft:25"),
        (1, "sft:0"),
    ]
    for text, problem in [
        ("sft:10=sft:0", "give at least two"),
        ("sft:10,nowhere", "'nowhere' is neither"),
        ("sft:,sft:0", "'sft:' is neither"),
        ("sft:5,", "'' is neither"),
        ("sft:0,sft:0", "one is there twice"),
    ]:
        assert problem in refusal(read_assistants, replace(o, assistants=text))


def test_the_reward_models_loss_by_hand():
    scores = [[torch.tensor(1.5), torch.tensor(0.25)]]
    loss, _ = bradley_terry([], scores)
    assert float(loss) == pytest.approx(0.2519290813, abs=1e-7)


# -------------------------------------------------------------------------------- RLOO


BY_HAND = [-8 / 3, -4 / 3, 0, 4]


def test_leave_one_out_by_hand():
    assert leave_one_out([1, 2, 3, 6]) == pytest.approx(BY_HAND)
    # divided by the standard deviation over the round, here of two prompts
    found = advantages([1, 2, 3, 6, 5, 5, 5, 5], 4)
    squares = sum(one**2 for one in BY_HAND)
    deviation = (squares / 8) ** 0.5
    of_first = [one / deviation for one in BY_HAND]
    assert found == pytest.approx([*of_first, 0, 0, 0, 0])


def test_leaving_the_reference_costs():
    """r - kl (log pi_old - log pi_ref): 1 - .5 (-3 + 5), as the policy likes the answer better."""
    example = answer([-1.0, -2.0], 0.0)
    example.extra["reference"] = [-5.0]
    assert rlsf.total_reward(example, 0.5) == pytest.approx(0.0)
    assert example.extra["kl"] == pytest.approx(2.0)


def test_an_answer_that_was_cut_off_has_no_end_token(tmp_path):
    chat = Chat(tiny_checkpoint(tmp_path / "model", hidden_size=16))
    o = RlsfOptions(run=FP32, max_length=64)
    lengths = {}
    for end in ("stop", "length"):
        row = {
            "id": "a",
            "prompt": "Why?",
            "response": "It is so",
            "finish_reason": end,
            "reward": 1,
        }
        [(ids, start)] = rlsf.make_answer(chat, row, o).sequences
        assert ids[:start] == chat.prompt_ids(row)
        lengths[end] = ids[start:]
    assert lengths["stop"] == [*chat.encode("It is so"), chat.end]
    assert lengths["length"] == chat.encode("It is so")


def test_prompts_without_room_are_left_out(tmp_path):
    model = tiny_checkpoint(tmp_path / "model", hidden_size=16)
    rows = [{"id": "short", "prompt": "Why?"}, {"id": "long", "prompt": "so " * 40}]
    x = write_rows(tmp_path / "x.jsonl", rows)
    o = RlsfOptions(run=FP32, max_length=32, batch=4, samples=2)
    out = rlsf.prompts_of_steps(x, model, tmp_path / "asked.jsonl", o, (1, 3))
    assert [row["id"] for row in read_rows(out)] == ["short 2", "short 3", "short 4", "short 5"]
    assert counts(out)["no_room"] == 1


def test_equal_rewards_move_nothing():
    assert advantages([2.0] * 8, 4) == [0.0] * 8
    # exactly, also where a sum of them is rounded
    assert advantages([0.1] * 4 + [0.5] * 4, 4) == [0.0] * 8
    new = torch.tensor([-1.0, -2.0], requires_grad=True)
    example = answer([-1.5, -2.0], 0.0)
    loss, _ = clipped_loss(0.2)([example], [[new]])
    loss.backward()
    assert new.grad.tolist() == [0, 0]


def test_an_answer_without_a_reward_leaves_its_prompt_out():
    assert leave_one_out([1.0, None, 4.0]) == [0.0] * 3
    assert advantages([1.0, None, 2.0, 4.0], 2) == advantages([5.0, 5.0, 2.0, 4.0], 2)
    example = answer([-1.0], 0.0)
    example.extra |= {"reward": None, "reference": [-1.0]}
    assert rlsf.total_reward(example, 0.1) is None
    loss, sums = clipped_loss(0.2)([example], [[torch.tensor([-2.0])]])
    assert loss == sums["reward"] == 0


@pytest.fixture
def reward_model(tmp_path) -> Path:
    changes = {"architectures": ["LlamaForSequenceClassification"], "num_labels": 1}
    return tiny_checkpoint(tmp_path / "rm", id2label={"0": "LABEL_0"}, **changes)


def test_answers_beyond_the_reward_models_context_are_counted(reward_model, tmp_path):
    rows = []
    for i, text in enumerate(["a", "x" * 600, "b c"]):
        row = {"id": "q", "sample": i, "prompt": "Q?", "response": text, "finish_reason": "stop"}
        rows.append(row)
    samples = write_rows(tmp_path / "samples.jsonl", rows)
    out = rlsf.score_answers(
        samples, reward_model, tmp_path / "scored.jsonl", RlsfOptions(run=FP32)
    )
    rewards = [row["reward"] for row in read_rows(out)]
    assert [reward is None for reward in rewards] == [False, True, False]
    assert counts(out)["not_scored"] == 1
    assert counts(out)["reward"] == pytest.approx((rewards[0] + rewards[2]) / 2, abs=1e-4)

    # the favourite is one of the others
    o = AlmostOptions(run=FP32)
    out = almost.favourites(samples, reward_model, tmp_path / "favourites.jsonl", o)
    best = max((rewards[0], "a"), (rewards[2], "b c"))[1]
    assert [row["response"] for row in read_rows(out)] == [best]
    assert counts(out)["not_scored"] == 1


def answer(old: list[float], advantage: float) -> Example:
    extra = {"old": [old], "advantage": advantage, "reward": 1.0, "kl": 0.5}
    ids = [0] * (len(old) + 1)
    return Example("a", [(ids, 1)], extra=extra)


def test_the_clipped_loss_by_hand():
    """-sum of min(ratio A, clip(ratio) A): ratios 1, 1.5 and 0.5."""
    ratios = torch.tensor([1.0, 1.5, 0.5], dtype=torch.float64)
    old = [-1.0, -2.0, -3.0]
    new = (torch.tensor(old, dtype=torch.float64) + ratios.log()).requires_grad_()
    loss_fn = clipped_loss(0.2)
    loss, sums = loss_fn([answer(old, 2.0)], [[new]])
    assert loss.item() == pytest.approx(-(2.0 + 2.4 + 1.0))
    assert sums == {"reward": 1.0, "kl": 0.5, "clipped": pytest.approx(2 / 3)}
    loss.backward()
    # what has grown beyond the clip is left alone
    assert new.grad.tolist() == pytest.approx([-2.0, 0.0, -1.0])

    loss, _ = loss_fn([answer(old, -2.0)], [[new.detach()]])
    assert loss.item() == pytest.approx(2.0 + 3.0 + 1.6)


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"samples": 1}, "--rlsf.samples 1"),
        ({"batch": 6}, "--rlsf.batch 6: give a multiple"),
        ({"clip": 1.0}, "give kl >= 0 and 0 < clip < 1"),
        ({"kl": -1.0}, "give kl >= 0"),
        ({"loss_on_prompt": True}, "the policy wrote answers only"),
    ],
)
def test_what_rloo_cannot_do(changes, problem):
    assert problem in refusal(rlsf.check_rlsf, RlsfOptions(run=FP32, **changes))


# -------------------------------------------------------------------------------- whole runs


@pytest.mark.slow
def test_what_the_published_part_reads(whole, world):
    M_0 = content_hash(Path(world["model"]))
    assert counts(whole / "assistants/sft8/seeds.jsonl")["records"] == 8
    best = read_manifest(whole / "assistants/sft8/model")["content"]
    it = whole / "iter1"
    assert inputs(it / "assistant0.jsonl")["model"] == best
    assert inputs(it / "assistant1.jsonl")["model"] == M_0
    assert inputs(it / "samples.jsonl")["model"] == best
    assert inputs(whole / "reward")["model"] == M_0
    assert inputs(whole / "reward")["pairs"] == content_hash(it / "pairs.jsonl")
    assert inputs(it / "policy")["model"] == M_0
    assert inputs(it / "policy")["data"] == content_hash(it / "favourites.jsonl")

    # of the answers to a prompt that with the highest reward
    rows = read_rows(it / "favourites.jsonl")
    several = read_rows(it / "samples.jsonl")
    for row in rows:
        texts = [one["response"] for one in several if one["id"] == row["id"]]
        assert row["response"] in texts
    assert len({row["id"] for row in rows}) == len(rows)


@pytest.mark.slow
def test_reinforcement_goes_on_from_the_last_model(whole):
    M_1 = read_manifest(whole / "iter1/policy")["content"]
    first, second = whole / "iter2/round0", whole / "iter2/round2"
    for folder in (first, second):
        read = inputs(folder / "average")
        assert read["model"] == read["reference"] == M_1
        assert len(read_rows(folder / "scored.jsonl")) == (16 if folder == first else 8)
    assert inputs(first / "samples.jsonl")["model"] == M_1
    average = read_manifest(first / "average")["content"]
    assert inputs(second / "samples.jsonl")["model"] == average
    assert counts(first / "average")["kl"] == 0

    # a new round's first step: the ratio is 1 everywhere
    lines = read_rows(whole / "iter2/policy/metrics.jsonl")
    assert [line["step"] for line in lines] == [1, 2, 3]
    assert lines[0]["clipped"] == lines[2]["clipped"] == 0
    assert not list(whole.glob("iter*/round*/training"))


@pytest.mark.slow
def test_two_processes_ask_the_same_of_the_same_model(whole, world, tmp_path):
    out = tmp_path / "two"
    code, _, errors = run(["-m", "methods.almost", *flags(world, out, *OWN)], nproc=2)
    assert code == 0, errors
    # M_0's answers; what trained models write may differ after rounding
    file = "iter1/assistant1.jsonl"
    assert (out / file).read_bytes() == (whole / file).read_bytes()
    for t in (1, 2):
        ours = [row["prompt"] for row in read_rows(out / f"iter{t}/prompts.jsonl")]
        assert len(ours) == counts(out / f"iter{t}/prompts.jsonl")["prompts"]
    assert len(read_rows(out / "iter2/policy/metrics.jsonl")) == 3


@pytest.mark.slow
def test_it_goes_on_after_a_kill_and_does_nothing_twice(whole, world, tmp_path, monkeypatch):
    out = tmp_path / "killed"

    def dies(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(online, "save_checkpoint", dies)
    with pytest.raises(KeyboardInterrupt):
        almost_run(world, out)
    monkeypatch.undo()
    almost_run(world, out)
    for t in (1, 2):
        ours = read_manifest(out / f"iter{t}/policy")["content"]
        assert ours == read_manifest(whole / f"iter{t}/policy")["content"]
    before = stamps(out)
    almost_run(world, out)
    assert stamps(out) == before
    assert (out / "report.html").is_file()


@pytest.mark.slow
def test_its_reward_model_scores_for_others(whole, world, tmp_path):
    given = ["--pairs.scorer", str(whole / "reward"), "--pairs.threshold", "-99"]
    code, _, errors = command(almost.main, flags(world, tmp_path / "x", *OWN, *given))
    assert code == 0, errors


def test_more_seeds_than_there_are(world, tmp_path):
    given = ["--almost.assistants", "sft:999,sft:0"]
    code, _, errors = command(almost.main, flags(world, tmp_path / "x", *OWN, *given))
    assert f"sft:999: there are {micro.SEEDS} seeds" in one_line(code, errors)


def test_almosts_recipe_is_the_demos_but_where_it_says_so():
    here = parse_options(almost.Options, ["--config", str(ROOT / "recipes/methods/almost.toml")])
    demo = parse_options(almost.Options, ["--config", str(ROOT / "recipes/demo.toml")])
    assert (here.generator, here.prompts) == (demo.generator, demo.prompts)
    assert here.seed_sft == demo.seed_sft
    assert here.answers == demo.answers
    assert here.sampling == replace(demo.answers, temperature=1.0, top_p=0.9)
    rlsf.check_rlsf(here.rlsf)
    assert len(read_assistants(here.almost)) == 3
