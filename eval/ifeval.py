"""IFEval: how often a model's answers keep to instructions that a program can check ("no commas", "at least 300 words").

Four numbers: of prompts all of whose instructions are kept, and of single instructions, each strictly or loosely (an answer
may first be freed of asterisks and of its first or last line). score is the strictest, the share of prompts with all kept as
written; se is its standard error. The checkers are those of lm-evaluation-harness, with the language detector's seed fixed, so
that the same answers always score the same. Greedy answers of at most 1,280 tokens, as there, through the chat template.

input_data.jsonl {key, prompt, instruction_id_list, kwargs} -> OUT/answers.jsonl, OUT/scores.jsonl

    python -m eval.ifeval --model DIR --data input_data.jsonl
    torchrun --nproc-per-node 8 -m eval.ifeval --model DIR --data input_data.jsonl

The file is in the repository google-research/google-research, under instruction_following_eval/data. Two checkers cut text into
sentences and words with NLTK's punkt_tab (`python -m nltk.downloader punkt_tab`); --nltk-data or NLTK_DATA says where it lies.
"""

from collections import defaultdict
from contextlib import contextmanager
from dataclasses import dataclass

from data import Common, InputError, command, on_first, read_jsonl, say, stage, write_jsonl
from eval.answers import answer, first, place
from eval.optional import optional, own_luck
from eval.report import table
from eval.stats import mean, standard_error
from sample import SampleOptions

NEEDS = ("data",)  # what a run of loop.py must give in --eval-options
METRICS = {
    "score": "prompt_level_strict_acc",
    "prompt_loose": "prompt_level_loose_acc",
    "instruction_strict": "inst_level_strict_acc",
    "instruction_loose": "inst_level_loose_acc",
}


@dataclass(kw_only=True)
class Options(SampleOptions, Common):
    model: str  # checkpoint directory
    data: str = ""  # IFEval's input_data.jsonl
    out: str = ""  # directory to write; MODEL/eval/ifeval unless given
    limit: int = 0  # answer the first so many prompts; 0 is all
    nltk_data: str = (
        ""  # directory of NLTK's data, with tokenizers/punkt_tab; NLTK_DATA unless given
    )
    temperature: float = 0.0  # 0 is greedy
    max_new_tokens: int = 1280  # limit per answer


def read_prompts(path: str, limit: int) -> list[dict]:
    """Records with `id`, `prompt`, `instruction_id_list` and `kwargs`, as many of each of the last two."""
    if not path:
        raise InputError(
            "--data is missing: give IFEval's input_data.jsonl; --help says where it is"
        )
    rows = read_jsonl(path, "prompt")
    for number, row in enumerate(rows, 1):
        names, values = row.get("instruction_id_list"), row.get("kwargs")
        if not (
            isinstance(names, list)
            and isinstance(values, list)
            and 0 < len(names) == len(values)
            and "key" in row
        ):
            raise InputError(
                f"{path}: line {number}: fields 'key', 'instruction_id_list' and 'kwargs' must be there, the "
                "lists equally long; give IFEval's own input_data.jsonl"
            )
    return [{**row, "id": str(row["key"])} for row in first(rows, limit)]


@contextmanager
def checkers(nltk_data: str = ""):
    """lm_eval's process_results(doc, [answer]), made to give the same for the same answer; nothing of that is left behind."""
    nltk, langdetect = optional("nltk"), optional("langdetect")
    path, seed = [*nltk.data.path], langdetect.DetectorFactory.seed
    nltk.data.path[:0] = [nltk_data] if nltk_data else []
    langdetect.DetectorFactory.seed = 0
    try:
        try:
            nltk.data.find("tokenizers/punkt_tab")  # or lm_eval would download it
        except LookupError:
            raise InputError(
                "NLTK's punkt_tab is not to be found: python -m nltk.downloader punkt_tab, or --nltk-data DIR "
                "where DIR/tokenizers/punkt_tab lies"
            ) from None
        with own_luck():  # a checker without arguments draws some
            yield optional("lm_eval.tasks.ifeval.utils").process_results
    finally:
        nltk.data.path[:], langdetect.DetectorFactory.seed = path, seed


def check(prompts: list[dict], answers: list[dict], nltk_data: str = "") -> list[dict]:
    """{id, instructions, and the four metrics: a bool for a prompt, a list of them for its instructions} for each answer."""
    with checkers(nltk_data) as process:
        return [
            {
                "id": row["id"],
                "instructions": row["instruction_id_list"],
                **process(row, [answer["response"]]),
            }
            for row, answer in zip(prompts, answers, strict=True)
        ]


def summary(scores: list[dict]) -> dict:
    """The four metrics and the standard error of the first."""
    flat = lambda values: [
        float(v) for value in values for v in (value if isinstance(value, list) else [value])
    ]  # noqa: E731
    values = {name: flat([row[metric] for row in scores]) for name, metric in METRICS.items()}
    return {
        "score": mean(values["score"]),
        "se": standard_error(values["score"]),
        **{name: mean(values[name]) for name in values if name != "score"},
        "prompts": len(scores),
        "instructions": len(values["instruction_strict"]),
    }


def by_kind(scores: list[dict]) -> list[dict]:
    """Rows of a table: instructions kept, by kind (the part of a name before the colon)."""
    kinds = defaultdict(list)
    for row in scores:
        for name, strict, loose in zip(
            row["instructions"],
            row[METRICS["instruction_strict"]],
            row[METRICS["instruction_loose"]],
            strict=True,
        ):
            kinds[name.partition(":")[0]].append((float(strict), float(loose)))
    return [
        {
            "instructions": kind,
            "number": len(kept),
            "strict": mean([strict for strict, _ in kept]),
            "loose": mean([loose for _, loose in kept]),
        }
        for kind, kept in sorted(kinds.items())
    ]


def main(o: Options) -> dict:
    out = place(o, "ifeval")
    prompts = on_first(read_prompts, o.data, o.limit)
    on_first(
        check, [], [], o.nltk_data
    )  # what is not installed is said before answers are paid for
    asked = [{"id": row["id"], "prompt": row["prompt"]} for row in prompts]
    answer(o, asked, o.data, out / "answers.jsonl", purpose="ifeval")

    def work():
        def count():
            scores = check(prompts, read_jsonl(out / "answers.jsonl", "prompt"), o.nltk_data)
            write_jsonl(out / "scores.jsonl", scores)
            return {name: round(value, 4) for name, value in summary(scores).items()}

        return on_first(count)

    result = stage(
        out / "scores.jsonl",
        {"answers": out / "answers.jsonl", "data": o.data},
        {"limit": o.limit},
        work,
    )
    say(table(by_kind(on_first(read_jsonl, out / "scores.jsonl"))))
    result = {name: value for name, value in result.items() if name != "seconds"}
    say(table([{name: result[name] for name in ("score", "se", *list(METRICS)[1:])}]))
    return result


if __name__ == "__main__":
    command(main, Options)
