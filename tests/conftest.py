"""What every test file shares: a process group of one, tiny random checkpoints, commands to run.

from conftest import run, tiny_checkpoint, write_rows
model = tiny_checkpoint(tmp_path / "model", hidden_size=32)
code, out, err = run(["sample.py", "--model", model, "--prompts", prompts, "--out", out], nproc=2)
"""

import json
import os
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
import torch
from forked import run_forked
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from checkpoint import parse_config
from model import Model
from plumbing.files import InputError, write_jsonl
from plumbing.ranks import distributed

ROOT = Path(__file__).resolve().parents[1]
SHARED_DATA = ROOT.parent / "shared" / "data"

# the same bytes here as in a command that run() starts
torch.set_num_threads(1)

CORPUS = (
    "Every stage is a function from files to files, and a command of its own. The sampler writes "
    "the answers of a list\nof prompts, some rows at a time; a finished row takes the next prompt "
    "at once. The trainer reads the answers again."
)
SPECIALS = ("<|end|>", "<|user|>", "<|assistant|>")  # ids 0, 1, 2
TEMPLATE = """{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}<|end|>{% endfor %}\
{% if add_generation_prompt %}<|assistant|>{% endif %}"""


@pytest.fixture(scope="session", autouse=True)
def process_group():
    """A world of one, so that functions with collectives can be called from a test."""
    with distributed():
        yield


@pytest.fixture
def smollm2() -> Path:
    """A directory with SmolLM2-135M-Instruct, or a skip."""
    if "SMOLLM2" not in os.environ:
        pytest.skip("set SMOLLM2 to a directory that holds HuggingFaceTB/SmolLM2-135M-Instruct")
    return Path(os.environ["SMOLLM2"])


@pytest.fixture
def shared_data() -> Path:
    """The benchmarks' data beside the repository, or a skip."""
    if not SHARED_DATA.is_dir():
        pytest.skip(f"needs the data directory {SHARED_DATA}")
    return SHARED_DATA


@cache
def tokenizer_json(vocab_size: int = 320) -> str:
    """Byte-level BPE, so any text goes in and comes out again: 3 specials, 256 bytes, merges."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIALS),
        show_progress=False,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
    )
    tokenizer.train_from_iterator([CORPUS], trainer)
    return tokenizer.to_str()


def llama_config(**changes) -> dict:
    """A tiny Llama's config.json as transformers 4 writes it; changes win, None removes a key.

    `architectures` makes it one of another family.
    """
    raw = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": 320,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "bos_token_id": None,
        "eos_token_id": 0,
        "torch_dtype": "float32",
        **changes,
    }
    if raw["architectures"]:
        raw["model_type"] = raw["architectures"][0].partition("For")[0].lower()
    return {
        key: value for key, value in raw.items() if value is not None or key == "sliding_window"
    }


def random_model(raw: dict, seed: int = 0, std: float = 0.3) -> Model:
    """fp32 weights so large that logits differ much from token to token, and greedy text varies."""
    generator = torch.Generator().manual_seed(seed)
    model = Model(parse_config(raw))
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        parameter.data = 1 + 0.1 * noise if name.endswith("norm.weight") else std * noise
    return model.eval()


def tiny_checkpoint(
    directory: Path,
    seed: int = 0,
    std: float = 0.3,
    saved_as: torch.dtype = torch.float32,
    tokenizer: str | None = None,
    template: str | None = TEMPLATE,
    **changes,
) -> Path:
    """Write a Hugging Face checkpoint with random weights; changes go to llama_config()."""
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    raw = llama_config(**changes)
    tensors = {
        name: p.data.to(saved_as).contiguous()
        for name, p in random_model(raw, seed, std).named_parameters()
    }
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    (directory / "config.json").write_text(json.dumps(raw, indent=1))
    (directory / "tokenizer.json").write_text(tokenizer or tokenizer_json())
    settings = {"eos_token": "<|end|>", "tokenizer_class": "PreTrainedTokenizerFast"}
    if template is not None:
        settings["chat_template"] = template
    (directory / "tokenizer_config.json").write_text(json.dumps(settings))
    return directory


@pytest.fixture(scope="session")
def tiny(tmp_path_factory) -> Path:
    """One tiny checkpoint for all tests that only read it."""
    return tiny_checkpoint(tmp_path_factory.mktemp("tiny") / "model")


def write_rows(path: Path, rows: list[dict]) -> Path:
    write_jsonl(path, rows)
    return Path(path)


def read_rows(path: Path) -> list[dict]:
    """All records of a file; not splitlines(), which also cuts at U+2028 and its like."""
    return [json.loads(line) for line in Path(path).read_text().removesuffix("\n").split("\n")]


def command_line(args: list, nproc: int = 1) -> list[str]:
    """The arguments of a process: args[0] is a file of the project, by its name, or -m."""
    file, *options = map(str, args)
    torchrun = (
        ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(nproc)]
        if nproc > 1
        else []
    )
    return [sys.executable, *torchrun, file if file == "-m" else str(ROOT / file), *options]


def run(
    args: list, env: dict | None = None, nproc: int = 1, timeout: float = 600
) -> tuple[int, str, str]:
    """Run a command of the project to its end: (return code, standard output, standard error).

    A fork of a process that has imported torch; where torch itself must see the environment, or
    torchrun is what is tested, a process of its own (`run_process`).
    """
    file, *options = args
    command = ["-m", *options] if file == "-m" else [ROOT / file, *options]
    return run_forked(command, environment(env), ROOT, nproc, timeout)


def run_process(
    args: list, env: dict | None = None, nproc: int = 1, timeout: float = 600
) -> tuple[int, str, str]:
    """As run(), in a new process, under the real torchrun where nproc is above 1."""
    done = subprocess.run(
        command_line(args, nproc),
        capture_output=True,
        text=True,
        timeout=timeout,
        cwd=ROOT,
        env=environment(env),
    )
    return done.returncode, done.stdout, done.stderr


def environment(more: dict | None) -> dict:
    return {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", **(more or {})}


def flip_a_bit(file: Path, place: int = -3) -> None:
    """Damage a file under its old size and time."""
    times = file.stat().st_atime_ns, file.stat().st_mtime_ns
    content = bytearray(file.read_bytes())
    content[place] ^= 1
    file.write_bytes(content)
    os.utime(file, ns=times)


def last_json(out: str) -> dict:
    """The result of a command: the last line of its standard output."""
    return json.loads(out.splitlines()[-1])


def refusal(function, *args, **kw) -> str:
    """The one line of the InputError that a call raises."""
    with pytest.raises(InputError) as caught:
        function(*args, **kw)
    assert "\n" not in str(caught.value)
    return str(caught.value)
