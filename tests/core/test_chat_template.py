"""Chat templates as transformers renders them, on templates that use what public ones use."""

import datetime
import json
import resource
import signal
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import transformers
from conftest import refusal, tokenizer_json, write_rows
from test_chat import LLAMA3, PLAIN, TALK, chat_directory
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers.utils import chat_template_utils

from formats import limits
from formats.chat import Chat, say
from formats.chat_template import FIXED_DAY, today_of
from formats.records import read_jsonl
from plumbing.options import RunOptions
from sample import SampleOptions, make_request

QUESTION = [{"role": "user", "content": "Why? <b> & 'é'"}]
WRITE = "{{ m['role'] }}: {{ m['content'] }}\n"
# feature -> a template that uses it
FEATURES = {
    "generation tags": (
        "{% for m in messages %}{% if m.role == 'assistant' %}"
        "{% generation %}{% set x = m.content %}{{ x }}</s>{% endgeneration %}{{ x }}"
        "{% else %}{{ m.content }}{% endif %}{% endfor %}"
    ),
    "a date with a default": (
        "{% if not day is defined %}{% if strftime_now is defined %}"
        "{% set day = strftime_now('%d %b %Y') %}{% else %}{% set day = '1 Jan' %}{% endif %}"
        "{% endif %}Today: {{ day }}\n{% for m in messages %}" + WRITE + "{% endfor %}</s>"
    ),
    "a date": "{%- set today = strftime_now('%Y-%m-%d') %}{{ today }}{{ messages[0].content }}</s>",
    "variables that are always there": (
        "{% if tools is not none %}{{ tools | tojson }}{% endif %}"
        "{% if documents is defined and documents %}docs{% endif %}"
        "{{ tools }}{{ nothing }}{{ messages[0].content }}</s>"
    ),
    "tojson": (
        "{{ messages | tojson }}{{ messages[0] | tojson(indent=2) }}"
        "{{ messages[0] | tojson(ensure_ascii=True, sort_keys=True) }}</s>"
    ),
    "loop controls": (
        "{% for m in messages %}{% if loop.index > 2 %}{% break %}{% endif %}"
        "{% if m.role == 'system' %}{% continue %}{% endif %}{{ m.content }}{% endfor %}</s>"
    ),
    "namespaces, slices, and the last question": (
        "{%- set ns = namespace(last=messages|length - 1, found=true) %}"
        "{%- for m in messages[::-1] %}{%- set index = (messages|length - 1) - loop.index0 %}"
        "{%- if ns.found and m.role == 'user' %}{%- set ns.found = false %}"
        "{%- set ns.last = index %}{%- endif %}{%- endfor %}{{ ns.last }}"
        "{%- for m in messages %}{{ m.content.split('?')[-1].lstrip('\n') }}{%- endfor %}</s>"
    ),
    "macros and call blocks": (
        "{% macro turn(m) %}<{{ m.role | upper }}>{{ caller() }}{% endmacro %}"
        "{% for m in messages %}{% call turn(m) %}{{ m.content | trim }}{% endcall %}{% endfor %}"
        "</s>"
    ),
    "dict and items": (
        "{% set names = dict(user='U', assistant='A', system='S') %}"
        "{% for k, v in names.items() %}{{ k }}{{ v }}{% endfor %}"
        "{% for m in messages %}{{ names[m.role] }}{{ m.get('tool_calls') }}{% endfor %}</s>"
    ),
    "whitespace control": (
        "  {%- for m in messages %}\n    {% if loop.first %}\n  first\n    {% endif %}\n"
        "{{ m.content }}\n  {#- note #}\n{% endfor %}\n</s>\n"
    ),
    "the special tokens": "{{ bos_token }}{{ messages[0].content }}{{ eos_token }}{{ pad_token }}",
}


def given(**options) -> RunOptions:
    return RunOptions(**options)


def of_transformers(directory: Path, messages: list[dict], open_response: bool, **more) -> str:
    tokenizer = transformers.AutoTokenizer.from_pretrained(directory)
    how = {"tokenize": False, "add_generation_prompt": open_response}
    return tokenizer.apply_chat_template(messages, **how, **more)


@pytest.fixture
def pinned(monkeypatch):
    """transformers takes 2025-03-09 for today."""

    class Pinned(datetime.datetime):
        @classmethod
        def now(cls):
            return cls(2025, 3, 9)

    monkeypatch.setattr(chat_template_utils, "datetime", Pinned)


@pytest.mark.parametrize("feature", FEATURES)
@pytest.mark.parametrize("messages", [TALK, QUESTION], ids=["talk", "question"])
def test_texts_equal_those_of_transformers(tmp_path, pinned, feature, messages):
    directory = chat_directory(tmp_path, FEATURES[feature])
    chat = Chat(directory, given(chat_template_date="2025-03-09"))
    for open_response in (True, False):
        expected = of_transformers(directory, messages, open_response)
        assert chat.render(messages, open_response) == expected


def test_a_template_gets_its_arguments(tmp_path):
    template = "{% if thinking is false %}off{% else %}on{% endif %}{{ messages[0].content }}</s>"
    directory = chat_directory(tmp_path, template)
    off = Chat(directory, given(chat_template_args='{"thinking": false}'))
    assert off.render(QUESTION, True) == of_transformers(directory, QUESTION, True, thinking=False)
    assert off.render(QUESTION, True).startswith("off")
    assert Chat(directory).render(QUESTION, True).startswith("on")
    for wrong in ("{", "[1]", "7"):
        message = refusal(Chat, directory, given(chat_template_args=wrong))
        assert message.startswith(f"--chat-template-args {wrong}: ")


def test_today_is_a_fixed_day_unless_one_is_given(tmp_path, capsys):
    say.cache_clear()  # it prints a line once in a process
    asks = Chat(chat_directory(tmp_path / "asks", FEATURES["a date"]))
    assert asks.render(QUESTION, True).startswith("2024-07-26")
    assert "2024-07-26" in capsys.readouterr().out
    own = Chat(chat_directory(tmp_path / "own", FEATURES["a date with a default"]))
    assert own.render(QUESTION, True).startswith("Today: 1 Jan")
    assert "its default day" in capsys.readouterr().out
    other = Chat(tmp_path / "own", given(chat_template_date="2025-03-09"))
    assert other.render(QUESTION, True).startswith("Today: 09 Mar 2025")
    message = refusal(Chat, tmp_path / "asks", given(chat_template_date="soon"))
    assert message.startswith("--chat-template-date soon: ")


@pytest.mark.parametrize("asked", ["is defined", "is  not\ndefined", "is undefined"])
def test_a_template_with_a_default_day_is_left_to_it(asked):
    template = "{% if strftime_now " + asked + " %}{{ strftime_now('%d') }}{% endif %}"
    assert today_of(template) == ""
    assert today_of(template, "2025-03-09") == "2025-03-09"
    assert today_of("{{ strftime_now('%d') }}") == FIXED_DAY
    assert today_of("{{ messages }}", "2025-03-09") == ""


# ------------------------------------------------------------------------------ where they lie


TOKENS = "{{ bos_token }}|{{ eos_token }}|{{ sep_token }}"


@pytest.mark.parametrize(
    ("settings", "others"),
    [
        ({}, {"bos_token": "<s>", "eos_token": {"content": "</s>"}}),
        (
            {"bos_token": "<s>"},
            {"bos_token": "<|eot_id|>", "sep_token": "<s>", "eos_token": "</s>"},
        ),
        (
            {
                "eos_token": "</s>",
                "added_tokens_decoder": {"321": {"content": "</s>", "special": True}},
            },
            {"bos_token": "<s>"},
        ),
    ],
    ids=["only there", "in both", "settings that are complete"],
)
def test_special_tokens_are_read_where_transformers_reads_them(tmp_path, settings, others):
    settings = {"chat_template": TOKENS, "tokenizer_class": "PreTrainedTokenizerFast", **settings}
    files = {"tokenizer_config": settings, "special_tokens_map": others}
    directory = chat_directory(tmp_path, TOKENS, config={"eos_token_id": 321}, **files)
    (directory / "config.json").write_text('{"eos_token_id": 321, "model_type": "llama"}')
    assert Chat(directory).render(QUESTION, True) == of_transformers(directory, QUESTION, True)


NAMED = [{"name": "tools", "template": "T" + PLAIN}, {"name": "rag", "template": "R" + PLAIN}]


def test_one_of_several_templates_is_named(tmp_path):
    directory = chat_directory(tmp_path, NAMED)
    message = refusal(Chat, directory)
    assert "tools, rag" in message
    assert "--chat-template NAME" in message
    assert Chat(directory, given(chat_template="rag")).render(QUESTION, True)[0] == "R"
    message = refusal(Chat, directory, given(chat_template="rga"))
    assert "--chat-template rga: no such file" in message
    assert "tools, rag" in message
    (directory / "additional_chat_templates").mkdir()
    (directory / "additional_chat_templates" / "more.jinja").write_text("M" + PLAIN)
    assert Chat(directory, given(chat_template="more")).render(QUESTION, True)[0] == "M"


def test_a_template_file_replaces_the_models_own_but_not_a_scorers(tmp_path, capsys):
    directory = chat_directory(tmp_path / "model", LLAMA3)
    (tmp_path / "mine.jinja").write_text("MINE" + PLAIN)
    mine = given(chat_template=str(tmp_path / "mine.jinja"))
    assert Chat(directory, mine).template == "MINE" + PLAIN
    assert f"mine.jinja, in place of that of {directory}" in capsys.readouterr().out
    assert Chat(directory, mine, own_template=True).template == LLAMA3
    assert Chat(directory, given(chat_template="default")).template == LLAMA3
    without = chat_directory(tmp_path / "without", None)
    assert Chat(without, mine, own_template=True).template == "MINE" + PLAIN


# -------------------------------------------------------------------------------- its errors


def test_a_record_that_a_template_refuses_is_named_with_the_templates_words(tmp_path):
    strict = (
        "{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
        "{{ raise_exception('roles must alternate') }}{% endif %}{{ m.content }}{% endfor %}</s>"
    )
    chat = Chat(chat_directory(tmp_path / "model", strict))
    talk = {"messages": [*QUESTION, *QUESTION]}
    path = write_rows(tmp_path / "seeds.jsonl", [{"prompt": "a"}, {"prompt": "b"}, talk])
    rows = read_jsonl(path)
    assert make_request(rows[1], chat, SampleOptions()).ids == chat.encode("b</s>")
    message = refusal(make_request, rows[2], chat, SampleOptions())
    assert message.startswith(f"{path}: line 3: ")
    assert "roles must alternate" in message


# ------------------------------------------------------------------------------- token ids


# what a stranger's template may do -> what is said of it
HOSTILE = {
    "endless loops": (
        "{% for a in range(99999) %}{% for b in range(99999) %}x{% endfor %}{% endfor %}",
        "it takes more than 0.3 s",
    ),
    "a long text": ("{% set n = 10**10 %}{{ 'x' * n }}", "it takes more than 1024 MB"),
    "a long text without a variable": ("{{ 'x' * 10**10 }}", "it takes more than 1024 MB"),
    "a wide format": ("{{ '%99999999999d' % 1 }}", "it takes more than 1024 MB"),
    "a wide filter": ("{{ 'a' | center(10**10) }}", "it takes more than 1024 MB"),
    "doubled texts": (
        "{% set n = namespace(s='x' * 10**8) %}"
        "{% for i in range(60) %}{% set n.s = n.s ~ n.s %}{% endfor %}",
        "it takes more than",
    ),
    "a long list": ("{% set n = 10**10 %}{{ [0] * n }}", "it takes more than 1024 MB"),
    "a large power": ("{% set n = 10**9 %}{{ n ** n }}", "a number of 30000000030 bits"),
    "large products": (
        "{% set n = namespace(n=3) %}"
        "{% for i in range(99) %}{% set n.n = n.n * n.n %}{% endfor %}{{ n.n }}",
        "a number of 1624 bits",
    ),
    "a macro that calls itself": (
        "{% macro f(x) %}{{ f(x) }}{% endmacro %}{{ f(1) }}",
        "maximum recursion depth exceeded",
    ),
    "many brackets": ("{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}", "maximum recursion depth"),
    "a division by 0": ("{{ 1 / 0 }}", "division by zero"),
    "much random text": ("{{ lipsum(n=10**6) }}", "'lipsum' is undefined"),
    "a way out": ("{{ ().__class__.__base__ }}", "'__class__' of 'tuple' object is unsafe"),
}


@pytest.mark.skipif(sys.platform != "linux", reason="memory is limited on Linux only")
@pytest.mark.parametrize("what", HOSTILE)
def test_a_hostile_template_is_refused_in_one_line(tmp_path, monkeypatch, what):
    monkeypatch.setattr(limits, "SECONDS", 0.3)
    template, said = HOSTILE[what]
    directory = chat_directory(tmp_path / "model", template)
    before = resource.getrlimit(resource.RLIMIT_AS)
    assert said in refusal(Chat, directory)
    assert resource.getrlimit(resource.RLIMIT_AS) == before
    assert signal.getitimer(signal.ITIMER_VIRTUAL) == (0, 0)


def test_a_template_may_be_rendered_in_another_thread(tmp_path):
    chat = Chat(chat_directory(tmp_path / "model", PLAIN))
    with ThreadPoolExecutor(1) as pool:
        text = pool.submit(chat.render, TALK, False).result()
    assert text == chat.render(TALK, False)


def test_small_powers_and_products_are_those_of_python(tmp_path):
    template = "{{ 2 ** 10 }} {{ 3 * 7 }} {{ 2 ** -1 }} {{ 'ab' * 2 }} {{ 1.5 * 2 }}</s>"
    assert (
        Chat(chat_directory(tmp_path / "model", template))
        .render(TALK, False)
        .startswith("1024 21 0.5 abab 3.0")
    )


def test_tokens_without_an_embedding_are_refused_by_name(tmp_path):
    """ChatML tokens were added, and the embeddings were not resized."""
    config = {"vocab_size": 322}  # <|eot_id|> is 322
    message = refusal(Chat, chat_directory(tmp_path, LLAMA3, config=config))
    assert "<|eot_id|>" in message
    assert "vocab_size 322" in message
    plain = Chat(chat_directory(tmp_path, PLAIN, config=config))
    assert "<|start_header_id|>" in refusal(plain.prompt_ids, {"prompt": "a <|start_header_id|>"})


def marking_tokenizer(path: Path, by: str, template: str) -> Path:
    """Words with SentencePiece's mark, put before every text as in Llama 2 (normalizer) or Mistral
    (pre-tokenizer).
    """
    merges = [("Y", "e"), ("Ye", "s"), ("▁", "Yes"), ("n", "o"), ("▁", "no")]
    letters = [*"▁\n?[]|/ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"]
    words = ["<unk>", "</s>", *letters, *(a + b for a, b in merges)]
    vocab = {word: i for i, word in enumerate(words)}
    tokenizer = Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True))
    if by == "normalizer":
        prepend, replace = normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")
        tokenizer.normalizer = normalizers.Sequence([prepend, replace])
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    strip = decoders.Strip(" ", 1, 0)
    parts = [decoders.Replace("▁", " "), decoders.Fuse(), strip]
    tokenizer.decoder = decoders.Sequence(parts)
    tokenizer.add_special_tokens([AddedToken("</s>", special=True, normalized=False)])
    path.mkdir()
    tokenizer.save(str(path / "tokenizer.json"))
    settings = {"eos_token": "</s>", "chat_template": template}
    (path / "tokenizer_config.json").write_text(json.dumps(settings))
    return path


ZEPHYR = (
    "{% for m in messages %}|{{ m.role }}|\n{{ m.content }}{{ eos_token }}\n{% endfor %}"
    "{% if add_generation_prompt %}|assistant|\n{% endif %}"
)
INST = (
    "{% for m in messages %}{% if m.role == 'user' %}[INST]{{ m.content }}[/INST]{% else %}"
    " {{ m.content }}{{ eos_token }}{% endif %}{% endfor %}"
)


@pytest.mark.parametrize("by", ["normalizer", "pre-tokenizer"])
@pytest.mark.parametrize(
    ("template", "first"), [(ZEPHYR, "Yes"), (INST, "▁Yes")], ids=["zephyr", "inst"]
)
def test_a_response_has_the_tokens_that_it_has_in_a_conversation(tmp_path, by, template, first):
    chat = Chat(marking_tokenizer(tmp_path / "model", by, template))
    row = {"prompt": "Why?"}
    turns = [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "Yes no"}]
    whole = chat.encode(chat.render(turns, False))
    joined = chat.prompt_ids(row) + chat.response_ids("Yes no")
    assert joined == whole[: len(joined)]
    assert chat.tokenizer.id_to_token(chat.response_ids("Yes no")[0]) == first
    assert chat.text(chat.response_ids("Yes no")).strip() == "Yes no"


def ending_tokenizer(path: Path, special: bool) -> Path:
    directory = chat_directory(path, "{% for m in messages %}{{ m.content }}<|fin|>{% endfor %}")
    tokenizer = Tokenizer.from_str(tokenizer_json())
    tokenizer.add_tokens([AddedToken("<|fin|>", special=special)])
    tokenizer.save(str(directory / "tokenizer.json"))
    settings = json.loads((directory / "tokenizer_config.json").read_text())
    (directory / "tokenizer_config.json").write_text(
        json.dumps(settings | {"eos_token": "<|fin|>", "bos_token": None})
    )
    return directory


@pytest.mark.parametrize("special", [True, False])
def test_a_response_has_one_end_token_and_no_text_of_it(tmp_path, special):
    chat = Chat(ending_tokenizer(tmp_path / "model", special))
    assert chat.tokenizer.id_to_token(chat.end) == "<|fin|>"
    ids = [*chat.encode("good"), chat.end]
    assert chat.text(ids) == "good"
    for text in ("good", "good<|fin|>", "good<|fin|>\n"):
        assert chat.response_ids(text) == ids
    assert chat.response_ids("good \n") == [*chat.encode("good \n"), chat.end]
