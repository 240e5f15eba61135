"""Records and their errors, options, chat templates, manifests, processes."""

import contextlib
import dataclasses
import json
import os
import socket
import subprocess
import sys
import typing

import pytest
import transformers
from conftest import ROOT, TEMPLATE, run, tiny_checkpoint, tokenizer_json
from tokenizers import Tokenizer
from tokenizers.processors import TemplateProcessing

import data
from data import Chat, InputError


def refusal(function, *args, **kw) -> str:
    """The one line of an InputError."""
    with pytest.raises(InputError) as caught:
        function(*args, **kw)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# ---------------------------------------------------------------------------------------------- records

GOOD = '{"prompt": "a", "response": "b"}'


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        (None, ["no such file", "check"]),
        ("", ["no records", "give at least one"]),
        (f'{GOOD}\n{{"prompt": "a"', ["line 2", "not valid JSON", "mend or remove"]),
        (f"{GOOD}\n\n{GOOD}\n", ["line 2", "not valid JSON"]),
        (
            f'{GOOD}\n{GOOD}\n{{"prompt": "a"}}\n',
            ["line 3", "'response'", "missing", "mend or remove"],
        ),
        ('{"response": "b"}', ["line 1", "'prompt'"]),
        (f'{GOOD}\n{{"prompt": " \\n", "response": "b"}}', ["line 2", "'prompt'", "empty"]),
        (f'{GOOD}\n{{"prompt": 7, "response": "b"}}', ["line 2", "'prompt'", "no text"]),
        (f'{GOOD}\n{{"prompt": "a", "response": ["b"]}}', ["line 2", "'response'", "no text"]),
        (f'{GOOD}\n["a", "b"]', ["line 2", "'prompt'"]),
        (f'{GOOD}\n{{"messages": [], "response": "b"}}', ["line 2", "'prompt'"]),
        (f'{GOOD}\n{{"messages": "hi", "response": "b"}}', ["line 2", "'messages'"]),
        (
            f'{GOOD}\n{{"messages": [{{"role": "user"}}], "response": "b"}}',
            ["line 2", "'messages'"],
        ),
    ],
)
def test_bad_records_are_named_by_file_line_field_and_remedy(tmp_path, text, parts):
    path = tmp_path / "in.jsonl"
    if text is not None:
        path.write_text(text)
    message = refusal(data.read_jsonl, path, "prompt", "response")
    assert message.startswith(f"{path}: ") and all(part in message for part in parts)


def test_a_file_that_is_not_utf8_is_refused_by_name(tmp_path):
    (tmp_path / "in.jsonl").write_bytes(GOOD.encode() + b'\n{"prompt": "caf\xe9"}\n')
    message = refusal(data.read_jsonl, tmp_path / "in.jsonl", "prompt")
    assert str(tmp_path / "in.jsonl") in message and "UTF-8" in message


def read(tmp_path, *rows):
    data.write_jsonl(tmp_path / "rows.jsonl", rows)
    return data.read_jsonl(tmp_path / "rows.jsonl")


def test_ids_follow_from_the_prompt_not_from_the_place(tmp_path):
    a, b, c = read(tmp_path, {"prompt": "a"}, {"prompt": "b"}, {"prompt": "c", "id": "mine"})
    c2, b2, a2 = read(
        tmp_path, {"prompt": "c", "id": 9}, {"prompt": "b", "keywords": 1}, {"prompt": "a"}
    )
    assert (a["id"], b["id"]) == (a2["id"], b2["id"]) and a["id"] != b["id"]
    assert (c["id"], c2["id"]) == ("mine", 9)
    assert (
        a["id"] == "e3401daba74577e2"
    )  # as ever: a change would give every old run new random numbers


def test_duplicates_get_ids_of_their_own_and_a_conversation_is_its_prompt(tmp_path):
    talk = [{"role": "user", "content": "a"}]
    rows = read(
        tmp_path,
        {"prompt": "a"},
        {"prompt": "a"},
        {"prompt": "b"},
        {"messages": talk},
        {"prompt": "a"},
    )
    assert len({row["id"] for row in rows}) == 5
    assert rows[0]["id"] == read(tmp_path, {"messages": talk})[0]["id"]
    assert data.messages_of(rows[3]) == talk == data.messages_of(rows[0])


def test_records_come_back_as_written(tmp_path):
    rows = [{"id": 1, "prompt": 'é 日本 \u2028 \x85 \x0c " \\ \n end'}, {"id": 2, "prompt": "x"}]
    assert read(tmp_path, *rows) == rows
    assert (tmp_path / "rows.jsonl").read_text().count("\n") == 2 and "日本" in (
        tmp_path / "rows.jsonl"
    ).read_text()


def test_random_numbers_follow_from_their_names_alone():
    assert (
        data.rng(0, "keywords").random()
        == data.rng(0, "keywords").random()
        != data.rng(1, "keywords").random()
    )


# ---------------------------------------------------------------------------------------------- options


@dataclasses.dataclass(kw_only=True)
class Part:
    lr: float = 1e-6  # peak learning rate, 100% of it
    epochs: int = 3  # passes


@dataclasses.dataclass(kw_only=True)
class Options(data.Common):
    model: str  # checkpoint directory
    mode: typing.Literal["fast", "slow"] = "fast"  # how
    top_k: int = 5  # so many
    keep: bool = False  # keep all
    policy: Part = dataclasses.field(default_factory=lambda: Part(lr=5e-7))  # of the policy
    reward: Part = dataclasses.field(default_factory=Part)  # of the reward model


def parse(*argv):
    return data.parse_options(Options, list(argv))


def config_file(tmp_path, **values) -> str:
    (tmp_path / "o.json").write_text(json.dumps(values))
    return str(tmp_path / "o.json")


def test_options_are_flags_with_their_defaults():
    assert parse("--model", "m") == Options(model="m", policy=Part(lr=5e-7))
    o = parse(
        "--model",
        "m",
        "--top-k",
        "9",
        "--keep",
        "--mode",
        "slow",
        "--policy.lr",
        "0.1",
        "--reward.epochs=1",
        "--seed=3",
    )
    assert o == Options(
        model="m",
        top_k=9,
        keep=True,
        mode="slow",
        seed=3,
        policy=Part(lr=0.1),
        reward=Part(epochs=1),
    )


def test_help_is_the_comment_behind_the_field(capsys):
    with pytest.raises(SystemExit) as end:
        parse("--help")
    text = " ".join(capsys.readouterr().out.split())
    assert end.value.code == 0 and "Records and their errors" in text  # this file's docstring
    for words in (
        "peak learning rate, 100% of it (default: 5e-07)",
        "--top-k TOP_K so many",
        "--policy.lr",
        "--no-keep",
        "all randomness follows from it",
    ):
        assert words in text


@pytest.mark.parametrize(
    ("argv", "named"),
    [
        (["--model", "m", "--unknown", "1"], "--unknown"),
        (["--model", "m", "--top", "1"], "--top"),
        (["--model", "m", "--mode", "medium"], "--mode"),
        (["--top-k", "1"], "--model"),
        (["--model", "m", "stray"], "stray"),
        (["--model", "m", "--top-k", "many"], "--top-k"),
        (["--model", "m", "--policy.momentum", "1"], "--policy.momentum"),
    ],
)
def test_wrong_flags_are_errors_that_name_them(argv, named):
    assert named in refusal(parse, *argv)


def test_config_file_gives_options_and_flags_win(tmp_path):
    config = config_file(
        tmp_path, model="m", top_k=7, keep=True, policy={"epochs": 1}, reward={"lr": 0.5}
    )
    assert parse("--config", config) == Options(
        model="m", top_k=7, keep=True, policy=Part(lr=5e-7, epochs=1), reward=Part(lr=0.5)
    )
    assert parse(
        "--config", config, "--top-k", "8", "--no-keep", "--reward.lr", "0.25", "--policy.lr=1"
    ) == Options(model="m", top_k=8, policy=Part(lr=1, epochs=1), reward=Part(lr=0.25))


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ({"modell": 1}, "--modell"),
        ({"policy": {"lrr": 1}}, "--policy.lrr"),
        ({"mode": "medium"}, "--mode"),
        ({"dtype": "float16"}, "--dtype"),
        ({"policy": 5}, "--policy"),
        ({"top_k": 1.5}, "--top-k"),
        ({"keep": "yes"}, "--keep"),
    ],
)
def test_wrong_config_entries_are_errors_that_name_them(tmp_path, values, named):
    assert named in refusal(parse, "--config", config_file(tmp_path, model="m", **values))


def test_a_run_is_reproduced_by_the_options_it_wrote(tmp_path):
    o = parse("--model", "m", "--policy.epochs", "9", "--dtype", "float32")
    assert parse("--config", config_file(tmp_path, **dataclasses.asdict(o))) == o


def test_config_errors_name_the_file(tmp_path):
    assert "none.json: no such file" in refusal(parse, "--config", str(tmp_path / "none.json"))
    (tmp_path / "bad.json").write_text('{"model": "m",\n "top_k": }')
    assert "bad.json: line 2" in refusal(parse, "--config", str(tmp_path / "bad.json"))


def command(monkeypatch, capsys, main, *argv):
    """data.command in this process, within the session's group: (exit code, last line of stdout, stderr)."""
    monkeypatch.setattr(sys, "argv", ["x", *argv])
    monkeypatch.setattr(data, "processes", contextlib.nullcontext)
    code = 0
    try:
        data.command(main, Options)
    except SystemExit as end:
        code = end.code
    printed = capsys.readouterr()
    return code, printed.out.strip().split("\n")[-1], printed.err


def test_a_command_ends_with_json_or_with_one_line(monkeypatch, capsys, tmp_path):
    code, last, _ = command(
        monkeypatch, capsys, lambda o: {"tokens": o.top_k}, "--model", str(tmp_path)
    )
    assert code == 0 and json.loads(last)["tokens"] == 5 and json.loads(last)["seconds"] >= 0

    def fail(o):
        raise InputError("x.jsonl: line 3: mend it")

    code, _, err = command(monkeypatch, capsys, fail, "--model", str(tmp_path))
    assert (code, err) == (2, "error: x.jsonl: line 3: mend it\n")


# ---------------------------------------------------------------------------------------------- chat

LLAMA3 = """{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m['role'] }}<|end_header_id|>\n
{{ m['content'] | trim }}<|eot_id|>{% endfor %}{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n
{% endif %}"""
TALK = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": " Hi! Écris 日本. "},
    {"role": "assistant", "content": "Yes?"},
    {"role": "user", "content": "Go on."},
]


def chat_directory(path, template: str | list | None = TEMPLATE, jinja: str | None = None, **files):
    """Only what Chat reads: a tokenizer with Llama 3's specials whose post-processor adds a BOS, and settings."""
    tokenizer = Tokenizer.from_str(tokenizer_json())
    tokenizer.add_special_tokens(
        ["<s>", "</s>", "<|eot_id|>", "<|start_header_id|>", "<|end_header_id|>"]
    )  # 320 to 324
    tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 320)])
    path.mkdir(exist_ok=True)
    tokenizer.save(str(path / "tokenizer.json"))
    settings = {
        "bos_token": "<s>",
        "eos_token": {"__type": "AddedToken", "content": "</s>"},
        "tokenizer_class": "PreTrainedTokenizerFast",
        **({"chat_template": template} if template else {}),
    }
    for name, content in {"tokenizer_config": settings, **files}.items():
        if content is not None:
            (path / f"{name}.json").write_text(json.dumps(content))
    if jinja is not None:
        (path / "chat_template.jinja").write_text(jinja)
    return path


def test_template_is_found_wherever_it_may_be(tmp_path):
    other = "{{ 'other' }}"
    for kw in (
        {"template": LLAMA3},
        {"template": None, "jinja": LLAMA3},
        {"template": other, "jinja": LLAMA3},
        {
            "template": [
                {"name": "tool_use", "template": other},
                {"name": "default", "template": LLAMA3},
            ]
        },
    ):
        (tmp_path / "chat_template.jinja").unlink(missing_ok=True)
        assert Chat(chat_directory(tmp_path, **kw)).template == LLAMA3
    assert Chat(tmp_path, "default").template == LLAMA3, "a fallback must not replace a template"


def test_missing_template_names_the_remedy(tmp_path):
    directory = chat_directory(tmp_path, None)
    message = refusal(Chat, directory)
    assert "--chat-template" in message and str(directory) in message
    assert "nothing.jinja" in refusal(Chat, directory, str(tmp_path / "nothing.jinja"))
    only_named = chat_directory(tmp_path, [{"name": "tool_use", "template": "x"}])
    assert "--chat-template" in refusal(Chat, only_named)


def test_default_template_and_template_file(tmp_path):
    directory = chat_directory(tmp_path, None)
    chat = Chat(directory, "default")
    assert chat.render(TALK, True) == (
        "System: Be brief.\n\nUser:  Hi! Écris 日本. \n\nAssistant: Yes?</s>\n\nUser: Go on.\n\n"
        "Assistant: "
    )
    assert chat.end == 321 and chat.stops == {321}
    (tmp_path / "mine.jinja").write_text(LLAMA3)
    assert Chat(directory, str(tmp_path / "mine.jinja")).template == LLAMA3


def test_bos_is_never_doubled_nor_added(tmp_path):
    chat = Chat(chat_directory(tmp_path / "a", LLAMA3))
    ids = chat.prompt_ids({"messages": TALK})
    assert ids[0] == 320 and ids.count(320) == 1
    assert 320 not in chat.response_ids("text")
    assert 320 not in Chat(chat_directory(tmp_path / "b", TEMPLATE)).prompt_ids({"prompt": "hi"})


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


@pytest.mark.parametrize("template", [LLAMA3, TEMPLATE, INDENTED])
def test_ids_equal_those_of_transformers(tmp_path, template):
    directory = chat_directory(tmp_path, template)
    expected = transformers.AutoTokenizer.from_pretrained(directory).apply_chat_template(
        TALK, add_generation_prompt=True, return_dict=False
    )
    assert Chat(directory).prompt_ids({"messages": TALK}) == list(expected)


def test_smollm2_prompts_equal_those_of_transformers(smollm2):
    expected = transformers.AutoTokenizer.from_pretrained(smollm2).apply_chat_template(
        TALK, add_generation_prompt=True, return_dict=False
    )
    chat = Chat(smollm2)
    assert chat.prompt_ids({"messages": TALK}) == list(expected)
    assert chat.text([chat.end]) == "" and chat.tokenizer.id_to_token(chat.end) == "<|im_end|>"


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
    assert chat.end == chat.tokenizer.token_to_id(end) and chat.stops == stops
    assert chat.response_ids("Hi") == [*chat.encode("Hi"), chat.end]
    assert chat.text(chat.response_ids("Hi 日本")) == "Hi 日本"


def test_no_end_token_at_all_is_refused(tmp_path):
    directory = chat_directory(
        tmp_path,
        "{{ messages[0]['content'] }}",
        tokenizer_config={"chat_template": "{% for m in messages %}{{ m['content'] }}{% endfor %}"},
    )
    assert "end-of-sequence" in refusal(Chat, directory)


@pytest.mark.parametrize("template", [LLAMA3, TEMPLATE])
def test_prompt_and_response_are_the_ids_of_the_whole(tmp_path, template):
    chat = Chat(chat_directory(tmp_path, template))
    whole = chat.encode(
        chat.render([*TALK, {"role": "assistant", "content": "The answer, 日本."}], False)
    )
    joined = chat.prompt_ids({"messages": TALK}) + chat.response_ids("The answer, 日本.")
    assert joined == whole[: len(joined)] and joined[-1] == chat.end and len(joined) == len(whole)


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


def test_missing_or_broken_tokenizer_is_refused(tmp_path):
    assert "tokenizer.json" in refusal(Chat, tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    assert "tokenizer.json" in refusal(Chat, tmp_path)


# ---------------------------------------------------------------------------------------------- manifests


def run_stage(tmp_path, calls=None, counts=None, **options):
    def work():
        data.write_jsonl(tmp_path / "out.jsonl", [{"n": 1}])
        (calls if calls is not None else []).append(1)
        return counts or {"tokens": 10}

    return data.stage(
        tmp_path / "out.jsonl",
        {"data": tmp_path / "in.jsonl"},
        {"lr": 1.0, "seed": 0, **options},
        work,
    )


def test_stage_runs_once(tmp_path, capsys):
    (tmp_path / "in.jsonl").write_text("a")
    calls = []
    first, second = run_stage(tmp_path, calls), run_stage(tmp_path, calls)
    assert len(calls) == 1 and first == second and "done before" in capsys.readouterr().out
    assert first["tokens"] == 10 and first["tokens_per_second"] > 0 and "seconds" in first
    manifest = json.loads((tmp_path / "out.manifest.json").read_text())
    assert manifest["options"] == {"lr": 1.0, "seed": 0}
    assert manifest["inputs"] == {"data": data.fingerprint(tmp_path / "in.jsonl")}
    assert (
        manifest["content"] == data.fingerprint(tmp_path / "out.jsonl")
        and manifest["counts"] == first
    )


def test_stage_runs_again_after_a_failure_or_where_its_file_is_gone(tmp_path):
    (tmp_path / "in.jsonl").write_text("a")
    with pytest.raises(ZeroDivisionError):
        data.stage(
            tmp_path / "out.jsonl",
            {"data": tmp_path / "in.jsonl"},
            {"lr": 1.0, "seed": 0},
            lambda: 1 / 0,
        )
    calls = []
    run_stage(tmp_path, calls)
    (tmp_path / "out.jsonl").unlink()
    run_stage(tmp_path, calls)
    assert len(calls) == 2


def test_changed_option_or_input_is_an_error_that_says_what(tmp_path):
    (tmp_path / "in.jsonl").write_text("a")
    run_stage(tmp_path)
    message = refusal(run_stage, tmp_path, lr=2.0)
    assert (
        "option lr = 1.0, now 2.0" in message and "out.jsonl" in message and "0 stages" in message
    )
    assert "option extra = None, now 3" in refusal(run_stage, tmp_path, extra=3)
    for name in (
        "checkpoint_every",
        "recompute",
        "peak_tflops",
    ):  # change no result, in older manifests neither
        run_stage(tmp_path, **{name: 5})
        manifest = json.loads((tmp_path / "out.manifest.json").read_text())
        manifest["options"][name] = 3
        data.write_text(tmp_path / "out.manifest.json", json.dumps(manifest))
        run_stage(tmp_path)
    old = data.fingerprint(tmp_path / "in.jsonl")
    (tmp_path / "in.jsonl").write_text("other")
    assert f"input data = {old!r}, now {data.fingerprint(tmp_path / 'in.jsonl')!r}" in refusal(
        run_stage, tmp_path
    )


def test_changed_option_counts_the_stages_after_it(tmp_path):
    run_dir = tmp_path / "run"
    for i, name in enumerate(["generator", "iter1/prompts", "iter1/answers", "iter2/prompts"]):
        out = run_dir / (name + ".jsonl" if "/" in name else name)
        work = lambda: (data.write_jsonl(out if out.suffix else out / "x.jsonl", [{}]), {})[1]  # noqa: B023, E731
        data.stage(out, {}, {"i": i}, work)
    assert "invalidate it and 3 stages after it" in refusal(
        data.stage, run_dir / "generator", {}, {"i": 9}, dict
    )
    assert "invalidate it and 2 stages after it" in refusal(
        data.stage, run_dir / "iter1/prompts.jsonl", {}, {"i": 9}, dict
    )


def test_a_stage_checkpoint_lives_only_with_its_options(tmp_path, capsys):
    out = tmp_path / "policy"
    half_done = out / "checkpoint" / "step"

    def interrupted():
        data.write_text(half_done, "1")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        data.stage(out, {}, {"lr": 1}, interrupted)
    seen = []
    for lr in (1, 2):
        with pytest.raises(KeyboardInterrupt):
            data.stage(
                out, {}, {"lr": lr}, lambda: seen.append(half_done.is_file()) or interrupted()
            )
    assert seen == [True, False]
    assert capsys.readouterr().out.count("checkpoint was made with other inputs or options") == 1


def test_write_text_is_whole_or_nothing(tmp_path, monkeypatch):
    path = tmp_path / "new" / "a.json"
    data.write_text(path, "old")
    assert [f.name for f in path.parent.iterdir()] == ["a.json"]
    monkeypatch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(OSError("killed here")))
    with pytest.raises(OSError, match="killed here"):
        data.write_text(path, "new text")
    assert path.read_text() == "old"


def test_fingerprint_follows_the_content_and_nothing_else(tmp_path):
    a, b = (tiny_checkpoint(tmp_path / name) for name in "ab")
    before = data.fingerprint(a)
    assert before == data.fingerprint(b)
    (a / "README.md").write_text("changes nothing")
    os.utime(a / "config.json", ns=(1, 1))
    assert data.fingerprint(a) == before
    for name in ("model.safetensors", "config.json", "tokenizer.json", "tokenizer_config.json"):
        held = (a / name).read_bytes()
        (a / name).write_bytes(held[:-1] + b" ")
        assert data.fingerprint(a) != before, name
        (a / name).write_bytes(held)
        assert data.fingerprint(a) == before
    (a / "chat_template.jinja").write_text("x")
    assert data.fingerprint(a) != before


def test_fingerprint_of_nothing_is_refused(tmp_path):
    assert "no such" in refusal(data.fingerprint, tmp_path / "none")


# ---------------------------------------------------------------------------------------------- processes


def test_on_first_hands_back_the_value_or_the_error():
    assert data.on_first(lambda a: a + 1, 2) == 3

    def fail():
        raise InputError("one line")

    assert refusal(data.on_first, fail) == "one line"


TWO = """
import sys
import time
import data

with data.processes():
    counts = [data.spread(lambda some: [x * 10 for x in some], list(range(n))) for n in (0, 1, 2, 5)]
    assert counts == [[], [0], [0, 10], [0, 10, 20, 30, 40]], counts
    assert data.gather(data.RANK) == [0, 1]
    assert data.on_first(lambda: f"from {data.RANK}") == "from 0"
    def fail():
        raise data.InputError(f"of rank {data.RANK}")
    try:
        data.on_first(fail)
    except data.InputError as error:
        assert str(error) == "of rank 0"
    else:
        sys.exit("no error")
    mine = []
    for item in data.share(list("abcdefgh")):
        mine.append(item)
        time.sleep(0.3 if data.RANK == 0 else 0.01)
    dealt = data.gather(mine)
    assert sorted(sum(dealt, [])) == list("abcdefgh") and len(dealt[1]) > len(dealt[0]), dealt
    assert sorted(sum(data.gather(list(data.share([1, 2]))), [])) == [1, 2]
    data.say("said once")
"""


def test_two_processes_deal_out_and_gather_in_order(tmp_path):
    (tmp_path / "two.py").write_text(TWO)
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = str(s.getsockname()[1])
    env = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
    }
    both = [
        subprocess.Popen(
            [sys.executable, str(tmp_path / "two.py")],
            env={**env, "RANK": str(rank)},
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        for rank in range(2)
    ]
    ends = [p.communicate(timeout=120) for p in both]
    assert [p.returncode for p in both] == [0, 0], ends
    assert "".join(out for out, _ in ends) == "said once\n"


SLOW = """
import sys
import time
from dataclasses import dataclass
import data

@dataclass
class Options:
    model: str = ""

def main(o):
    time.sleep(0 if data.RANK else 2)
    raise data.InputError("mend it")

data.command(main, Options)
"""


def test_the_first_rank_says_its_error_however_late(tmp_path):
    """torchrun ends every rank as soon as one has ended."""
    (tmp_path / "slow.py").write_text(SLOW)
    code, _, errors = run([tmp_path / "slow.py"], env={"PYTHONPATH": str(ROOT)}, nproc=2)
    assert code != 0 and "\nerror: mend it\n" in f"\n{errors}" and 'slow.py", line' not in errors


def test_load_function_reads_a_function_of_a_file_and_names_what_is_wrong(tmp_path):
    (tmp_path / "mine.py").write_text("def score(x):\n    return x + 1\n")
    assert data.load_function(f"{tmp_path}/mine.py:score")(1) == 2
    assert "no function other" in refusal(data.load_function, f"{tmp_path}/mine.py:other")
    assert "FILE.py:FUNCTION" in refusal(data.load_function, f"{tmp_path}/none.py:score")
