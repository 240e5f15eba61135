"""Chat templates of Hugging Face checkpoints, rendered as transformers renders them."""

import json
import re
from collections.abc import Callable
from datetime import datetime

import jinja2
from jinja2.ext import Extension, loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

from formats.limits import Limits, TooMuchWork

# Today, for templates that ask and have no default of their own: a run can then be repeated.
FIXED_DAY = "2024-07-26"
MAX_BITS = 1000  # of a product or power of whole numbers


class Generation(Extension):
    """{% generation %} ... {% endgeneration %}: training tools find responses by it; no text."""

    tags = frozenset(("generation",))

    def parse(self, parser):
        line = next(parser.stream).lineno
        body = parser.parse_statements(["name:endgeneration"], drop_needle=True)
        return jinja2.nodes.Scope(body).set_lineno(line)


class Sandbox(ImmutableSandboxedEnvironment):
    """Refuses products and powers of large numbers, which no signal interrupts."""

    intercepted_binops = frozenset(("*", "**"))

    def call_binop(self, context, operator, left, right):
        if isinstance(left, int) and isinstance(right, int):
            bits = left.bit_length() * (right if operator == "**" else 1) + right.bit_length()
            if bits > MAX_BITS:
                raise TooMuchWork(f"a number of {bits} bits")
        return super().call_binop(context, operator, left, right)


def compile_template(template: str, variables: dict, day: str = "") -> Callable[..., str]:
    """The function (messages, whether the response follows) -> text of a template.

    variables: what it can read beside them, such as bos_token. day: what strftime_now takes for
    today, YYYY-MM-DD; "": the template's own default if it has one, else FIXED_DAY. Raises
    jinja2.TemplateError, here and when it is rendered, and ValueError if day is no date.
    """
    environment = Sandbox(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols]
    )
    environment.filters["tojson"] = to_json  # jinja's own escapes HTML
    environment.globals["raise_exception"] = refuse
    if today := today_of(template, day):
        environment.globals["strftime_now"] = datetime.fromisoformat(today).strftime
    del environment.globals["lipsum"]
    with Limits():  # parts without a variable are computed here
        compiled = environment.from_string(template)

    def render(messages: list[dict], open_response: bool) -> str:
        given = {"tools": None, "documents": None, **variables}
        with Limits():
            return compiled.render(messages=messages, add_generation_prompt=open_response, **given)

    return render


def today_of(template: str, day: str = "") -> str:
    """What a template takes for today; "" if it does not ask, or has a default of its own."""
    has_default = re.search(r"strftime_now\s+is\s+(not\s+)?(un)?defined", template)
    if "strftime_now" not in template or (has_default and not day):
        return ""
    return day or FIXED_DAY


def to_json(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False) -> str:
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )


def refuse(message: str):
    """raise_exception() of chat templates."""
    raise jinja2.TemplateError(message)
