"""PairRM (arXiv 2306.02561), the reward model of the paper's Mistral runs: --scorer DIR.

DIR has the layout of llm-blender/PairRM-hf: config.json, tokenizer.json, model.safetensors. A
DeBERTa encoder reads a prompt and two responses,

    [CLS] <|source|> x [SEP] [CLS] <|candidate1|> a [SEP] [CLS] <|candidate2|> b [SEP]

and f(source, candidate1) - f(source, candidate2), where f is a small network of the hidden states
at those tokens, is the logit of P(a is better). It depends on the order of a and b, so m is the
mean of both orders' logits in favour of a.

Scale: the scores of a and b are m and -m, as Blender.rank of llm-blender returns them with
return_scores=True. Their gap, 2 m, is what Blender.compare returns with return_logits=True.

The encoder is transformers' own: pip install transformers. It runs in fp32 whatever --dtype says,
for it has only 0.4B parameters, and bf16 would round the logits.
"""

from functools import cached_property
from pathlib import Path

import torch
import torch.nn as nn
from tokenizers import Tokenizer
from torch.nn.utils.rnn import pad_sequence

from checkpoint import load_weights
from formats.chat import load_tokenizer
from plumbing.options import RunOptions
from plumbing.ranks import DEVICE
from formats.records import messages_of
from plumbing.files import InputError, load_json
from scorers.base import Scorer

SOURCE = "<|source|>"
CANDIDATES = ("<|candidate1|>", "<|candidate2|>")
BATCH_TOKENS = 8192  # of a padded batch; attention takes 16 fp32 matrices of T x T per sequence
# llm-blender's words, spelt as the model has read them
CONVERSATION = (
    "Finish the following coversation in each i-th turn by filling in <Response i> with your "
    "response."
)


# ---------------------------------------------------------------------------------- the model


class PairRM(nn.Module):
    """An encoder and the network f, with the names that the checkpoint gives their tensors."""

    def __init__(self, encoder: nn.Module, tasks: int):
        super().__init__()
        self.config = encoder.config
        self.pretrained_model = encoder
        width = encoder.config.hidden_size
        self.head_layer = nn.Sequential(
            nn.Identity(),  # dropout in training, as is the fourth
            nn.Linear(2 * width, width),
            nn.Tanh(),
            nn.Identity(),
            nn.Linear(width, tasks),
        )

    def forward(self, tokens, mask, places):
        """Logits (B,) of P(the first response is better).

        tokens, mask (B, T); places (B, 3): where the source and both candidates open.
        """
        outputs = self.pretrained_model(input_ids=tokens, attention_mask=mask)
        rows = torch.arange(len(tokens), device=tokens.device)[:, None]
        opening = outputs.last_hidden_state[rows, places]  # (B, 3, C)
        source, first, second = opening.unbind(1)
        left = self.head_layer(torch.cat([source, first], -1))  # (B, tasks)
        right = self.head_layer(torch.cat([source, second], -1))
        return (left - right).mean(-1)


def deberta() -> tuple:
    """transformers' configuration and encoder. Raises InputError without the package."""
    try:
        from transformers import DebertaV2Config, DebertaV2Model
    except ImportError:
        problem = "PairRM's encoder, DeBERTa, is transformers' own"
        raise InputError(f"{problem}; pip install transformers") from None
    return DebertaV2Config, DebertaV2Model


def load_pairrm(directory: Path) -> PairRM:
    Config, Encoder = deberta()
    raw = load_json(directory / "config.json")
    config = Config(**raw)
    config.tied = False  # for load_weights: there is no language-model head
    model = PairRM(Encoder(config).float(), raw.get("n_tasks", 1))
    load_weights(model, directory)
    return model.to(DEVICE).eval().requires_grad_(False)


# ---------------------------------------------------------------------------------- what it reads


def source_and_candidates(row: dict, responses: list[str]) -> tuple[str, list[str]]:
    """The texts of the prompt and of both responses.

    Several turns are written as Blender.compare_conversations does: the user's in the source, the
    assistant's in both candidates. A system message opens the first turn.
    """
    system = ""
    asked = []
    answered = []
    for turn in messages_of(row):
        if turn["role"] == "system":
            system += turn["content"] + "\n\n"
        elif turn["role"] == "user":
            asked.append(system + turn["content"])
            system = ""
        else:
            answered.append(turn["content"])
    if not answered:
        return "\n\n".join(asked), responses
    source = []
    for i, text in enumerate(asked, 1):
        source.append(f"USER: {text}\nAssistant: <Response {i}>")
    candidates = []
    for response in responses:
        turns = [f"<Response {i}>: {text}" for i, text in enumerate([*answered, response], 1)]
        candidates.append("\n".join(turns))
    return CONVERSATION + "\n".join(source), candidates


def segment(tokenizer: Tokenizer, prefix: str, text: str, limit: int) -> list[int]:
    """[CLS] prefix text [SEP]; a longer text loses its end."""
    ids = tokenizer.encode(prefix + text.replace("[SEP]", " ")).ids
    return ids if len(ids) <= limit else [*ids[: limit - 1], ids[-1]]


def padded_batches(lengths: list[int]) -> list[list[int]]:
    """Indices of sequences that share a batch, the longest first."""
    batches = []
    width = 0
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        if not batches or (len(batches[-1]) + 1) * width > BATCH_TOKENS:
            batches.append([])
            width = lengths[i]
        batches[-1].append(i)
    return batches


# ---------------------------------------------------------------------------------- the scorer


class Ranker:
    """A checkpoint directory to compare with. Weights are read at first use."""

    def __init__(self, directory: Path):
        # report now what is missing
        raw = load_json(directory / "config.json")
        if "hidden_size" not in raw:
            fix = "give the same model in transformers' layout, llm-blender/PairRM-hf"
            raise InputError(f"{directory}: config.json does not describe the encoder; {fix}")
        self.directory = directory
        self.tokenizer = load_tokenizer(directory)
        for prefix in (SOURCE, *CANDIDATES):
            if self.tokenizer.token_to_id(prefix) is None:
                raise InputError(f"{directory}: tokenizer.json has no token {prefix}; add PairRM's")
        deberta()
        # tokens of each part, at most
        self.source_limit = raw.get("source_maxlength", 1224)
        self.candidate_limit = raw.get("candidate_maxlength", 412)

    @cached_property
    def network(self) -> PairRM:
        return load_pairrm(self.directory)

    def sequence(self, row: dict, responses: list[str]) -> tuple[list[int], list[int]]:
        """The token ids that compare two responses, and the places of the three prefixes."""
        source, candidates = source_and_candidates(row, responses)
        ids = segment(self.tokenizer, SOURCE, source, self.source_limit)
        places = [1]
        # what the source leaves of its share goes to the candidates
        limit = self.candidate_limit + (self.source_limit - len(ids)) // 2
        for prefix, candidate in zip(CANDIDATES, candidates, strict=True):
            places.append(len(ids) + 1)
            ids = ids + segment(self.tokenizer, prefix, candidate, limit)
        return ids, places

    @torch.no_grad()
    def logits(self, sequences: list[tuple[list[int], list[int]]]) -> list[float]:
        """The logit of each sequence, from padded batches."""
        values = [0.0] * len(sequences)
        for batch in padded_batches([len(ids) for ids, _ in sequences]):
            rows = [torch.tensor(sequences[i][0]) for i in batch]
            tokens = pad_sequence(rows, batch_first=True)  # (B, T)
            mask = pad_sequence([torch.ones_like(row) for row in rows], batch_first=True)
            places = torch.tensor([sequences[i][1] for i in batch])  # (B, 3)
            inputs = [part.to(DEVICE) for part in (tokens, mask, places)]
            for i, value in zip(batch, self.network(*inputs).tolist(), strict=True):
                values[i] = value
        return values


def pairrm(directory: str | Path, run: RunOptions) -> Scorer:
    """The comparing scorer of a directory in the layout of llm-blender/PairRM-hf, in logits."""
    ranker = Ranker(Path(directory))

    def score(rows, others):
        # two sequences for each pair, one in each order
        sequences = []
        for row, other in zip(rows, others, strict=True):
            texts = [row["response"], other["response"]]
            sequences.append(ranker.sequence(row, texts))
            sequences.append(ranker.sequence(row, texts[::-1]))
        logits = ranker.logits(sequences)

        # the mean over both orders
        orders = zip(logits[::2], logits[1::2], strict=True)
        return [(a - b) / 2 for a, b in orders]

    score.pairwise = True
    score.logits = True
    return score
