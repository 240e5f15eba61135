"""The model card of every policy of a run: what it says, and that no stage notices it."""

import json
import os
import shutil
from pathlib import Path

import pytest
from conftest import read_rows
from cycle import go, stamps
from huggingface_hub import ModelCard
from huggingface_hub.utils import filter_repo_objects
from test_report import make_run, pair, seal

import checkpoint
from checkpoint import Checkpoint
from eval import model_card, report
from plumbing.files import InputError
from plumbing.stage import commit, content_hash, files_of, fingerprint, machine, read_manifest

pytest_plugins = ["cycle"]
pytestmark = pytest.mark.slow


def lines(text: str) -> list[list[str]]:
    """The words of every line."""
    return [line.split() for line in text.splitlines()]


# ---------------------------------------------------------------------------------- a real run


def test_a_card_says_what_the_model_was_made_from(finished, world):
    run, _ = finished
    card = ModelCard.load(run / "iter2/policy/README.md")
    assert card.data.to_dict() == {
        "base_model": world["model"],
        "license": "other",
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["synpo"],
    }
    assert "# M_2 of a run of SynPO\n" in card.text
    found = lines(card.text)

    # M_0 by its path as given, the data by their names; hashes as in the manifests
    assert ["M_0", world["model"], fingerprint(world["model"])] in found
    for name, file in (("seeds", "seeds.jsonl"), ("held-out", "heldout.jsonl")):
        assert [name, file, fingerprint(run / file)] in found
    assert ["corpus", "corpus.txt", fingerprint(world["corpus"])] in found
    inputs = read_manifest(run / "generator")["inputs"]
    assert inputs["model"] == fingerprint(world["model"])
    assert inputs["seeds"] == fingerprint(run / "seeds.jsonl")

    # pairs by iteration, the last column all that M_t was trained on
    pairs = [str(len(read_rows(run / f"iter{t}/pairs.jsonl"))) for t in (1, 2)]
    assert [row[0] for row in found if row[3:5] == [pairs[0], pairs[0]]] == ["1"]
    both = str(int(pairs[0]) + int(pairs[1]))
    assert [row[0] for row in found if row[3:5] == [pairs[1], both]] == ["2"]

    # options as recorded, but for the paths of above
    changed = json.loads((run / "changed.json").read_text())
    assert ["policy.nll", "=", "0.5"] in found
    names = [row[0] for row in found if row[1:2] == ["="]]
    assert names == [name for name, *_ in changed if name not in model_card.SHOWN_ABOVE]
    assert len(names) > 30
    assert str(run) not in card.text

    # scores of M_0 .. M_2, and no others'
    scores = [json.loads((run / f"iter{t}/eval.json").read_text())["score"] for t in range(3)]
    rows = lines(card.text.partition("## Scores\n")[2].partition("##")[0])
    shown = [row[:2] for row in rows if row and row[0].startswith("M_")]
    assert shown == [[f"M_{t}", f"{score:.3f}"] for t, score in enumerate(scores)]
    assert "R_1" not in card.text
    assert ["commit", commit() or "-"] in found
    assert ["torch", machine()["torch"]] in found


def test_the_card_of_an_earlier_model_knows_nothing_of_later_ones(finished):
    text = (finished[0] / "iter1/policy/README.md").read_text()
    found = lines(text)
    assert "# M_1 of a run of SynPO\n" in text
    assert "M_2" not in text
    assert not [row for row in found if row[:1] == ["2"]]


def test_no_stage_notices_a_card(copy, world):
    """Nor one that somebody has changed, nor one that lay there when its policy was made again."""
    policy = copy / "iter2/policy"
    card = policy / "README.md"
    manifest = read_manifest(policy)
    assert "policy/README.md" not in manifest["files"]
    hashes = [content_hash(policy), fingerprint(policy)]
    before = stamps(copy)
    text = card.read_text()
    card.write_text("mine")
    go(world, copy)
    assert stamps(copy) == before
    assert card.read_text() == text
    card.unlink()
    assert [content_hash(policy), fingerprint(policy)] == hashes

    # made again beside an old card, and up to date under the new one
    card.write_text("old")
    (policy / "manifest.json").unlink()
    (copy / "iter2/policy.partial").mkdir()  # as a kill before the manifest leaves it
    go(world, copy)
    again = stamps(copy)
    assert again != before
    assert content_hash(policy) == hashes[0]
    card.write_text("mine")
    go(world, copy)
    assert stamps(copy) == again
    assert card not in files_of(policy)


# ---------------------------------------------------------------------------------- runs by hand


def card_of(run: Path, t: int = 1) -> ModelCard:
    report.report(run)
    return ModelCard.load(run / f"iter{t}/policy/README.md")


README = "---\nlanguage: en\n{}\ntags: [x]\n---\nlicense: not-this-one\n"


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, "other"),
        ({"README.md": README.format("license: apache-2.0")}, "apache-2.0"),
        ({"README.md": README.format('license: "cc-by-nc-4.0"')}, "cc-by-nc-4.0"),
        ({"README.md": README.format("license:\n- mit")}, "mit"),
        ({"README.md": README.format("license: llama3").replace("\n", "\r\n")}, "llama3"),
        ({"README.md": "\ufeff" + README.format("license: mit")}, "mit"),
        ({"README.md": README.format("license_name: qwen")}, "other"),
        ({"README.md": README.format("license:")}, "other"),
        ({"README.md": "license: mit\n"}, "other"),
        ({"README.md": "# A model\n---\nlicense: mit\n---\n"}, "other"),
        ({"README.md": b"---\nlicense: mit\n---\n\xff"}, "mit"),
        ({"config.json": '{"license": "mit"}'}, "mit"),
        ({"config.json": '{"license": null}'}, "other"),
        ({"README.md": README.format("license: mit"), "config.json": '{"license": "x"}'}, "mit"),
    ],
)
def test_the_licence_is_that_of_M_0(tmp_path, files, expected):
    model = tmp_path / "zero"
    model.mkdir()
    for name, content in files.items():
        (model / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    run = make_run(tmp_path / "run", [[pair(1, 0)]], model=Checkpoint(model))
    card = card_of(run)
    assert card.data.license == expected
    assert "The licences of M_0 and of the data apply." in card.text
    assert (f"M_0's is {expected}" in card.text) == (expected != "other")


def test_of_the_hubs_cache_the_models_id_is_shown(tmp_path):
    cached = tmp_path / "home/me/.cache/hub/models--owner--name-2/snapshots/0a1b2c"
    cached.mkdir(parents=True)
    run = make_run(tmp_path / "run", [[pair(1, 0)]], model=Checkpoint(cached))
    card = card_of(run)
    assert card.data.base_model == "owner/name-2"
    assert "models--owner" not in card.text
    assert ["M_0", "owner/name-2"] in [row[:2] for row in lines(card.text)]
    assert str(tmp_path) not in card.text.replace(str(run), "")


def test_a_model_of_the_hub_is_downloaded_with_its_card(tmp_path, monkeypatch):
    wanted = "README.md chat_template.jinja config.json model.safetensors tokenizer.json".split()
    others = "pytorch_model.bin picture.jpg vocab.txt .gitattributes".split()
    loaded = []

    def download(name, allow_patterns):
        loaded.extend(filter_repo_objects(wanted + others, allow_patterns=allow_patterns))
        return str(tmp_path)

    monkeypatch.setattr(checkpoint, "snapshot_download", download)
    assert Checkpoint.from_text("owner/name") == tmp_path
    assert loaded == wanted


@pytest.mark.parametrize(
    ("section", "name", "tag"),
    [
        ("spin", "SPIN", "spin"),
        ("rewarding", "Self-Rewarding Language Models", "self-rewarding"),
        ("ranking", "Sampling-Ranking", "sampling-ranking"),
        ("sapo", "SAPO", "sapo"),
        ("almost", "ALMoST", "almost"),
    ],
)
def test_a_methods_card_names_the_method(tmp_path, section, name, tag):
    run = make_run(tmp_path / "run", [[pair(1, 0)]])
    config = json.loads((run / "config.json").read_text())
    (run / "config.json").write_text(json.dumps({**config, section: {"samples": 2}}))
    card = card_of(run)
    assert f"# M_1 of a run of {name}\n" in card.text
    assert card.data.tags == [tag]
    assert "SynPO" not in card.text


def test_a_cycle_of_the_users_own_is_not_called_synpo(tmp_path):
    run = make_run(tmp_path / "run", [[pair(1, 0)]])
    shutil.rmtree(run / "iter1/improver")
    card = card_of(run)
    assert "# M_1 of a run of another method" in card.text
    assert card.data.tags == ["preference-optimization"]


def test_a_card_shows_no_more_than_there_is(tmp_path):
    """No held-out data, no corpus, no record of options, no policy in one iteration."""
    run = make_run(tmp_path / "run", [[pair(1, 0)], [pair(2, 0)]], scored=False)
    (run / "changed.json").unlink()
    shutil.rmtree(run / "iter1/policy")
    card = card_of(run, 2)
    assert not (run / "iter1/policy").exists()
    found = lines(card.text)
    assert ["M_0", "models/zero", "-"] in found, "a model that is gone, and in no manifest"
    assert not [row for row in found if row[:1] in (["held-out"], ["corpus"])]
    assert "## Scores" not in card.text
    assert "## Options" not in card.text
    assert ["2", "1", "3", "1", "2", "1.000"] in found


def test_benchmarks_are_among_the_scores(tmp_path):
    run = make_run(tmp_path / "run", [[pair(1, 0)]])
    for t, score in enumerate((10.0, 20.5)):
        result = run / f"iter{t}/eval/ifeval/result.json"
        result.parent.mkdir(parents=True)
        result.write_text(json.dumps({"score": score}))
        seal(result, {"score": score})
    found = lines(card_of(run).text)
    assert ["M_1", "0.500", "0.020", "9.000", "20.500"] in found
    assert "What M_0 says." in card_of(run).text


def test_a_card_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    run = make_run(tmp_path / "run", [[pair(1, 0)]])
    card_of(run)
    card = run / "iter1/policy/README.md"
    card.write_text("before")

    def full(old, new):
        raise OSError("no space left")

    data = {"T": 1, "config": json.loads((run / "config.json").read_text()), "options": []}
    data |= {"evaluations": [], "benchmarks": {}, "note": ""}
    with monkeypatch.context() as broken:
        broken.setattr(os, "replace", full)
        with pytest.raises(InputError, match="no space left"):
            model_card.write_cards(run, data, [dict.fromkeys(model_card.PAIRS, 1)])
    assert card.read_text() == "before"
