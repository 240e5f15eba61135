"""The rivals in methods/: golden numbers, which files each step reads, and whole runs."""

import math
import shutil
from dataclasses import replace
from pathlib import Path

import micro
import pytest
import torch
from conftest import ROOT, last_json, read_rows, refusal, run, tiny_checkpoint, write_rows
from cycle import command, counts, flags, inputs, one_line, stamps

from losses import LOSSES, PairLogps
from methods import controls, sampling_ranking, self_rewarding, spin
from methods.ranking import RECORDED, best_and_worst, rank_pairs
from methods.self_rewarding import TEMPLATE, ask, grade, judged, mean_scores, read_score
from pairs import PairOptions, make_pairs
from plumbing.files import InputError
from plumbing.options import RunOptions, parse_options
from plumbing.stage import content_hash, read_manifest

pytest_plugins = ["cycle"]
JUDGE = [
    "--rewarding.samples=3",
    "--rewarding.judgements=2",
    "--rewarding.template={prompt} {response}",
    "--verdicts.max-new-tokens=8",
    "--pairs.threshold=0",
    "--seed-sft.epochs=40",
]
METHODS = {
    "spin": (spin, ["--spin.samples", "2", "--policy.epochs", "2", "--spin.equal"]),
    "sampling_ranking": (sampling_ranking, ["--ranking.samples", "3", "--pairs.threshold", "0"]),
    "self_rewarding": (self_rewarding, JUDGE),
}


def go(name: str, world: dict[str, str], out: Path, *more: str) -> dict:
    """A method on the tests' world: its JSON line."""
    method, own = METHODS[name]
    code, text, errors = command(method.main, flags(world, out, *own, *more))
    assert code == 0, errors
    return last_json(text)


@pytest.fixture(scope="module", params=METHODS)
def method_run(request, world, tmp_path_factory) -> tuple[str, Path, dict]:
    """A finished run of two iterations: (method, run directory, its JSON line)."""
    out = tmp_path_factory.mktemp("methods") / request.param
    return request.param, out, go(request.param, world, out)


# -------------------------------------------------------------------------------- whole runs


@pytest.mark.slow
def test_a_method_runs_to_its_end_and_not_twice(method_run, world):
    name, out, result = method_run
    assert len(result["scores"]) == 3
    assert (out / "report.html").is_file()
    tag = name.replace("_", "-")
    assert f"tags:\n- {tag}\n" in (out / "iter2/policy/README.md").read_text()
    before = stamps(out)
    again = go(name, world, out)
    assert again["scores"] == result["scores"]
    assert stamps(out) == before


@pytest.mark.slow
def test_a_method_goes_on_where_it_was_killed(method_run, world, tmp_path):
    name, out, result = method_run
    copy = shutil.copytree(out, tmp_path / "copy")
    shutil.rmtree(copy / "iter2")
    # between a result and its manifest
    (copy / "iter1/policy/manifest.json").unlink()
    (copy / "iter1/policy.partial").mkdir()
    assert go(name, world, copy)["scores"] == result["scores"]
    for path in ("iter1/policy", "iter2/policy"):
        ours = content_hash(copy / path)
        assert ours == content_hash(out / path)


@pytest.mark.slow
def test_controls_are_for_runs_of_loop(method_run):
    _, out, _ = method_run
    code, _, errors = command(controls.main, ["--run", str(out)])
    assert "is of another method; controls are for runs of loop.py" in one_line(code, errors)


@pytest.mark.slow
def test_options_in_config_json_reproduce_the_run(method_run):
    name, out, _ = method_run
    method, _ = METHODS[name]
    o = parse_options(method.Options, ["--config", str(out / "config.json")])
    assert o == replace(o, out=out)
    sections = {"spin": "spin", "sampling_ranking": "ranking", "self_rewarding": "rewarding"}
    assert getattr(o, sections[name]).samples == (2 if name == "spin" else 3)


@pytest.mark.slow
def test_two_processes_make_the_same_pairs(method_run, world, tmp_path):
    name, out, _ = method_run
    _, own = METHODS[name]
    args = flags(world, tmp_path / "two", *own, "--iters", "1")
    code, _, errors = run(["-m", f"methods.{name}", *args], nproc=2)
    assert code == 0, errors
    for file in ("samples.jsonl", "pairs.jsonl"):
        first = out / "iter1" / file
        second = tmp_path / "two" / "iter1" / file
        assert first.read_bytes() == second.read_bytes(), file


def test_the_methods_are_listed():
    code, text, _ = run(["-m", "methods"])
    assert code == 0
    for name in (*METHODS, "controls"):
        assert f"python -m methods.{name} " in text
    assert "__" not in text


@pytest.mark.parametrize("name", METHODS)
def test_a_recipe_agrees_with_the_demos_but_where_it_says_so(name):
    method, _ = METHODS[name]
    here = parse_options(method.Options, ["--config", str(ROOT / f"recipes/methods/{name}.toml")])
    demo = parse_options(method.Options, ["--config", str(ROOT / "recipes/demo.toml")])
    assert here.out == Path("runs") / name
    assert here.answers == demo.answers
    allowed = {"epochs": 8, "lr": 1e-4} if name == "spin" else {}
    assert here.policy == replace(demo.policy, **allowed)
    if name != "spin":
        assert (here.generator, here.prompts) == (demo.generator, demo.prompts)
    if name == "sampling_ranking":
        assert here.pairs == replace(demo.pairs, threshold=0.0)
        assert here.improver.revision == demo.improver.revision
    if name == "self_rewarding":
        assert here.seed_sft == demo.seed_sft
        # room for a verdict of one token a letter, and its end token
        assert here.verdicts.max_new_tokens > len(" Score: 5")


@pytest.mark.parametrize(
    ("name", "given", "problem"),
    [
        ("spin", ["--start", "base"], "--start base: not for this method; let it be previous"),
        ("spin", ["--one-shot"], "--one-shot True: not for this method; leave it out"),
        ("spin", ["--policy.loss", "sft", "--spin.betas", "5"], "beta"),
        ("sampling_ranking", ["--more-pairs", "f.py:f"], "--more-pairs f.py:f: not for this"),
        ("sampling_ranking", ["--ranking.samples", "1"], "--ranking.samples 1: the best and"),
        ("sampling_ranking", ["--pairs.scorer", "none"], "--pairs.scorer none: responses are"),
        ("self_rewarding", ["--data", "cumulative"], "--data cumulative: not for this method"),
        ("self_rewarding", ["--rewarding.template", "{prompt}"], "has no {response}"),
    ],
)
def test_what_a_method_cannot_do_is_refused_at_once(name, given, problem, world, tmp_path):
    method, _ = METHODS[name]
    args = flags(world, tmp_path / "out", *given)
    code, _, errors = command(method.main, args)
    assert problem in one_line(code, errors)
    assert not (tmp_path / "out").exists()


def test_examples_of_judging_are_read_before_anything_is_made(world, tmp_path):
    example = {"id": "a", "prompt": "A", "response": "text", "verdict": "fair"}
    path = write_rows(tmp_path / "examples.jsonl", [example])
    args = flags(world, tmp_path / "out", "--rewarding.examples", str(path))
    code, _, errors = command(self_rewarding.main, args)
    assert "examples.jsonl: a: no score in its verdict" in one_line(code, errors)


@pytest.mark.slow
def test_ranking_and_judging_have_one_shots(world, tmp_path):
    out = tmp_path / "shot"
    assert len(go("sampling_ranking", world, out, "--one-shot")["scores"]) == 2
    assert counts(out / "iter1/prompts.jsonl")["prompts"] > 40


# -------------------------------------------------------------------------------- SPIN


def spin_loss(beta: float, chosen=(-20.0, -22.0), rejected=(-30.0, -28.0)) -> float:
    """log pi and log p of both sides -> the loss that train_policy is given."""
    values = {
        "chosen": chosen[0],
        "ref_chosen": chosen[1],
        "chosen_tokens": 10.0,
        "rejected": rejected[0],
        "ref_rejected": rejected[1],
        "rejected_tokens": 12.0,
    }
    tensors = {k: torch.tensor([v], dtype=torch.float64) for k, v in values.items()}
    return float(LOSSES["dpo"](PairLogps(**tensors), beta=beta))


def test_spins_loss_by_hand():
    assert spin_loss(0.1) == pytest.approx(0.5130152524, abs=1e-10)
    assert spin_loss(5.0) == pytest.approx(2.0611536e-09, rel=1e-7)
    assert spin_loss(0.1, (-20, -20), (-30, -30)) == pytest.approx(0.6931471806, abs=1e-10)


@pytest.mark.parametrize(
    ("beta", "optimum", "loss"),
    [
        (1.0, (0.5, 0.3, 0.2), 0.5686309696),
        (2.0, (0.3391344200, 0.3217311600, 0.3391344200), 0.5686309696),
        (0.1, (0.9998427109, 0.0001572617, 2.75e-8), 0.5686309696),
    ],
)
def test_the_optimum_of_a_world_of_three_symbols(beta, optimum, loss):
    """Theorem 5.4: proportional to p_t (p_data / p_t)^(1 / beta), a zero of the gradient."""
    data = (0.5, 0.3, 0.2)
    opponent = (0.2, 0.3, 0.5)
    powers = []
    for d, p in zip(data, opponent, strict=True):
        powers.append(p * (d / p) ** (1 / beta))
    exact = [power / sum(powers) for power in powers]
    assert exact == pytest.approx(optimum, abs=1e-10)

    def population(logits: list[float]) -> float:
        values = torch.tensor(logits, dtype=torch.float64)
        logs = torch.log_softmax(values, 0).tolist()
        total = 0.0
        for i, d in enumerate(data):
            for j, p in enumerate(opponent):
                chosen = (logs[i], math.log(opponent[i]))
                rejected = (logs[j], math.log(opponent[j]))
                total += d * p * spin_loss(beta, chosen, rejected)
        return total

    best = [math.log(p) for p in exact]
    assert population(best) == pytest.approx(loss, abs=1e-9)
    assert population([math.log(p) for p in opponent]) == pytest.approx(math.log(2))
    # the gradient by finite differences
    for k in range(3):
        up = list(best)
        up[k] += 1e-4
        down = list(best)
        down[k] -= 1e-4
        slope = (population(up) - population(down)) / 2e-4
        assert abs(slope) < 1e-7


def options(**changes) -> spin.Options:
    given = spin.SpinOptions(**changes)
    o = spin.Options(spin=given)
    return replace(o, policy=replace(o.policy, epochs=6, loss_parameters={"beta": 0.3}))


def test_learning_rate_beta_and_epochs_by_iteration():
    o = options(lrs="5e-7,5e-7,1e-7", betas=".1,.1,.1,5", equal=True)
    found = [spin.policy_of(o, t) for t in (1, 2, 3, 4, 5)]
    rates = [policy.lr for policy in found]
    betas = [policy.loss_parameters["beta"] for policy in found]
    epochs = [policy.epochs for policy in found]
    assert rates == [5e-7, 5e-7, 1e-7, 1e-7, 1e-7]
    assert betas == [0.1, 0.1, 0.1, 5, 5]
    assert epochs == [6, 3, 3, 3, 3]

    # nothing given: as the policy's own
    plain = options()
    assert spin.policy_of(plain, 3) == plain.policy


def test_spins_options_are_checked_before_anything_is_made(world, tmp_path):
    for text in ("1e-6;2", "nan", "0", "-1e-6"):
        assert "give numbers above 0" in refusal(spin.policy_of, options(lrs=text), 1)
    assert "--policy.epochs: 6 cannot" in refusal(spin.policy_of, options(equal=True, window=4), 4)
    wrong = ["--policy.epochs", "3", "--spin.equal"]
    code, _, errors = command(spin.main, flags(world, tmp_path / "out", *wrong))
    assert "--policy.epochs: 3" in one_line(code, errors)
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_spin_starts_from_and_refers_to_the_opponent(world, tmp_path):
    out = tmp_path / "spin"
    go("spin", world, out, "--iters", "3")
    models = [content_hash(Path(world["model"]))]
    for t in (1, 2, 3):
        manifest = read_manifest(out / f"iter{t}/policy")
        models.append(manifest["content"])
    for t in (1, 2, 3):
        read = inputs(out / f"iter{t}/policy")
        assert read["model"] == read["reference"] == models[t - 1]
        assert inputs(out / f"iter{t}/samples.jsonl")["model"] == models[t - 1]

        # this and the last iteration's pairs
        window = [s for s in (t - 1, t) if s]
        files = [content_hash(out / f"iter{s}/pairs.jsonl") for s in window]
        assert list(read["pairs"].values()) == files

    # as many steps in each iteration, but for pairs that were equal to gold
    gold = {row["id"]: row["response"] for row in read_rows(out / "seeds.jsonl")}
    steps = [counts(out / f"iter{t}/policy")["steps"] for t in (1, 2, 3)]
    assert max(steps) - min(steps) <= 1
    for t in (1, 2, 3):
        made = counts(out / f"iter{t}/pairs.jsonl")
        assert made["candidates"] == 2 * micro.SEEDS
        rows = read_rows(out / f"iter{t}/samples.jsonl")
        same = sum(row["response"].split() == gold[row["id"]].split() for row in rows)
        assert made.get("identical", 0) == same
        ids = [row["id"] for row in read_rows(out / f"iter{t}/pairs.jsonl")]
        assert len(set(ids)) == len(ids)
        for row in read_rows(out / f"iter{t}/pairs.jsonl"):
            assert row["chosen"] in gold.values()
    assert not (out / "generator").exists()


def test_gold_goes_with_every_sample_of_its_prompt(tmp_path):
    asked = {"id": "a", "prompt": "A"}
    gold = write_rows(tmp_path / "gold.jsonl", [{**asked, "response": "right"}])
    texts = [
        ("wrong", "length"),
        ("right", "stop"),
        ("", "stop"),
    ]
    rows = []
    for i, (text, end) in enumerate(texts):
        rows.append({**asked, "sample": i, "response": text, "finish_reason": end})
    samples = write_rows(tmp_path / "samples.jsonl", rows)
    o = spin.all_pairs(PairOptions(run=RunOptions(dtype="float32")))
    out = make_pairs(gold, samples, tmp_path / "pairs.jsonl", o)
    [pair] = read_rows(out)
    assert (pair["chosen"], pair["rejected"]) == ("right", "wrong")
    found = counts(out)
    assert found["candidates"] == 3
    assert found["identical"] == 1
    assert found["empty"] == 1


# -------------------------------------------------------------------------------- ranking


def test_first_of_the_best_against_last_of_the_worst():
    rows = []
    scores = []
    given = {"a": [1.0, 3.0, 3.0, 1.0], "b": [2.0, 2.0], "c": [5.0]}
    for name, values in given.items():
        for i, score in enumerate(values):
            rows.append({"id": name, "sample": i, "response": f"{name}{i}"})
            scores.append(score)
    found = {}
    for (high, best), (low, worst) in best_and_worst(rows, scores):
        assert "sample" not in best
        found[best["id"]] = (best["response"], high, worst["response"], low)
    # two texts with equal scores: the strict threshold drops them; a single one is no pair
    assert found == {"a": ("a1", 3.0, "a3", 1.0), "b": ("b0", 2.0, "b1", 2.0)}


def test_a_response_without_a_score_is_no_candidate():
    scores = {
        "a0": None,
        "a1": 3.0,
        "a2": 1.0,
        "a3": None,
        "b0": None,
        "b1": 2.0,
        "c0": None,
        "c1": None,
    }
    rows = []
    for text in scores:
        rows.append({"id": text[0], "response": text})
    [pair] = best_and_worst(rows, list(scores.values()))
    assert [response["response"] for _, response in pair] == ["a1", "a2"]


def write_scored(tmp_path: Path, texts: list[tuple[str, str, str]]) -> tuple[Path, PairOptions]:
    """Samples whose score is the number in the text: (prompt, response, finish_reason)."""
    (tmp_path / "plugin.py").write_text(
        "def score(rows):\n    return [float(row['response'].split()[0]) for row in rows]\n"
    )
    rows = []
    for i, (name, text, end) in enumerate(texts):
        row = {"id": name, "prompt": name, "sample": i, "response": text}
        rows.append({**row, "finish_reason": end})
    scorer = f"{tmp_path / 'plugin.py'}:score"
    o = PairOptions(run=RunOptions(dtype="float32"), scorer=scorer)
    return write_rows(tmp_path / "samples.jsonl", rows), o


def test_pairs_of_ranked_responses_pass_the_filter(tmp_path):
    texts = [
        ("a", "1 x", "stop"),
        ("a", "", "stop"),  # takes no part
        ("a", "3 y", "stop"),
        ("b", "9 cut", "length"),  # the best, but cut off
        ("b", "2 z", "stop"),
        ("c", "4 u", "stop"),  # equal scores
        ("c", "4 v", "stop"),
        ("d", "7 w", "stop"),
        ("d", "5 cut", "length"),  # may be rejected
    ]
    samples, o = write_scored(tmp_path, texts)
    out = rank_pairs(samples, tmp_path / "pairs.jsonl", o, t=2)
    rows = read_rows(out)
    assert [(row["id"], row["chosen"], row["rejected"]) for row in rows] == [
        ("a", "3 y", "1 x"),
        ("d", "7 w", "5 cut"),
    ]
    assert [row["score_chosen"] - row["score_rejected"] for row in rows] == [2, 2]
    assert {row["iteration"] for row in rows} == {2}
    found = counts(out)
    assert (found["candidates"], found["cut_off"], found["small_gap"]) == (4, 1, 1)
    assert (found["empty_responses"], found["lonely"]) == (1, 0)


def test_responses_that_the_scorer_cannot_read_are_left_out_and_counted(tmp_path):
    long = "2 " + "y" * 600
    texts = [
        ("a", "1 x", "stop"),
        ("a", long, "stop"),
        ("a", "3", "stop"),
        ("b", "1 x", "stop"),
        ("b", long, "stop"),
    ]
    samples, _ = write_scored(tmp_path, texts)
    reward = {"architectures": ["LlamaForSequenceClassification"], "num_labels": 1}
    model = tiny_checkpoint(tmp_path / "rm", **reward, id2label={"0": "LABEL_0"})
    o = PairOptions(run=RunOptions(dtype="float32"), scorer=str(model), max_repetition=1.0)
    out = rank_pairs(samples, tmp_path / "pairs.jsonl", o)
    [pair] = read_rows(out)
    assert {pair["chosen"], pair["rejected"]} == {"1 x", "3"}
    found = counts(out)
    assert (found["candidates"], found["unscored_responses"], found["lonely"]) == (1, 2, 1)


def test_what_cannot_be_ranked_gets_one_line(tmp_path):
    samples, o = write_scored(tmp_path, [("a", "", "stop"), ("a", "", "stop")])
    out = tmp_path / "pairs.jsonl"
    assert "samples.jsonl: every response is empty" in refusal(rank_pairs, samples, out, o)

    # alone, no response has a counterpart
    single, o = write_scored(tmp_path, [("a", "1 x", "stop"), ("b", "2 x", "stop")])
    with pytest.raises(InputError, match="no pair of 0 left"):
        rank_pairs(single, out, o)


@pytest.mark.slow
def test_sampling_ranking_reads_what_synpo_reads(world, finished, tmp_path):
    out = tmp_path / "ranked"
    go("sampling_ranking", world, out)
    M_0 = content_hash(Path(world["model"]))
    M_1 = read_manifest(out / "iter1/policy")["content"]
    # the same prompts, as G and its random numbers are the same
    for t in (1, 2):
        ours = out / f"iter{t}/prompts.jsonl"
        theirs = finished[0] / f"iter{t}/prompts.jsonl"
        assert ours.read_bytes() == theirs.read_bytes()
    for t, model in ((1, M_0), (2, M_1)):
        assert inputs(out / f"iter{t}/samples.jsonl")["model"] == model
        read = inputs(out / f"iter{t}/policy")
        assert read["model"] == read["reference"] == M_0
        assert len(read["pairs"]) == t
        assert (
            counts(out / f"iter{t}/samples.jsonl")["answers"]
            == 3 * counts(out / f"iter{t}/prompts.jsonl")["prompts"]
        )
    assert not list(out.glob("iter*/improver"))


# -------------------------------------------------------------------------------- Self-Rewarding


@pytest.mark.parametrize(
    ("verdict", "score"),
    [
        ("Score: 4", 4),
        ("score: 4.5", 4.5),
        ("Score: 4/5", 4),
        ("**Score:** 3", 3),
        ("Score: 2, at first sight. Score: 5", 5),
        ("Score: 7", None),
        ("Score: -1", None),
        ("Score: <total points>", None),
        ("4 out of 5", None),
        ("", None),
    ],
)
def test_the_last_number_behind_score_is_read(verdict, score):
    assert read_score(verdict) == score


def judge(tmp_path: Path, verdicts: dict[str, list[str]], texts: dict[str, str]) -> Path:
    """Scores of responses, a sample each, after given verdicts."""
    run_options = RunOptions(dtype="float32")
    responses = []
    for i, (name, text) in enumerate(texts.items()):
        row = {"id": "a", "prompt": "Ask", "sample": i, "response": text}
        responses.append({**row, "finish_reason": "stop", "name": name})
    samples = write_rows(tmp_path / "samples.jsonl", responses)
    asked = read_rows(ask(samples, tmp_path / "judged.jsonl", TEMPLATE, run_options))
    rows = []
    for question, words in zip(asked, verdicts.values(), strict=True):
        for i, said in enumerate(words):
            rows.append({**question, "sample": i, "response": said})
    given = write_rows(tmp_path / "verdicts.jsonl", rows)
    return mean_scores(samples, given, tmp_path / "scored.jsonl", run_options)


def said(*scores: int | None) -> list[str]:
    return ["no idea" if score is None else f"Score: {score}" for score in scores]


def test_the_best_mean_of_verdicts_against_the_worst(tmp_path):
    verdicts = {
        "A": said(5, 4, 5),
        "B": said(3, 4, 3),
        "C": said(4, None, 5),
        "D": said(2, 3, 2),
        "E": said(None, None, None),
    }
    scored = judge(tmp_path, verdicts, {name: f"text {name}" for name in verdicts})
    found = {row["name"]: round(row["score"], 4) for row in read_rows(scored)}
    assert found == {"A": 4.6667, "B": 3.3333, "C": 4.5, "D": 2.3333}
    assert counts(scored)["unreadable"] == 4
    o = PairOptions(run=RunOptions(dtype="float32"), scorer=RECORDED)
    [pair] = read_rows(rank_pairs(scored, tmp_path / "pairs.jsonl", o))
    assert (pair["chosen"], pair["rejected"]) == ("text A", "text D")


@pytest.mark.parametrize("verdicts", [(said(3), said(3)), (said(3), said(None))])
def test_equal_or_unreadable_verdicts_make_no_pair(tmp_path, verdicts):
    scored = judge(tmp_path, {"A": verdicts[0], "B": verdicts[1]}, {"A": "a", "B": "b"})
    o = PairOptions(run=RunOptions(dtype="float32"), scorer=RECORDED)
    with pytest.raises(InputError, match="no pair of"):
        rank_pairs(scored, tmp_path / "pairs.jsonl", o)


def test_a_response_cannot_grade_itself(tmp_path):
    scored = judge(tmp_path, {"A": said(1), "B": said(2)}, {"A": "Score: 5", "B": "fine"})
    assert [row["score"] for row in read_rows(scored)] == [1, 2]
    # what the judge read holds the response as it is, braces and all
    template = "Q {prompt} A {response} {x}"
    row = judged({"id": "a", "prompt": "{response}", "response": "{prompt}"}, template)
    assert row["prompt"] == "Q {response} A {prompt} {x}"


def test_a_judge_that_says_nothing_readable_ends_the_run(tmp_path):
    with pytest.raises(InputError, match=r"scored.jsonl: 2 of 2 verdicts have no score"):
        judge(tmp_path, {"A": said(None), "B": said(None)}, {"A": "a", "B": "b"})


def test_examples_of_judging_come_from_the_seeds(tmp_path):
    gold = [{"id": "a", "prompt": "A", "response": "one two three four"}]
    seeds = write_rows(tmp_path / "seeds.jsonl", gold)
    texts = ["one two three four", "one two", "nothing", "one one one four"]
    drafts = []
    for i, text in enumerate(texts):
        drafts.append({"id": "a", "prompt": "A", "sample": i, "response": text})
    run_options = RunOptions(dtype="float32")
    made = grade(seeds, write_rows(tmp_path / "d.jsonl", drafts), tmp_path / "e.jsonl", run_options)
    # F1 of four words and three pairs: 1, 6/10, 0, 4/14
    verdicts = [row["verdict"] for row in read_rows(made)]
    assert verdicts == ["Score: 5", "Score: 5", "Score: 3", "Score: 1", "Score: 2"]
    assert counts(made)["points_5"] == 2


@pytest.mark.slow
def test_self_rewarding_goes_on_from_its_own_start(world, tmp_path):
    out = tmp_path / "rewarded"
    go("self_rewarding", world, out)
    S = read_manifest(out / "first/model")["content"]
    M_1 = read_manifest(out / "iter1/policy")["content"]
    assert inputs(out / "first/model")["model"] == content_hash(Path(world["model"]))
    for t, model in ((1, S), (2, M_1)):
        for name in ("samples.jsonl", "verdicts.jsonl"):
            assert inputs(out / f"iter{t}" / name)["model"] == model
        read = inputs(out / f"iter{t}/policy")
        assert read["model"] == read["reference"] == model
        assert len(read["pairs"]) == 1
    assert counts(out / "first/examples.jsonl")["examples"] == 2 * micro.SEEDS
    assert counts(out / "first/lessons.jsonl")["records"] == 3 * micro.SEEDS
