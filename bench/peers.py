"""What people would use instead of our sampler and trainer: transformers, vLLM, TRL.

bench/sampler.py and bench/trainer.py run this file with the Python of an environment that has the
peer, so it imports nothing of ours, and a peer only inside its function.
"""

import json
import os
import resource
import sys
import tempfile
import time
from pathlib import Path


def timed(work) -> float:
    """Seconds that work() takes."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def resident() -> int:
    """Bytes of memory that this process has now."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def most_resident() -> int:
    """Bytes of memory that this process had at its peak."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


# ---------------------------------------------------------------------------------- sampling


def read_rows(path: str) -> list[dict]:
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


def read_requests(path: str, count: int = 0) -> list[dict]:
    """`count` records of a file (0: all), from the start again where it has fewer."""
    rows = read_rows(path)
    return [rows[i % len(rows)] for i in range(count or len(rows))]


def turn(role: str, text: str) -> list[dict]:
    return [{"role": role, "content": text}]


def chat_texts(tokenizer, rows: list[dict]) -> list[str]:
    conversations = [turn("user", row["prompt"]) for row in rows]
    return tokenizer.apply_chat_template(conversations, tokenize=False, add_generation_prompt=True)


def run_transformers(model: str, requests: str, batch: int, count: int, **_) -> dict:
    """Static batches of similar lengths, the order that suits it best."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model, padding_side="left")
    net = AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16).eval()
    rows = sorted(read_requests(requests, count), key=lambda row: row["max_new_tokens"])

    @torch.inference_mode()
    def generate(rows: list[dict]) -> None:
        for i in range(0, len(rows), batch):
            # padded on the left; every row of a batch writes as many tokens as its longest
            group = rows[i : i + batch]
            texts = chat_texts(tokenizer, group)
            inputs = tokenizer(texts, return_tensors="pt", padding=True, add_special_tokens=False)
            tokens = max(row["max_new_tokens"] for row in group)
            net.generate(
                **inputs,
                max_new_tokens=tokens,
                min_new_tokens=tokens,
                do_sample=True,
                temperature=0.7,
                top_k=0,
                top_p=1.0,
            )

    # a short warm-up, then the measurement
    generate([{**row, "max_new_tokens": 4} for row in rows[:4]])
    return {"seconds": timed(lambda: generate(rows))}


def run_vllm(model: str, requests: str, count: int, **_) -> dict:
    """vLLM's continuous batching, on its CPU build."""
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "4")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    from vllm import LLM, SamplingParams

    # every request has a length of its own
    rows = read_requests(requests, count)
    llm = LLM(model, dtype="bfloat16", max_model_len=2048, max_num_seqs=256)
    texts = chat_texts(llm.get_tokenizer(), rows)
    params = [
        SamplingParams(
            temperature=0.7,
            max_tokens=row["max_new_tokens"],
            min_tokens=row["max_new_tokens"],
            ignore_eos=True,
        )
        for row in rows
    ]
    llm.generate(texts[:4], params[:4], use_tqdm=False)
    return {"seconds": timed(lambda: llm.generate(texts, params, use_tqdm=False))}


# ---------------------------------------------------------------------------------- training


def read_pairs(path: str, count: int, max_length: int) -> list[dict]:
    """`count` pairs of a file, from the start again where it has fewer.

    Prompts that would leave no room for a response are left out.
    """
    rows = [row for row in read_rows(path) if len(row["prompt"]) < 2 * max_length]
    return [{**rows[i % len(rows)], "id": str(i)} for i in range(count)]


def to_trl(row: dict, method: str) -> dict:
    """A pair as TRL's trainers take it."""
    prompt = turn("user", row["prompt"])
    chosen = turn("assistant", row["chosen"])
    if method == "sft":
        return {"prompt": prompt, "completion": chosen}
    return {"prompt": prompt, "chosen": chosen, "rejected": turn("assistant", row["rejected"])}


def make_trl(net, tokenizer, rows: list[dict], method: str, batch: int, max_length: int):
    """DPOTrainer or SFTTrainer; the first computes its reference log-probs when it is made."""
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

    # two micro-batches to an optimizer step, nothing saved or reported
    shared = {
        "output_dir": tempfile.mkdtemp(),
        "per_device_train_batch_size": batch // 2,
        "gradient_accumulation_steps": 2,
        "num_train_epochs": 1,
        "max_length": max_length,
        "bf16": False,
        "gradient_checkpointing": False,
        "report_to": [],
        "save_strategy": "no",
        "use_cpu": True,
        "logging_steps": 1000,
    }
    if method == "dpo":
        make = DPOTrainer
        config = DPOConfig(**shared, learning_rate=5e-7, beta=0.1, precompute_ref_log_probs=True)
    else:
        make = SFTTrainer
        config = SFTConfig(**shared, learning_rate=1e-6)
    data = Dataset.from_list([to_trl(row, method) for row in rows])
    return make(model=net, train_dataset=data, processing_class=tokenizer, args=config)


def run_trl(
    model: str, pairs: str, method: str, steps: int, batch: int, max_length: int, **_
) -> dict:
    """TRL's trainers in bf16."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    # the reference pass, then the training
    tokenizer = AutoTokenizer.from_pretrained(model)
    before = resident()
    net = AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16)
    rows = read_pairs(pairs, steps * batch, max_length)
    start = time.perf_counter()
    trainer = make_trl(net, tokenizer, rows, method, batch, max_length)
    reference = time.perf_counter() - start
    trained = trainer.train()

    # how much memory that took, and how many weights moved
    peak_gb = (most_resident() - before) / 1e9
    old = AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16)
    both = zip(net.parameters(), old.parameters(), strict=True)
    moved = sum((p != q).sum().item() for p, q in both)
    return {
        "seconds": trained.metrics["train_runtime"],
        "reference_seconds": reference,
        "peak_gb": peak_gb,
        "moved": moved / net.num_parameters(),
    }


PARTS = {"transformers": run_transformers, "vllm": run_vllm, "trl": run_trl}


if __name__ == "__main__":
    _, _, part, arguments = sys.argv
    print(json.dumps(PARTS[part](**json.loads(arguments))))
