"""Records as users have them -> {prompt | messages} with a response, or with chosen and rejected.

| layout             | fields                                                              |
|--------------------|---------------------------------------------------------------------|
| ours, TRL's plain  | prompt, with response, completion, or chosen and rejected: texts    |
| TRL conversational | the same as lists of {role, content}; messages; chosen and rejected |
|                    | with the prompt inside                                              |
| Alpaca             | instruction, input, output; system, history                         |
| ShareGPT           | conversations of {from, value}; system; chosen, rejected            |

The assistant's last turn is the response, never a part of the prompt. Content may be a list of
parts of type text. Other fields stay as they are. A layout that contradicts itself raises
ValueError, which the reader of the file reports with the line.
"""

ROLES = {"human": "user", "gpt": "assistant", "chatgpt": "assistant", "bing": "assistant"}


def normalise(row: dict) -> dict:
    """A record in the project's own fields; ValueError where its fields contradict each other."""
    row = dict(row)
    alpaca(row)
    sharegpt(row)
    if "completion" in row and "prompt" in row:
        rename(row, "completion", "response")

    # conversations up to the response, from whichever fields have one: all must be the same
    found = []
    for field in ("prompt", "messages"):
        if isinstance(row.get(field), list) and row[field]:
            found.append(split_messages(row, turns_of(row.pop(field), field)))
    for side in ("response", "chosen", "rejected"):
        found += split_response(row, side)
    if not found:
        return row
    if any(turns != found[0] for turns in found):
        raise ValueError("its conversations differ before the response")
    prompt = row.pop("prompt", None)
    asked = [turn["content"].strip() for turn in found[0] if turn["role"] == "user"]
    if prompt is not None and str(prompt).strip() not in asked:
        raise ValueError("its prompt is not in its messages")
    return {**row, "messages": found[0]}


# ----------------------------------------------------------------------------------------- layouts


def alpaca(row: dict) -> None:
    """instruction and input -> prompt, output -> response; system and history are earlier turns."""
    if "instruction" not in row or "prompt" in row or "messages" in row:
        return
    parts = [row.pop("instruction"), row.pop("input", None)]
    row["prompt"] = "\n\n".join(str(part) for part in parts if part)
    if "output" in row:
        rename(row, "output", "response")
    earlier = system_turn(row)
    for asked, answered in row.pop("history", None) or []:
        earlier += [turn("user", asked), turn("assistant", answered)]
    if earlier:
        row["messages"] = [*earlier, turn("user", row.pop("prompt"))]


def sharegpt(row: dict) -> None:
    """conversations of {from, value} -> messages."""
    if "conversations" not in row or "prompt" in row or "messages" in row:
        return
    turns = turns_of(row.pop("conversations"), "conversations")
    row["messages"] = system_turn(row) + turns


def system_turn(row: dict) -> list[dict]:
    """The field `system` as a turn, if it has a text."""
    system = row.pop("system", "")
    return [turn("system", system)] if system else []


def split_messages(row: dict, turns: list[dict]) -> list[dict]:
    """The turns before the response. An assistant's last turn is the response, unless the record
    is a pair, whose two responses have fields of their own.
    """
    if turns[-1]["role"] != "assistant":
        return turns
    *turns, last = turns
    if "chosen" not in row and row.setdefault("response", last["content"]) != last["content"]:
        raise ValueError("'messages' ends with another response than 'response'")
    return turns


def split_response(row: dict, side: str) -> list[list[dict]]:
    """Make a text of a response that is a message or a conversation; returns what precedes it."""
    value = row.get(side)
    if not value or not isinstance(value, dict | list):
        return []
    *before, last = turns_of(value if isinstance(value, list) else [value], side)
    if last["role"] != "assistant":
        raise ValueError(f"field {side!r} must end with the assistant's turn")
    row[side] = last["content"]
    return [before] if before else []


# ----------------------------------------------------------------------------------------- turns


def turns_of(turns, field: str) -> list[dict]:
    """A list of {role, content} or {from, value} as {role, content} texts."""
    expected = f"field {field!r} is not text, nor a list of {{role, content}} texts"
    if not isinstance(turns, list) or not all(isinstance(entry, dict) for entry in turns):
        raise ValueError(expected)
    found = []
    for entry in turns:
        role = entry.get("role", entry.get("from"))
        content = text_of(entry.get("content", entry.get("value")), field)
        if not isinstance(role, str) or not isinstance(content, str):
            raise ValueError(expected)
        found.append(turn(ROLES.get(role, role), content))
    return found


def text_of(content, field: str):
    """Content as text: a list of parts of type text is joined."""
    if not isinstance(content, list):
        return content
    for part in content:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind != "text" or not isinstance(part.get("text"), str):
            raise ValueError(f"field {field!r} has a part of type {kind!r}; only text is read")
    return "".join(part["text"] for part in content)


def turn(role: str, content: str) -> dict:
    return {"role": role, "content": content}


def rename(row: dict, old: str, new: str) -> None:
    """Rename a field, unless the record has the new one as well."""
    if new in row:
        raise ValueError(f"it has both {old!r} and {new!r}")
    row[new] = row.pop(old)
