"""PairRM: against a plain forward of transformers' DeBERTa on ids put together by hand."""

import json
import math
import sys

import pytest
import torch
from conftest import CORPUS, read_rows, write_rows
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

from improve import ImproverOptions, gold_and_draft, training_rows
from losses import preference_of
from pairs import PairOptions, make_pairs
from plumbing.files import InputError
from plumbing.options import RunOptions
from scorers.base import blockwise, preference_by, score_pairs
from scorers.load import load_scorer
from scorers.pairrm import padded_batches, pairrm

pytest.importorskip("transformers", reason="needs transformers (requirements-dev.txt)")

FP32 = RunOptions(dtype="float32")
PAD, CLS, SEP = range(3)  # ids of [PAD], [CLS], [SEP]
SPECIALS = ("[PAD]", "[CLS]", "[SEP]", "[UNK]", "[MASK]")
PREFIXES = ("<|source|>", "<|candidate1|>", "<|candidate2|>", "<|candidate|>")
LIMITS = {"source_maxlength": 40, "candidate_maxlength": 16}
LONG = {"source_maxlength": 400, "candidate_maxlength": 80}

TEXTS = [
    ("Why?", "Because it is so.", ""),
    ("Name the stages.", "Files to files.", "files " * 30),
    ("", "a", "the trainer"),
    ("the rows " * 30, "again " * 9, "once"),
    ("Is [SEP] a token?\n\nSay so.", "Yes, [SEP] is.", "No <|candidate2|> [CLS]"),
]
ROWS = []
OTHERS = []
for number, (asked, good, bad) in enumerate(TEXTS):
    row = {"id": f"r{number}", "prompt": asked}
    ROWS.append({**row, "response": good})
    OTHERS.append({**row, "response": bad})
TALK = {
    "id": "talk",
    "messages": [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Hello"},
        {"role": "user", "content": "Why?"},
    ],
    "response": "It is so.",
}


def deberta_tokenizer() -> Tokenizer:
    """As microsoft/deberta-v3's: pieces that open a word with a marker, [CLS] text [SEP]."""
    # words of the corpus are likelier than their letters; not trained, since training is not
    # deterministic
    words = sorted({f"\u2581{word}" for word in CORPUS.split()})
    letters = ["\u2581", *map(chr, range(33, 127))]
    pieces = [(piece, 0.0) for piece in SPECIALS]
    pieces += [(piece, -9.0) for piece in words]
    pieces += [(piece, -6.0) for piece in letters]
    tokenizer = Tokenizer(models.Unigram(pieces, unk_id=SPECIALS.index("[UNK]")))
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.add_special_tokens(list(SPECIALS))
    tokenizer.add_tokens(list(PREFIXES))
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        special_tokens=[("[CLS]", CLS), ("[SEP]", SEP)],
    )
    return tokenizer


def tiny_pairrm(directory, **changes):
    """A checkpoint in the layout of llm-blender/PairRM-hf: random weights, short limits."""
    from transformers import DebertaV2Config, DebertaV2Model

    tokenizer = deberta_tokenizer()
    config = DebertaV2Config(
        vocab_size=tokenizer.get_vocab_size(),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=64,
        max_position_embeddings=64,
        # as deberta-v3-large
        type_vocab_size=0,
        relative_attention=True,
        position_buckets=8,
        norm_rel_ebd="layer_norm",
        share_att_key=True,
        pos_att_type=["p2c", "c2p"],
        position_biased_input=False,
        max_relative_positions=-1,
        layer_norm_eps=1e-7,
    )
    encoder = DebertaV2Model(config)
    shapes = {}
    for name, parameter in encoder.named_parameters():
        shapes[f"pretrained_model.{name}"] = parameter.shape
    shapes["head_layer.1.weight"] = (32, 64)
    shapes["head_layer.1.bias"] = (32,)
    shapes["head_layer.4.weight"] = (1, 32)
    shapes["head_layer.4.bias"] = (1,)
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for name, shape in shapes.items():
        tensors[name] = torch.randn(shape, generator=generator)
        # so that attention is sharp, and a score depends on every text
        if "LayerNorm.weight" in name:
            tensors[name] = 1 + 0.3 * tensors[name]
        elif name.endswith("weight") and "embeddings" not in name:
            tensors[name] *= 4 / shape[-1] ** 0.5
    directory.mkdir(parents=True)
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    raw = config.to_dict()
    raw |= {"architectures": ["DebertaV2PairRM"], "n_tasks": 1}
    raw |= {**LIMITS, **changes}
    (directory / "config.json").write_text(json.dumps(raw))
    tokenizer.save(str(directory / "tokenizer.json"))
    return directory


@pytest.fixture(scope="module")
def ranker(tmp_path_factory):
    return tiny_pairrm(tmp_path_factory.mktemp("pairrm") / "model")


def part_of(tensors: dict, prefix: str) -> dict:
    """The tensors below a prefix, by the rest of their names."""
    found = {}
    for name, tensor in tensors.items():
        if name.startswith(prefix):
            found[name.removeprefix(prefix)] = tensor
    return found


@pytest.fixture(scope="module")
def by_hand(ranker):
    """(source, a, b) -> logit that a is better, one pair at a time: no padding, float64 head."""
    from transformers import DebertaV2Config, DebertaV2Model

    raw = json.loads((ranker / "config.json").read_text())
    encoder = DebertaV2Model(DebertaV2Config(**raw)).eval()
    tensors = load_file(ranker / "model.safetensors")
    encoder.load_state_dict(part_of(tensors, "pretrained_model."))
    head = part_of(tensors, "head_layer.")
    head = {name: tensor.double() for name, tensor in head.items()}
    tokenizer = Tokenizer.from_file(str(ranker / "tokenizer.json"))

    def part(text: str, most: int) -> list[int]:
        tokens = tokenizer.encode(text.replace("[SEP]", " "), add_special_tokens=False).ids
        return [CLS, *tokens[: most - 2], SEP]

    def f(source, candidate):
        x = torch.cat([source, candidate])
        x = torch.tanh(head["1.weight"] @ x + head["1.bias"])
        return (head["4.weight"] @ x + head["4.bias"]).item()

    def logit(source: str, a: str, b: str) -> float:
        ids = part(f"<|source|>{source}", 40)
        most = (40 + 2 * 16 - len(ids)) // 2
        first = part(f"<|candidate1|>{a}", most)
        second = part(f"<|candidate2|>{b}", most)
        tokens = torch.tensor([ids + first + second])
        with torch.no_grad():
            [hidden] = encoder(tokens).last_hidden_state.double()
        left = hidden[len(ids) + 1]
        right = hidden[len(ids) + len(first) + 1]
        return f(hidden[1], left) - f(hidden[1], right)

    return logit


def both_orders(logit, source: str, a: str, b: str) -> float:
    return (logit(source, a, b) - logit(source, b, a)) / 2


def test_the_score_is_the_mean_logit_of_both_orders(ranker, by_hand):
    """Empty texts, texts beyond the limits, and special tokens in a text, as llm-blender does."""
    score = load_scorer(str(ranker), None, FP32)
    expected = [both_orders(by_hand, *texts) for texts in TEXTS]
    got = score(ROWS, OTHERS)
    assert got == pytest.approx(expected, abs=1e-5)
    assert min(map(abs, got)) > 1e-3
    # one order alone would say something else
    first = [by_hand(*texts) for texts in TEXTS]
    assert first != pytest.approx(got, abs=1e-2)


@pytest.mark.parametrize("limits", [LIMITS, LONG])
def test_scores_equal_llm_blenders(tmp_path, limits):
    """Its own ranker, in an environment of its own: it does not import under transformers 5."""
    llm_blender = pytest.importorskip(
        "llm_blender",
        reason="needs llm-blender==0.0.2 and transformers==4.51.3",
        exc_type=ImportError,
    )
    score = pairrm(tiny_pairrm(tmp_path / "hf", **limits), FP32)
    raw = json.loads((tmp_path / "hf" / "config.json").read_text())
    tensors = load_file(tmp_path / "hf" / "model.safetensors")

    # its layout: the encoder with the tokenizer in a directory, all weights in another
    encoder = tmp_path / "encoder"
    encoder.mkdir()
    body = part_of(tensors, "pretrained_model.")
    save_file(body, encoder / "model.safetensors", metadata={"format": "pt"})
    raw["architectures"] = ["DebertaV2Model"]
    (encoder / "config.json").write_text(json.dumps(raw))
    (encoder / "tokenizer.json").write_bytes((tmp_path / "hf" / "tokenizer.json").read_bytes())
    names = {f"{token[1:-1].lower()}_token": token for token in SPECIALS}
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", **names}
    (encoder / "tokenizer_config.json").write_text(json.dumps(settings))
    own = {
        "ranker_type": "pairranker",
        "model_type": "deberta",
        "model_name": str(encoder),
        "n_tasks": 1,
        "drop_out": 0.05,
        "fp16": False,
        "device": "cpu",
        **limits,
    }
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "config.json").write_text(json.dumps(own))
    save_file(tensors, tmp_path / "own" / "model.safetensors")
    blender = llm_blender.Blender()
    blender.loadranker(str(tmp_path / "own"), device="cpu")

    # it cannot read a prefix in a text; in larger batches its limits follow the longest prompt
    prompts, a, b = map(list, zip(*TEXTS, strict=True))
    b = [text.replace("<|", "") for text in b]
    others = []
    for row, text in zip(ROWS, b, strict=True):
        others.append({**row, "response": text})
    texts = list(map(list, zip(a, b, strict=True)))
    theirs = blender.rank(prompts, texts, return_scores=True, batch_size=1)
    good, bad = score_pairs(score, ROWS, others)
    assert good == pytest.approx(theirs[:, 0].tolist(), abs=1e-5)
    assert bad == pytest.approx(theirs[:, 1].tolist(), abs=1e-5)
    gaps = blender.compare(prompts, a, b, return_logits=True, batch_size=1)
    assert [2 * m for m in good] == pytest.approx(gaps.tolist(), abs=1e-5)

    # several turns
    opening = TALK["messages"][1:]
    talks = []
    rows = []
    for text in ("So.", "No idea."):
        turns = [*opening, {"role": "assistant", "content": text}]
        talks.append([{**turn, "role": turn["role"].upper()} for turn in turns])
        rows.append({"messages": opening, "response": text})
    a, b = ([talk] for talk in talks)
    [gap] = blender.compare_conversations(a, b, return_logits=True, batch_size=1)
    if limits == LONG:  # others cut the last turn away
        assert abs(gap) > 1e-2
    [m] = score(rows[:1], rows[1:])
    assert 2 * m == pytest.approx(gap, abs=1e-5)


def test_the_other_order_gives_the_negative_and_a_text_draws_with_itself(ranker):
    score = pairrm(ranker, FP32)
    swapped = [-logit for logit in score(OTHERS, ROWS)]
    assert swapped == pytest.approx(score(ROWS, OTHERS), abs=1e-6)
    assert score(ROWS, ROWS) == pytest.approx([0] * len(ROWS), abs=1e-6)
    assert score([], []) == []


def test_scores_do_not_depend_on_their_batch(ranker, monkeypatch):
    score = pairrm(ranker, FP32)
    expected = score(ROWS, OTHERS)
    alone = []
    for row, other in zip(ROWS, OTHERS, strict=True):
        alone += score([row], [other])
    assert alone == pytest.approx(expected, abs=1e-5)
    assert blockwise(score, [], size=2)(ROWS, OTHERS) == pytest.approx(expected, abs=1e-5)
    assert len(padded_batches([9] * 10)) == 1
    monkeypatch.setattr("scorers.pairrm.BATCH_TOKENS", 100)
    assert padded_batches([10, 99, 50, 101, 20, 50]) == [[3], [1], [2, 5], [4, 0]]
    assert padded_batches([]) == []
    assert score(ROWS, OTHERS) == pytest.approx(expected, abs=1e-5)


def test_several_turns_are_put_as_llm_blender_puts_conversations(tmp_path, ranker):
    """In a model with room for it. Its instruction is spelt as it was published."""
    directory = tiny_pairrm(tmp_path / "long", **LONG)
    score = pairrm(directory, FP32)
    instruction = (
        "Finish the following coversation in each i-th turn by filling in <Response i> with your "
        "response."
    )
    source = (
        f"{instruction}USER: Be brief.\n\nHi\nAssistant: <Response 1>\n"
        "USER: Why?\nAssistant: <Response 2>"
    )
    written = []
    for text in ("It is so.", "No."):
        response = f"<Response 1>: Hello\n<Response 2>: {text}"
        written.append({"id": "w", "prompt": source, "response": response})
    [expected] = score(*([row] for row in written))
    assert abs(expected) > 1e-3
    assert score([TALK], [{**TALK, "response": "No."}]) == pytest.approx([expected], abs=1e-6)

    # one turn is no conversation, and a system message opens it
    plain = {"id": "p", "prompt": "Be brief.\n\nHi", "response": "Hello"}
    turns = {"id": "p", "messages": TALK["messages"][:2], "response": "Hello"}
    other = {**plain, "response": "No."}
    assert score([turns], [other]) == pytest.approx(score([plain], [other]), abs=1e-6)


def test_scores_of_both_sides_and_p(ranker):
    """m and -m, as Blender.rank returns; P is the sigmoid of m, not of their gap."""
    score = load_scorer(str(ranker), None, FP32)
    assert score.pairwise and score.logits
    good, bad = score_pairs(score, ROWS, OTHERS)
    assert bad == [-m for m in good]
    preferences = [preference_by(score, m) for m in good]
    assert preferences == pytest.approx([1 / (1 + math.exp(-m)) for m in good])
    assert preference_by(score, 1000.0) == 1
    assert preference_by(score, -1000.0) == 0


def test_the_filter_keeps_gaps_above_the_threshold(ranker, tmp_path):
    """The gap is 2 m, with the paper's 0.20."""
    chosen = write_rows(tmp_path / "chosen.jsonl", ROWS[:2])
    rejected = write_rows(tmp_path / "rejected.jsonl", OTHERS[1:2])
    [m] = pairrm(ranker, FP32)(ROWS[1:2], OTHERS[1:2])
    if m < 0:
        chosen, rejected = rejected, write_rows(tmp_path / "other.jsonl", ROWS[1:2])
    gap = 2 * abs(m)
    assert gap > 0.2

    def pairs(threshold: float) -> list[dict]:
        out = tmp_path / f"{threshold}.jsonl"
        o = PairOptions(run=FP32, scorer=str(ranker), threshold=threshold, max_repetition=1)
        make_pairs(chosen, rejected, out, o)
        return read_rows(out)

    for threshold in (0.2, gap - 0.01):
        [pair] = pairs(threshold)
        assert pair["score_chosen"] == pytest.approx(abs(m), abs=1e-5)
        assert pair["score_rejected"] == -pair["score_chosen"]
        # a loss that reads P gets that of the judge
        assert preference_of(pair) == pytest.approx(1 / (1 + math.exp(-abs(m))))
    with pytest.raises(InputError, match="small_gap"):
        pairs(gap + 0.01)


def test_the_improver_trains_where_gold_beats_the_draft(ranker):
    scorer = load_scorer(str(ranker), None, FP32)
    gaps = [2 * m for m in scorer(ROWS, OTHERS)]
    drafts = [{**row, "response": row["response"] or "-"} for row in OTHERS]
    gaps[0] = 2 * scorer(ROWS[:1], drafts[:1])[0]
    threshold = sorted(gaps)[2]
    o = ImproverOptions(run=FP32, template="{prompt} {draft}", threshold=threshold + 1e-4)
    rows, _ = training_rows(gold_and_draft(ROWS, drafts), scorer, o)
    kept = [row["response"] for row in rows]
    wanted = [row["response"] for row, gap in zip(ROWS, gaps, strict=True) if gap > o.threshold]
    assert kept == wanted
    assert len(kept) == 2


def test_rewrites_have_no_counterpart(ranker):
    with pytest.raises(InputError, match="compares two answers; name one that scores each"):
        load_scorer(str(ranker), None, FP32, single=True)


def test_what_is_missing_is_named(ranker, tmp_path, monkeypatch):
    def copy(name: str, **changes):
        folder = tmp_path / name
        folder.mkdir()
        for file in ranker.iterdir():
            (folder / file.name).write_bytes(file.read_bytes())
        raw = json.loads((ranker / "config.json").read_text()) | changes
        (folder / "config.json").write_text(json.dumps(raw))
        return folder

    # llm-blender's own layout: the encoder is described elsewhere
    own = copy("own")
    (own / "config.json").write_text(json.dumps({"ranker_type": "pairranker", **LIMITS}))
    with pytest.raises(
        InputError, match=r"does not describe the encoder; .* llm-blender/PairRM-hf"
    ):
        load_scorer(str(own), None, FP32)
    # the tokenizer of the bare encoder
    bare = copy("bare")
    text = (bare / "tokenizer.json").read_text()
    (bare / "tokenizer.json").write_text(text.replace("<|candidate2|>", "<|c2|>"))
    with pytest.raises(InputError, match=r"tokenizer.json has no token <\|candidate2\|>; add"):
        load_scorer(str(bare), None, FP32)
    # weights as PyTorch pickled them, and those of another model
    pickled = copy("pickled")
    (pickled / "model.safetensors").unlink()
    with pytest.raises(InputError, match="only safetensors are read"):
        pairrm(pickled, FP32)(ROWS, OTHERS)
    with pytest.raises(InputError, match="its tensors do not match config"):
        pairrm(copy("deeper", num_hidden_layers=3), FP32)(ROWS, OTHERS)

    # a table that transformers before 4.31 wrote changes nothing
    old = copy("old")
    tensors = load_file(ranker / "model.safetensors")
    tensors["pretrained_model.embeddings.position_ids"] = torch.arange(64)[None]
    save_file(tensors, old / "model.safetensors")
    expected = pairrm(ranker, FP32)(ROWS, OTHERS)
    assert pairrm(old, FP32)(ROWS, OTHERS) == pytest.approx(expected)

    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(InputError, match=r"^PairRM's encoder.*; pip install transformers$"):
        load_scorer(str(ranker), None, FP32)
