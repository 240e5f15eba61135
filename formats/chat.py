"""Chat: the tokenizer and chat template of a checkpoint directory; text to token ids and back."""

import json
import sys
from functools import cache
from pathlib import Path

from tokenizers import Tokenizer

from formats.chat_template import compile_template, today_of
from formats.records import messages_of, where_of
from plumbing.files import InputError, load_json, read_text
from plumbing.options import RunOptions
from plumbing.ranks import print0

DEFAULT_TEMPLATE = (
    "{% for m in messages %}"
    "{{ {'system': 'System', 'user': 'User', 'assistant': 'Assistant'}[m['role']] }}: "
    "{{ m['content'] }}{% if m['role'] == 'assistant' %}{{ eos_token }}{% endif %}{{ '\\n\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}Assistant: {% endif %}"
)
SPECIAL_TOKENS = "bos_token eos_token unk_token sep_token pad_token cls_token mask_token".split()
DEFAULTS = RunOptions()
# conversations to render, to see what a template writes around a response
QUESTION = [{"role": "user", "content": "?"}]
ANSWERED = [*QUESTION, {"role": "assistant", "content": "ANSWER"}]


class Chat:
    """Prompt and response are tokenised apart and their ids concatenated: the boundary never moves.

    No BOS is added to what the template writes. `end` is the token that ends a response,
    `stop_token_ids` are all that may end one, `max_positions` limits both together.
    """

    def __init__(
        self, directory: str | Path, run: RunOptions = DEFAULTS, own_template: bool = False
    ):
        """run: its chat_template replaces the directory's own, unless own_template.

        Raises InputError without tokenizer or template.
        """
        self.directory = Path(directory)
        self.tokenizer = load_tokenizer(self.directory)
        config = self.settings("config.json")
        self.vocab_size = config.get("vocab_size", sys.maxsize)
        self.max_positions = config.get("max_position_embeddings", sys.maxsize)
        settings = self.settings("tokenizer_config.json")
        if "added_tokens_decoder" not in settings:  # as transformers does
            settings |= self.settings("special_tokens_map.json")
        self.special = {}
        for name in SPECIAL_TOKENS:
            if value := settings.get(name):
                value = value.get("content") if isinstance(value, dict) else value
                if not isinstance(value, str) or value != value.encode(errors="ignore").decode():
                    problem = f"{name} must be text, or {{content: text}}"
                    raise InputError(f"{self.directory}: {problem}; correct tokenizer_config.json")
                self.special[name] = value
        own = own_templates(self.directory, settings.get("chat_template"))
        self.template = choose_template(self.directory, own, run.chat_template, own_template)
        self.write = self.compile(run)
        self.find_end(self.special.get("eos_token"))
        self.find_opening()

    def settings(self, name: str) -> dict:
        path = self.directory / name
        values = load_json(path) if path.is_file() else {}
        if not isinstance(values, dict):
            raise InputError(f"{path}: not an object, {{...}}; download it again")
        return values

    def compile(self, run: RunOptions):
        """The template as a function from messages to text."""
        try:
            arguments = json.loads(run.chat_template_args or "{}")
            variables = {**self.special, **arguments}
        except (ValueError, TypeError):
            problem = f"{run.chat_template_args}: not a JSON object"
            raise InputError(f'--chat-template-args {problem}, such as {{"a": 1}}') from None
        day = run.chat_template_date
        try:
            write = compile_template(self.template, variables, day)
        except ValueError as error:
            raise InputError(f"--chat-template-date {day}: {error}; write YYYY-MM-DD") from None
        except Exception as error:  # templates are users' code
            problem = f"its chat template is not valid jinja: {error}"
            raise InputError(f"{self.directory}: {problem}") from None
        if "strftime_now" in self.template:
            today = today_of(self.template, day) or "its default day"
            say(f"chat template: today is {today} (--chat-template-date DAY sets another)")
        return write

    def find_end(self, eos_token: str | None) -> None:
        """Set `end` and `stop_token_ids`.

        The end of a turn is what the template writes after a response, often not eos_token.
        """
        stops = {self.tokenizer.token_to_id(eos_token)} - {None} if eos_token else set()
        for name in ("config.json", "generation_config.json"):
            ids = self.settings(name).get("eos_token_id")
            if ids is not None:
                stops |= set(ids) if isinstance(ids, list) else {ids}

        # render a response and look at the first token after it
        rest = self.render(ANSWERED, False).rpartition("ANSWER")[2].lstrip()
        known = stops | self.tokenizer.get_added_tokens_decoder().keys()
        ends = [token for token in self.encode(rest)[:1] if token in known]
        if not stops and not ends:
            where = "config.json or tokenizer_config.json"
            raise InputError(f"{self.directory}: no end-of-sequence token in {where}; add one")
        self.end = ends[0] if ends else min(stops)
        self.stop_token_ids = stops | {self.end}
        self.end_text = self.tokenizer.id_to_token(self.end) or ""

    def find_opening(self) -> None:
        """Set `opening`, a prompt before which a response is tokenised; "" for on its own.

        SentencePiece puts a mark before every text (Llama 2, Mistral). Inside a conversation a
        response has none, or the space that the template writes before it.
        """
        self.opening = self.lead = ""
        if self.tokenizer.encode("a", add_special_tokens=False).tokens[0].startswith("▁"):
            before, found, _ = self.render(ANSWERED, False).partition("ANSWER")
            prompt = self.render(QUESTION, True)
            if found and before.startswith(prompt):
                self.opening, self.lead = prompt, before.removeprefix(prompt)

    def encode(self, text: str) -> list[int]:
        """Token ids, of special tokens too; InputError for one that the model does not have."""
        ids = self.tokenizer.encode(text, add_special_tokens=False).ids
        if max(ids, default=0) >= self.vocab_size:
            beyond = {self.tokenizer.id_to_token(i) for i in ids if i >= self.vocab_size}
            problem = f"tokens {sorted(beyond)} have no embedding (vocab_size {self.vocab_size})"
            raise InputError(f"{self.directory}: {problem}; resize the embeddings, or use others")
        return ids

    def render(self, messages: list[dict], open_response: bool, where: str = "") -> str:
        """A conversation as text. InputError, with `where`, if the template refuses it."""
        try:
            text = self.write(messages, open_response)
            text.encode()  # half of a surrogate pair is no text
            return text
        except Exception as error:  # templates are users' code
            problem = f"the chat template of {self.directory} refuses it: {error}"
            raise InputError(f"{where or 'a conversation'}: {problem}") from None

    def longest(self, max_length: int) -> int:
        """max_length, or the model's positions where it has fewer."""
        if max_length > self.max_positions:
            say(f"--max-length {max_length}: {self.max_positions}, the positions of the model")
        return min(max_length, self.max_positions)

    def prompt_ids(self, row: dict) -> list[int]:
        """A record's conversation and the opening of the response."""
        return self.encode(self.render(messages_of(row), True, where_of(row)))

    def text_ids(self, text: str) -> list[int]:
        """A response, or its beginning, with the tokens that it has in a conversation."""
        if self.opening:
            before = self.encode(self.opening)
            ids = self.encode(self.opening + self.lead + text)
            if ids[: len(before)] == before:
                return ids[len(before) :]
        return self.encode(text)

    def response_ids(self, text: str) -> list[int]:
        """A response and its end token, which the text may have already."""
        if self.end_text and text.rstrip().endswith(self.end_text):
            text = text.rstrip().removesuffix(self.end_text)
        return [*self.text_ids(text), self.end]

    def text(self, ids: list[int]) -> str:
        """Text without special tokens, and without those that end a response."""
        return self.tokenizer.decode([i for i in ids if i not in self.stop_token_ids])

    def raw_text(self, ids: list[int]) -> str:
        """Text with all tokens, special ones too."""
        return self.tokenizer.decode(ids, skip_special_tokens=False)


def load_tokenizer(directory: Path) -> Tokenizer:
    path = directory / "tokenizer.json"
    if not path.is_file():
        raise InputError(
            f"{directory}: no tokenizer.json in it; check the path, or save the tokenizer with the "
            "checkpoint"
        )
    try:
        tokenizer = Tokenizer.from_file(str(path))
        tokenizer.no_truncation()  # trainers leave such settings in the file
        tokenizer.no_padding()
        return tokenizer
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # a panic of tokenizers is no Exception
        raise InputError(f"{path}: not readable ({error}); save it again") from None


# --------------------------------------------------------------------------------------- templates


def own_templates(directory: Path, inside) -> dict[str, str]:
    """A directory's templates by name: in files of their own, or in tokenizer_config.json."""
    try:
        named = inside if isinstance(inside, list) else [{"name": "default", "template": inside}]
        found = {entry["name"]: entry["template"] for entry in named if entry["template"]}
        if not all(isinstance(text, str) for text in (*found, *found.values())):
            raise TypeError
    except (TypeError, KeyError):
        problem = "chat_template must be text, or a list of {name, template}"
        raise InputError(f"{directory}/tokenizer_config.json: {problem}; correct it") from None
    if (directory / "chat_template.jinja").is_file():
        found["default"] = read_text(directory / "chat_template.jinja")
    for path in sorted(directory.glob("additional_chat_templates/*.jinja")):
        found[path.stem] = read_text(path)
    return found


def choose_template(directory: Path, own: dict[str, str], given: str, own_template: bool) -> str:
    """The template of a name or file, the directory's own, or, for "default", a plain one."""
    if given in own:
        return own[given]
    if given not in ("", "default") and not (own_template and "default" in own):
        if not Path(given).is_file() and own:
            names = ", ".join(own)
            problem = f"no such file, and no template of {directory}, which has {names}"
            raise InputError(f"--chat-template {given}: {problem}")
        if "default" in own:
            say(f"chat template: {given}, in place of that of {directory}")
        return read_text(given)
    if "default" in own:
        return own["default"]
    if own:
        problem = f"its chat templates are {', '.join(own)}, none is the default"
        raise InputError(f"{directory}: {problem}; --chat-template NAME picks one")
    if not given:
        fix = "--chat-template FILE.jinja, or `default` for plain User:/Assistant: turns"
        raise InputError(f"{directory}: the tokenizer has no chat template; give {fix}")
    return DEFAULT_TEMPLATE


@cache
def say(text: str) -> None:
    """Print a line once."""
    print0(f"  {text}")
