"""Chat templates: where they are found, ids equal to those of transformers, ends of responses."""

import json
from pathlib import Path

import pytest
import transformers
from conftest import TEMPLATE, refusal, tokenizer_json
from tokenizers import Tokenizer
from tokenizers.processors import TemplateProcessing

from formats.chat import Chat
from plumbing.files import InputError
from plumbing.options import RunOptions

LLAMA3 = (
    "{{ bos_token }}{% for m in messages %}"
    "<|start_header_id|>{{ m['role'] }}<|end_header_id|>\n\n{{ m['content'] | trim }}<|eot_id|>"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
INDENTED = """{{- bos_token }}
{%- for m in messages %}
    {% if m['role'] == 'assistant' %}
A: {{ m['content'] }}<|eot_id|>
    {% else %}
Q: {{ m | tojson }}
    {% endif %}
{% endfor %}
{% if add_generation_prompt %}
A:
{% endif %}"""
OTHER = "{{ 'other' }}"
PLAIN = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
TALK = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": " Hi! Écris 日本. "},
    {"role": "assistant", "content": "Yes?"},
    {"role": "user", "content": "Go on."},
]


def with_template(name: str | Path) -> RunOptions:
    return RunOptions(chat_template=str(name))


def chat_directory(
    path: Path, template: str | list | None = TEMPLATE, jinja: str | None = None, **files
) -> Path:
    """Only what Chat reads: settings, and a tokenizer with Llama 3's specials whose post-processor
    adds a BOS.
    """
    tokenizer = Tokenizer.from_str(tokenizer_json())
    specials = ["<s>", "</s>", "<|eot_id|>", "<|start_header_id|>", "<|end_header_id|>"]
    tokenizer.add_special_tokens(specials)  # 320 to 324
    tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 320)])
    path.mkdir(exist_ok=True)
    tokenizer.save(str(path / "tokenizer.json"))
    settings = {
        "bos_token": "<s>",
        "eos_token": {"__type": "AddedToken", "content": "</s>"},
        "tokenizer_class": "PreTrainedTokenizerFast",
    }
    if template:
        settings["chat_template"] = template
    for name, content in {"tokenizer_config": settings, **files}.items():
        if content is not None:
            (path / f"{name}.json").write_text(json.dumps(content))
    if jinja is not None:
        (path / "chat_template.jinja").write_text(jinja)
    return path


# ------------------------------------------------------------------------------- the template

SEVERAL = [{"name": "tool_use", "template": OTHER}, {"name": "default", "template": LLAMA3}]


@pytest.mark.parametrize(
    ("inside", "jinja"),
    [(LLAMA3, None), (None, LLAMA3), (OTHER, LLAMA3), (SEVERAL, None)],
)
def test_template_is_found_wherever_it_may_be(tmp_path, inside, jinja):
    directory = chat_directory(tmp_path, inside, jinja)
    assert Chat(directory).template == LLAMA3
    assert Chat(directory, with_template("default")).template == LLAMA3, (
        "a fallback must not replace a template"
    )


def test_missing_template_names_the_fix(tmp_path):
    directory = chat_directory(tmp_path, None)
    message = refusal(Chat, directory)
    assert "--chat-template" in message
    assert str(directory) in message
    assert "nothing.jinja" in refusal(Chat, directory, with_template(tmp_path / "nothing.jinja"))
    only_named = chat_directory(tmp_path, SEVERAL[:1])
    assert "--chat-template" in refusal(Chat, only_named)


def test_default_template_and_template_file(tmp_path):
    directory = chat_directory(tmp_path, None)
    chat = Chat(directory, with_template("default"))
    assert chat.render(TALK, True) == (
        "System: Be brief.\n\nUser:  Hi! Écris 日本. \n\nAssistant: Yes?</s>\n\nUser: Go on.\n\n"
        "Assistant: "
    )
    assert chat.end == 321
    assert chat.stop_token_ids == {321}
    (tmp_path / "mine.jinja").write_text(LLAMA3)
    assert Chat(directory, with_template(tmp_path / "mine.jinja")).template == LLAMA3


def test_a_template_that_is_not_utf8_is_refused_by_name(tmp_path):
    (tmp_path / "mine.jinja").write_bytes(b"caf\xe9")
    directory = chat_directory(tmp_path / "model", None)
    assert "mine.jinja: line 1 is not UTF-8" in refusal(
        Chat, directory, with_template(tmp_path / "mine.jinja")
    )


@pytest.mark.parametrize(
    "template",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.append(1) }}",
        "{{ raise_exception('no system role') }}",
        "{{ raise_exception.__globals__['os'].system('true') }}",
        "{{ nothing.at.all }}",
        "{{ 1 + 'a' }}",
        "{% for m in messages %}",
    ],
)
def test_template_that_fails_or_reaches_out_is_refused(tmp_path, template):
    directory = chat_directory(tmp_path, template)
    assert str(directory) in refusal(Chat, directory)


def test_a_conversation_that_the_template_refuses_is_an_error_of_one_line(tmp_path):
    strict = (
        "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}</s>"
    )
    chat = Chat(chat_directory(tmp_path, strict))
    assert "no system" in refusal(chat.prompt_ids, {"messages": TALK})
    assert chat.prompt_ids({"prompt": "hi"}) == [321]


# ------------------------------------------------------------------------------- token ids


def test_bos_is_never_doubled_nor_added(tmp_path):
    chat = Chat(chat_directory(tmp_path / "a", LLAMA3))
    ids = chat.prompt_ids({"messages": TALK})
    assert ids[0] == 320
    assert ids.count(320) == 1
    assert 320 not in chat.response_ids("text")
    without = Chat(chat_directory(tmp_path / "b", TEMPLATE))
    assert 320 not in without.prompt_ids({"prompt": "hi"})


def ids_of_transformers(directory: Path) -> list[int]:
    tokenizer = transformers.AutoTokenizer.from_pretrained(directory)
    ids = tokenizer.apply_chat_template(TALK, add_generation_prompt=True, return_dict=False)
    return list(ids)


@pytest.mark.parametrize("template", [LLAMA3, TEMPLATE, INDENTED])
def test_ids_equal_those_of_transformers(tmp_path, template):
    directory = chat_directory(tmp_path, template)
    assert Chat(directory).prompt_ids({"messages": TALK}) == ids_of_transformers(directory)


@pytest.mark.real_model
def test_smollm2_prompts_equal_those_of_transformers(smollm2):
    chat = Chat(smollm2)
    assert chat.prompt_ids({"messages": TALK}) == ids_of_transformers(smollm2)
    assert chat.text([chat.end]) == ""
    assert chat.tokenizer.id_to_token(chat.end) == "<|im_end|>"


@pytest.mark.parametrize("template", [LLAMA3, TEMPLATE])
def test_prompt_and_response_are_the_ids_of_the_whole(tmp_path, template):
    chat = Chat(chat_directory(tmp_path, template))
    response = "The answer, 日本."
    turns = [*TALK, {"role": "assistant", "content": response}]
    whole = chat.encode(chat.render(turns, False))
    joined = chat.prompt_ids({"messages": TALK}) + chat.response_ids(response)
    assert joined == whole
    assert joined[-1] == chat.end


def test_a_trainers_truncation_and_padding_are_not_taken_over(tmp_path):
    directory = chat_directory(tmp_path)
    tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
    tokenizer.enable_truncation(4)
    tokenizer.enable_padding(length=64)
    tokenizer.save(str(directory / "tokenizer.json"))
    text = "As many tokens as there are in this sentence."
    assert Chat(directory).text(Chat(directory).encode(text)) == text


# ------------------------------------------------------------------------------- ends and errors


@pytest.mark.parametrize(
    ("template", "end", "config", "generation", "stops"),
    [
        (LLAMA3, "<|eot_id|>", None, None, {321, 322}),
        (LLAMA3, "<|eot_id|>", {"eos_token_id": [321, 5]}, {"eos_token_id": 6}, {321, 322, 5, 6}),
        (TEMPLATE, "<|end|>", {"eos_token_id": 321}, None, {321, 0}),
        (
            "{% for m in messages %}{{ m['content'] }}\n{% endfor %}",
            "</s>",
            None,
            {"eos_token_id": None},
            {321},
        ),
    ],
)
def test_end_is_what_the_template_writes_and_stops_are_all_known(
    tmp_path, template, end, config, generation, stops
):
    chat = Chat(chat_directory(tmp_path, template, config=config, generation_config=generation))
    assert chat.end == chat.tokenizer.token_to_id(end)
    assert chat.stop_token_ids == stops
    assert chat.response_ids("Hi") == [*chat.encode("Hi"), chat.end]
    assert chat.text(chat.response_ids("Hi 日本")) == "Hi 日本"


def test_no_end_token_at_all_is_refused(tmp_path):
    directory = chat_directory(tmp_path, tokenizer_config={"chat_template": PLAIN})
    assert "end-of-sequence" in refusal(Chat, directory)


def test_missing_or_broken_tokenizer_is_refused(tmp_path):
    assert "tokenizer.json" in refusal(Chat, tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    assert "tokenizer.json" in refusal(Chat, tmp_path)


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ([], "not an object"),
        ({"eos_token": 7}, "eos_token must be text"),
        ({"eos_token": {"text": "a"}}, "eos_token must be text"),
        ({"chat_template": 7}, "chat_template must be text"),
        ({"chat_template": [{"name": "a"}]}, "chat_template must be text"),
        ({"chat_template": ["a"]}, "chat_template must be text"),
    ],
)
def test_settings_of_another_shape_are_refused_by_name(tmp_path, settings, named):
    directory = chat_directory(tmp_path, PLAIN)
    (directory / "chat_template.jinja").unlink(missing_ok=True)
    (directory / "tokenizer_config.json").write_text(json.dumps(settings))
    with pytest.raises(InputError, match=named):
        Chat(directory)
