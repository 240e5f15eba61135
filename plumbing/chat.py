"""Chat: the tokenizer and chat template of a checkpoint directory; text to token ids and back."""

import json
from functools import partial
from pathlib import Path

from jinja2 import TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import Tokenizer

from plumbing.records import InputError, load_json, messages_of, read_text

DEFAULT_TEMPLATE = (
    "{% for m in messages %}"
    "{{ {'system': 'System', 'user': 'User', 'assistant': 'Assistant'}[m['role']] }}: "
    "{{ m['content'] }}{% if m['role'] == 'assistant' %}{{ eos_token }}{% endif %}{{ '\\n\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}Assistant: {% endif %}"
)
SPECIAL_TOKENS = ("bos_token", "eos_token", "unk_token", "pad_token")


class Chat:
    """Prompt and response are tokenised apart and their ids concatenated: the boundary never moves.

    No BOS is added to what the template writes. `end` is the token that ends a response,
    `stop_token_ids` are all that may end one.
    """

    def __init__(self, directory: str | Path, fallback: str = ""):
        """fallback: RunOptions.chat_template. Raises InputError without tokenizer or template."""
        self.directory = Path(directory)
        self.tokenizer = load_tokenizer(self.directory)
        settings = self.settings("tokenizer_config.json")
        special = {}
        for name in SPECIAL_TOKENS:
            if value := settings.get(name):
                special[name] = value["content"] if isinstance(value, dict) else value
        self.template = find_template(self.directory, settings.get("chat_template"), fallback)
        self.compiled = compile_template(self.template, special, self.directory)
        self.find_end(special.get("eos_token"))

    def settings(self, name: str) -> dict:
        path = self.directory / name
        return load_json(path) if path.is_file() else {}

    def find_end(self, eos_token: str | None) -> None:
        """Set `end` and `stop_token_ids`.

        The end of a turn is what the template writes after a response, often not eos_token.
        """
        stops = {self.tokenizer.token_to_id(eos_token)} if eos_token else set()
        for name in ("config.json", "generation_config.json"):
            ids = self.settings(name).get("eos_token_id")
            if ids is not None:
                stops |= set(ids) if isinstance(ids, list) else {ids}

        # render a response and look at the first token after it
        turns = [{"role": "user", "content": "?"}, {"role": "assistant", "content": "ANSWER"}]
        rest = self.render(turns, False).rpartition("ANSWER")[2].lstrip()
        known = stops | self.tokenizer.get_added_tokens_decoder().keys()
        ends = [token for token in self.encode(rest)[:1] if token in known]
        if not stops and not ends:
            where = "config.json or tokenizer_config.json"
            raise InputError(f"{self.directory}: no end-of-sequence token in {where}; add one")
        self.end = ends[0] if ends else min(stops)
        self.stop_token_ids = stops | {self.end}

    def encode(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=False).ids

    def render(self, messages: list[dict], open_answer: bool) -> str:
        try:
            return self.compiled.render(messages=messages, add_generation_prompt=open_answer)
        except (TemplateError, KeyError, TypeError) as error:
            problem = f"chat template refuses {messages[0]}: {error}"
            raise InputError(f"{self.directory}: {problem}") from None

    def prompt_ids(self, row: dict) -> list[int]:
        """A record's conversation and the opening of the response."""
        return self.encode(self.render(messages_of(row), True))

    def response_ids(self, text: str) -> list[int]:
        """A response and its end token."""
        return [*self.encode(text), self.end]

    def text(self, ids: list[int]) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens=True)


def load_tokenizer(directory: Path) -> Tokenizer:
    path = directory / "tokenizer.json"
    if not path.is_file():
        fix = "check the path, or save the tokenizer with the checkpoint"
        raise InputError(f"{directory}: no tokenizer.json in it; {fix}")
    try:
        tokenizer = Tokenizer.from_file(str(path))
        tokenizer.no_truncation()  # trainers leave such settings in the file
        tokenizer.no_padding()
        return tokenizer
    except Exception as error:  # tokenizers raises nothing narrower
        raise InputError(f"{path}: not readable ({error}); save it again") from None


def find_template(directory: Path, inside, fallback: str) -> str:
    """A chat template: a file of its own, or in tokenizer_config.json, or the fallback."""
    if (directory / "chat_template.jinja").is_file():
        return read_text(directory / "chat_template.jinja")
    if isinstance(inside, list):  # several named templates
        inside = {entry["name"]: entry["template"] for entry in inside}.get("default")
    if inside:
        return inside
    if not fallback:
        fix = "--chat-template FILE.jinja, or `default` for plain User:/Assistant: turns"
        raise InputError(f"{directory}: the tokenizer has no chat template; give {fix}")
    return DEFAULT_TEMPLATE if fallback == "default" else read_text(fallback)


def compile_template(template: str, special: dict[str, str], directory: Path):
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    environment.globals.update(raise_exception=refuse, **special)
    # jinja's own escapes HTML
    environment.filters["tojson"] = partial(json.dumps, ensure_ascii=False)
    try:
        return environment.from_string(template)
    except TemplateError as error:
        problem = f"its chat template is not valid jinja: {error.message}"
        raise InputError(f"{directory}: {problem}") from None


def refuse(message):
    """raise_exception() of chat templates."""
    raise TemplateError(message)
