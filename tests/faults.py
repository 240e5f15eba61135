"""Planted faults: does the test suite notice them?

Each is a small patch of one file. It is applied to a temporary copy of the tree, where the tests
named with it then run until one fails. That test must pass on a copy without the fault.

    python -m tests.faults                      all of them
    python -m tests.faults dpo-sign drop-tail   some, by name

One line a fault, and a JSON object last; the exit code is 1 if one was not caught.
"""

import json
import os
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

ROOT = Path(__file__).resolve().parents[1]
NOT_COPIED = (".git", ".venv*", ".*_cache", ".smollm2*", "__pycache__", "runs")
MINUTES = 15  # for the tests of one fault; a fault that makes them hang is not caught


@dataclass(frozen=True)
class Fault:
    """A patch, and tests of which at least one must fail, as pytest takes them inside tests/."""

    name: str
    file: str
    old: str  # stands in the file exactly once
    new: str
    tests: tuple[str, ...]

    def patched(self, root: Path) -> str:
        """The file's text with the fault."""
        text = (root / self.file).read_text("utf-8")
        found = text.count(self.old)
        if found != 1 or self.old == self.new:
            raise ValueError(f"{self.name}: {self.old!r} stands {found} times in {self.file}")
        return text.replace(self.old, self.new)


FAULTS = [
    # model.py and ops/: the computation
    Fault(
        "rope-pairs",
        "model.py",
        old="a, b = x.float().chunk(2, dim=-1)",
        new="a, b = x.float().unflatten(-1, (-1, 2)).unbind(-1)",
        tests=("core/test_model.py::test_logits_equal_transformers",),
    ),
    Fault(
        "rope-llama3-ignored",
        "model.py",
        old='if rope["rope_type"] == "llama3":',
        new='if rope["rope_type"] == "none":',
        tests=("core/test_model.py::test_logits_equal_transformers",),
    ),
    Fault(
        "rope-gradient",
        "ops/cpu.py",
        old="RoPE.rotate(dout.contiguous(), cos, sin, -1.0)",
        new="RoPE.rotate(dout.contiguous(), cos, sin, 1.0)",
        tests=("core/test_ops.py::test_apply_rope_also_inside_wider_rows",),
    ),
    Fault(
        "norm-eps-outside",
        "model.py",
        old="torch.rsqrt(x32.pow(2).mean(-1, keepdim=True) + eps)",
        new="(x32.pow(2).mean(-1, keepdim=True).sqrt() + eps).reciprocal()",
        tests=("core/test_model.py::test_epsilon_stands_under_the_root",),
    ),
    Fault(
        "gqa-heads",
        "ops/attention.py",
        old="q = q.view(B, Hkv, H // Hkv, D)",
        new="q = q.view(B, H // Hkv, Hkv, D).transpose(1, 2)",
        tests=("core/test_model.py::test_cached_decoding_equals_packed_with_stale_and_moved_rows",),
    ),
    Fault(
        "window-off-by-one",
        "ops/attention.py",
        old="everything.tril().triu(1 - window)",
        new="everything.tril().triu(-window)",
        tests=("core/test_model.py::test_logits_equal_transformers",),
    ),
    Fault(
        "stale-column",
        "ops/attention.py",
        old="mask = columns <= lengths[:, None]",
        new="mask = columns <= lengths[:, None] + 1",
        tests=("core/test_model.py::test_cached_decoding_equals_packed_with_stale_and_moved_rows",),
    ),
    Fault(
        "qk-norm-dropped",
        "model.py",
        old="q = self.q_norm(q.unflatten(-1, (-1, D)))",
        new="q = q.unflatten(-1, (-1, D))",
        tests=("core/test_families.py::test_logits_equal_transformers",),
    ),
    Fault(
        "qk-norm-after-rope",
        "model.py",
        old="""        k = self.k_norm(k.unflatten(-1, (-1, D)))  # (N, Hkv, D)
        q = apply_rope(q, cos, sin)
        k = apply_rope(k, cos, sin)
""",
        new="""        k = k.unflatten(-1, (-1, D))
        q = apply_rope(q, cos, sin)
        k = self.k_norm(apply_rope(k, cos, sin))
""",
        tests=("core/test_families.py::test_logits_equal_transformers",),
    ),
    Fault(
        "v-bias-dropped",
        "model.py",
        old="self.v_proj = Linear(C, key_value_width, config.qkv_bias)",
        new="self.v_proj = Linear(C, key_value_width)",
        tests=("core/test_families.py::test_logits_equal_transformers",),
    ),
    Fault(
        "packed-bias-dropped",
        "ops/pack.py",
        old="PackedLinear(torch.cat(weights), bias)",
        new="PackedLinear(torch.cat(weights))",
        tests=("core/test_ops.py::test_packed_model_computes_the_same_in_the_same_memory",),
    ),
    Fault(
        "head-norm-gradient",
        "ops/cpu.py",
        old="        N = x.numel() // C\n        dx = torch.empty_like(x)",
        new="        N = len(x)\n        dx = torch.zeros_like(x)",
        tests=("core/test_ops.py::test_rms_norm_of_every_head_also_inside_wider_rows",),
    ),
    Fault(
        "move-row-short",
        "ops/attention.py",
        old="x[:, target, :tokens] = x[:, source, :tokens]",
        new="x[:, target, : tokens - 2] = x[:, source, : tokens - 2]",
        tests=("core/test_sample.py::test_engine_equals_plain_forward",),
    ),
    Fault(
        "chunk-gradient",
        "ops/logps.py",
        old="dweight.addmm_(dlogits.T, x[rows])",
        new="dweight = dlogits.T @ x[rows]",
        tests=("core/test_ops.py::test_token_logps_in_chunks_equal_log_softmax_with_gradients",),
    ),
    Fault(
        "c-norm-eps-outside",
        "ops/cpu.c",
        old="1 / sqrtf(sum(squares + more) / C + eps)",
        new="1 / (sqrtf(sum(squares + more) / C) + eps)",
        tests=("core/test_model.py::test_logits_equal_transformers",),
    ),
    Fault(
        "decode-window",
        "ops/attention.py",
        old="mask &= columns > lengths[:, None] - window",
        new="mask &= columns >= lengths[:, None] - window",
        tests=("core/test_model.py::test_cached_decoding_equals_packed_with_stale_and_moved_rows",),
    ),
    Fault(
        "c-window",
        "ops/cpu.c",
        old="n > window ? n - window : 0, n, stride",
        new="n > window ? n - window - 1 : 0, n, stride",
        tests=("core/test_ops.py::test_cached_attention",),
    ),
    Fault(
        "c-attention-tail",
        "ops/cpu.c",
        old="for (int t = size; t < LANES; t++) score[g][t] = -INFINITY;",
        new="for (int t = size + 1; t < LANES; t++) score[g][t] = -INFINITY;",
        tests=("core/test_ops.py::test_cached_attention",),
    ),
    Fault(
        "c-vocabulary-tail",
        "ops/cpu.c",
        old="for (int l = left > 0 ? left : 0; l < LANES; l++)",
        new="for (int l = left > 0 ? left + 1 : 0; l < LANES; l++)",
        tests=(
            "core/test_ops.py::test_sample_token_stays_inside_the_vocabulary_whatever_the_logits",
        ),
    ),
    # sample.py: drawing and the engine
    Fault(
        "uniform-position",
        "sample.py",
        old="x = seeds + (positions + 1) *",
        new="x = seeds + positions *",
        tests=("core/test_sample.py::test_uniform_is_splitmix64",),
    ),
    Fault(
        "token-boundary",
        "sample.py",
        old="torch.searchsorted(ends, target, right=True)",
        new="torch.searchsorted(ends, target, right=False)",
        tests=("core/test_sample.py::test_no_number_draws_a_token_of_probability_zero",),
    ),
    Fault(
        "temperature-ignored",
        "sample.py",
        old="logits = logits.float() / temperature",
        new="logits = logits.float()",
        tests=("core/test_sample.py::test_frequencies_are_those_of_softmax",),
    ),
    Fault(
        "top-p-off-by-one",
        "sample.py",
        old="before = ordered.cumsum(-1) - ordered",
        new="before = ordered.cumsum(-1)",
        tests=("core/test_sample.py::test_top_p_draws_from_the_nucleus_only",),
    ),
    Fault(
        "decode-position",
        "sample.py",
        old="cached = [len(r.ids) + len(r.output) - 1 for r in rows]",
        new="cached = [len(r.ids) + len(r.output) for r in rows]",
        tests=("core/test_sample.py::test_engine_equals_plain_forward",),
    ),
    Fault(
        "refill-loses-request",
        "sample.py",
        old="if tokens and tokens + len(queue[0].ids) > self.o.prefill_tokens:\n",
        new=(
            "if tokens and tokens + len(queue[0].ids) > self.o.prefill_tokens:\n"
            "                queue.popleft()\n"
        ),
        tests=("core/test_sample.py::test_text_does_not_depend_on_slots_or_chunks",),
    ),
    Fault(
        "stop-at-the-limit",
        "sample.py",
        old="elif len(r.output) == r.max_new_tokens:\n",
        new="if len(r.output) == r.max_new_tokens:\n",
        tests=("core/test_sample.py::test_stop_text_ends_the_response",),
    ),
    Fault(
        "end-token-in-text",
        "formats/chat.py",
        old="self.tokenizer.decode([i for i in ids if i not in self.stop_token_ids])",
        new="self.tokenizer.decode(ids, skip_special_tokens=False)",
        tests=("core/test_sample.py::test_stop_text_ends_the_response",),
    ),
    Fault(
        "special-stop-unseen",
        "sample.py",
        old="stop in self.chat.raw_text(r.output[",
        new="stop in self.chat.text(r.output[",
        tests=("core/test_sample.py::test_stop_text_ends_the_response",),
    ),
    Fault(
        "samples-alike",
        "sample.py",
        old='seed_of(o.run.seed, purpose, row["id"], row.get("sample", 0))',
        new='seed_of(o.run.seed, purpose, row["id"])',
        tests=("core/test_sample.py::test_samples_of_a_prompt_differ_from_their_first_token_on",),
    ),
    Fault(
        "chunk-order",
        "sample.py",
        old="on_rank0(merge, rows, list(parts.values()), out)",
        new="on_rank0(merge, rows, sorted(parts.values()), out)",
        tests=("core/test_sample.py::test_text_does_not_depend_on_slots_or_chunks",),
    ),
    Fault(
        "positions-overrun",
        "sample.py",
        old="min(limit, chat.max_positions - len(ids))",
        new="min(limit, chat.max_positions)",
        tests=("core/test_sample.py::test_limit_shrinks_to_the_positions_that_are_left",),
    ),
    # train.py: what is scored, steps, resuming
    Fault(
        "mask-shifted",
        "train.py",
        old="range(offset + start - 1, offset + len(ids) - 1)",
        new="range(offset + start - 2, offset + len(ids) - 2)",
        tests=("core/test_train.py::test_scored_tokens_are_the_response_and_its_end",),
    ),
    Fault(
        "prompt-trained",
        "train.py",
        old="return ids, 1 if o.loss_on_prompt else len(prompt)",
        new="return ids, 1",
        tests=("core/test_train.py::test_scored_tokens_are_the_response_and_its_end",),
    ),
    Fault(
        "mean-per-example",
        "train.py",
        old="weight=len(ids) - start))",
        new="weight=1))",
        tests=("core/test_train.py::test_steps_equal_plain_torch_on_a_transformers_model",),
    ),
    Fault(
        "end-not-trained",
        "formats/chat.py",
        old="return [*self.text_ids(text), self.end]",
        new="return self.text_ids(text)",
        tests=("core/test_train.py::test_scored_tokens_are_the_response_and_its_end",),
    ),
    Fault(
        "mean-per-micro-batch",
        "train.py",
        old="(loss * WORLD / total).backward()",
        new="(loss * WORLD / max(1, sum(e.weight for e in mine))).backward()",
        tests=("core/test_train.py::test_micro_batches_change_no_result",),
    ),
    Fault(
        "mean-per-rank",
        "train.py",
        old="(loss * WORLD / total).backward()",
        new="(loss / total).backward()",
        tests=("core/test_train.py::test_many_processes_equal_one",),
    ),
    Fault(
        "drop-tail",
        "train.py",
        old="for i in range(0, len(order), o.batch)]",
        new="for i in range(0, len(order) - o.batch + 1, o.batch)]",
        tests=("core/test_train.py::test_batches_hold_every_example_once_an_epoch",),
    ),
    Fault(
        "warmup-off-by-one",
        "train.py",
        old="return (step + 1) / rise",
        new="return step / rise",
        tests=("core/test_train.py::test_learning_rate_rises_then_falls_as_a_cosine",),
    ),
    Fault(
        "bf16-masters",
        "train.py",
        old="model = Model(load_config(start))",
        new="model = Model(load_config(start)).to(o.run.torch_dtype)",
        tests=("core/test_train.py::test_bf16_computes_on_fp32_masters_that_move_at_lr_1e_6",),
    ),
    Fault(
        "resume-repeats-a-step",
        "train.py",
        old="first = resume(stage.scratch, model, optimizer)",
        new="first = max(0, resume(stage.scratch, model, optimizer) - 1)",
        tests=("core/test_train.py::test_a_resumed_run_equals_an_uninterrupted_one",),
    ),
    Fault(
        "moments-lost",
        "train.py",
        old=('saved = {"model": weights, "optimizer": moments}\n    dcp.load'),
        new=('saved = {"model": weights}\n    dcp.load'),
        tests=("core/test_train.py::test_a_resumed_run_equals_an_uninterrupted_one",),
    ),
    Fault(
        "template-not-saved",
        "train.py",
        old="template = Chat(start, o.run).template",
        new="template = Chat(start).template",
        tests=("core/test_train.py::test_a_template_given_by_an_option_is_saved",),
    ),
    # checkpoint.py
    Fault(
        "index-left-over",
        "checkpoint.py",
        old="(out / INDEX).unlink(missing_ok=True)",
        new="pass",
        tests=("core/test_checkpoint.py::test_saving_again_in_one_file_leaves_no_old_index",),
    ),
    Fault(
        "shard-rows",
        "checkpoint.py",
        old="chunk = -(-rows // mesh.size(dimension))",
        new="chunk = rows // mesh.size(dimension)",
        tests=("core/test_checkpoint.py::test_each_rank_reads_its_own_rows_only",),
    ),
    Fault(
        "window-of-some-layers",
        "formats/config_json.py",
        old="if len(kinds) > 1:",
        new="if len(kinds) > 2:",
        tests=("core/test_families.py::test_what_is_not_computed_is_refused_by_name",),
    ),
    Fault(
        "window-always-on",
        "formats/config_json.py",
        old='"use_sliding_window": family.use_sliding_window[0], **family',
        new='"use_sliding_window": family.use_sliding_window[-1], **family',
        tests=("core/test_families.py::test_windows_are_those_of_transformers",),
    ),
    Fault(
        "stale-index-wins",
        "checkpoint.py",
        old="if index.is_file() and not path.is_file():",
        new="if index.is_file():",
        tests=(
            "core/test_checkpoint.py::test_a_single_file_wins_over_an_index_as_in_transformers",
        ),
    ),
    Fault(
        "single-file-left-over",
        "checkpoint.py",
        old="(out / SINGLE).unlink(missing_ok=True)",
        new="pass",
        tests=(
            "core/test_checkpoint.py::test_a_single_file_wins_over_an_index_as_in_transformers",
        ),
    ),
    Fault(
        "tied-head-dropped",
        "checkpoint.py",
        old="if not torch.equal(weights.slice(head)[:], weights.slice(embedding)[:]):",
        new="if weights.slice(head).get_shape() != weights.slice(embedding).get_shape():",
        tests=("core/test_checkpoint.py::test_a_tied_head_that_differs_is_refused",),
    ),
    Fault(
        "nan-loaded",
        "checkpoint.py",
        old="values.is_floating_point() and local.isfinite().all()",
        new="values.is_floating_point()",
        tests=(
            "core/test_checkpoint.py::"
            "test_numbers_that_are_no_weights_are_refused_by_the_tensors_name",
        ),
    ),
    Fault(
        "two-outputs-assumed",
        "checkpoint.py",
        old='if "score.weight" in weights.file_of:',
        new='if "score" in weights.file_of:',
        tests=(
            "core/test_checkpoint.py::"
            "test_the_outputs_of_a_reward_model_are_named_or_those_of_its_head",
        ),
    ),
    # dpo.py and losses.py
    Fault(
        "dpo-sign",
        "losses.py",
        old="(self.chosen - self.rejected) - (self.ref_chosen - self.ref_rejected)",
        new="(self.rejected - self.chosen) - (self.ref_rejected - self.ref_chosen)",
        tests=("core/test_losses.py::test_golden_numbers",),
    ),
    Fault(
        "dpo-reference-sign",
        "losses.py",
        old="(self.chosen - self.rejected) - (self.ref_chosen - self.ref_rejected)",
        new="(self.chosen - self.rejected) + (self.ref_chosen - self.ref_rejected)",
        tests=("core/test_losses.py::test_invariants_at_the_reference",),
    ),
    Fault(
        "simpo-sums",
        "losses.py",
        old="-ls(beta * (p.mean_chosen - p.mean_rejected) - gamma)",
        new="-ls(beta * (p.chosen - p.rejected) - gamma)",
        tests=("core/test_dpo.py::test_simpo_metrics_are_means_without_a_reference",),
    ),
    Fault(
        "simpo-gamma-sign",
        "losses.py",
        old="-ls(beta * (p.mean_chosen - p.mean_rejected) - gamma)",
        new="-ls(beta * (p.mean_chosen - p.mean_rejected) + gamma)",
        tests=("core/test_dpo.py::test_simpo_metrics_are_means_without_a_reference",),
    ),
    Fault(
        "loss-parameters-lost",
        "losses.py",
        old="return self.function(p, **self.parameters)",
        new="return self.function(p)",
        tests=("core/test_losses.py::test_every_parameter_of_every_loss_reaches_it",),
    ),
    Fault(
        "reference-is-the-start",
        "dpo.py",
        old='("reference", "ref_", reference),',
        new='("reference", "ref_", model),',
        tests=("core/test_dpo.py::test_first_step_from_another_start_is_not_checked",),
    ),
    Fault(
        "cache-without-start",
        "dpo.py",
        old="return digest(*sequence)",
        new="return digest(sequence[0])",
        tests=("core/test_dpo.py::test_reference_equals_a_forward_pass_and_is_computed_once",),
    ),
    Fault(
        "cache-without-dtype",
        "dpo.py",
        old="parts = [on_rank0(fingerprint, model), o.run.dtype]",
        new="parts = [on_rank0(fingerprint, model)]",
        tests=("core/test_dpo.py::test_reference_of_another_model_or_dtype_is_kept_apart",),
    ),
    # pairs.py and scorers/
    Fault(
        "scores-by-rank",
        "scorers/base.py",
        old="for number in range(len(blocks)) for value in",
        new="for number in scores for value in",
        tests=(
            "core/test_scorers.py::test_scores_of_several_ranks_are_in_the_order_of_the_records",
        ),
    ),
    Fault(
        "block-without-key",
        "scorers/base.py",
        old="digest(key, block)",
        new="digest(block)",
        tests=("core/test_scorers.py::test_cached_scores_are_of_one_model",),
    ),
    Fault(
        "pairs-swapped",
        "pairs.py",
        old=('"chosen": good["response"],\n        "rejected": bad["response"],'),
        new=('"chosen": bad["response"],\n        "rejected": good["response"],'),
        tests=("core/test_pairs.py::test_columns",),
    ),
    Fault(
        "gap-equal",
        "pairs.py",
        old="not gap > o.threshold",
        new="not gap >= o.threshold",
        tests=("core/test_pairs.py::test_threshold_itself_is_not_enough",),
    ),
    Fault(
        "repetition-of-one",
        "pairs.py",
        old="max(map(repetition, texts))",
        new="min(map(repetition, texts))",
        tests=("core/test_pairs.py::test_each_reason_to_drop_a_pair_is_counted",),
    ),
    Fault(
        "likelihood-sum",
        "scorers/likelihood.py",
        old="next(found).mean().item()",
        new="next(found).sum().item()",
        tests=("core/test_scorers.py::test_likelihood_is_the_mean_logp_of_response_and_end",),
    ),
    Fault(
        "judge-one-order",
        "scorers/letter_judge.py",
        old="(a + 1 - b) / 2 for a, b in orders",
        new="a for a, b in orders",
        tests=("core/test_scorers.py::test_the_letter_judge_reads_both_letters_in_both_orders",),
    ),
    Fault(
        "scores-of-any-dtype",
        "scorers/load.py",
        old="key = [spec, fingerprint(directory), run.dtype, *asked]",
        new="key = [spec, fingerprint(directory), *asked]",
        tests=("core/test_scorers.py::test_cached_scores_are_of_one_dtype",),
    ),
    Fault(
        "gate-reads-the-response",
        "scorers/armorm.py",
        old="self.weights(prompt.float())",
        new="self.weights(last.float())",
        tests=("core/test_scorers.py::test_armorm_by_hand",),
    ),
    Fault(
        "pairrm-one-order",
        "scorers/pairrm.py",
        old="(a - b) / 2 for a, b in orders",
        new="a for a, b in orders",
        tests=("core/test_pairrm.py::test_the_score_is_the_mean_logit_of_both_orders",),
    ),
    Fault(
        "pairrm-fixed-limit",
        "scorers/pairrm.py",
        old="self.candidate_limit + (self.source_limit - len(ids)) // 2",
        new="self.candidate_limit",
        tests=("core/test_pairrm.py::test_the_score_is_the_mean_logit_of_both_orders",),
    ),
    Fault(
        "pairrm-reads-padding",
        "scorers/pairrm.py",
        old="mask = pad_sequence([torch.ones_like(row) for row in rows], batch_first=True)",
        new="mask = torch.ones_like(tokens)",
        tests=("core/test_pairrm.py::test_scores_do_not_depend_on_their_batch",),
    ),
    Fault(
        "p-of-the-gap",
        "scorers/base.py",
        old="math.tanh(score / 2)",
        new="math.tanh(score)",
        tests=("core/test_pairrm.py::test_scores_of_both_sides_and_p",),
    ),
    Fault(
        "logits-lost-in-blocks",
        "scorers/base.py",
        old="scorer.logits = in_logits(score)",
        new="scorer.logits = False",
        tests=("core/test_pairrm.py::test_scores_of_both_sides_and_p",),
    ),
    Fault(
        "settled-without-draft",
        "scorers/likelihood.py",
        old='"prompt": prompt, "response"',
        new='"prompt": row["prompt"], "response"',
        tests=("core/test_scorers.py::test_settled_is_the_likelihood_of_leaving_a_draft_as_it_is",),
    ),
    Fault(
        "beyond-the-context-is-scored",
        "scorers/base.py",
        old="if len(ids) <= limit]",
        new="if ids]",
        tests=(
            "core/test_scorers.py::test_a_text_beyond_the_context_has_no_score",
            "core/test_scorers.py::test_the_last_token_of_the_context_is_read",
        ),
    ),
    Fault(
        "one-side-without-a-score",
        "scorers/base.py",
        old="(None, None) if None in pair else pair",
        new="pair",
        tests=("core/test_scorers.py::test_a_pair_has_two_scores_or_none",),
    ),
    Fault(
        "pair-without-scores-kept",
        "pairs.py",
        old='return "not_scored"',
        new='return ""',
        tests=(
            "core/test_pairs.py::test_a_pair_that_the_scorer_cannot_read_is_dropped_and_counted",
        ),
    ),
    # improve.py and gen_prompts.py
    Fault(
        "unscored-rewrite-wins",
        "improve.py",
        old="rank = (score is not None, ",
        new="rank = (score is None, ",
        tests=("core/test_improve.py::test_a_rewrite_that_the_scorer_cannot_read_does_not_win",),
    ),
    Fault(
        "heldout-pairs-are-trained-on",
        "dpo.py",
        old="o, backward=False)",
        new="o)",
        tests=("core/test_dpo.py::test_heldout_pairs_are_measured_along_the_way",),
    ),
    Fault(
        "measuring-leaves-bf16-copies",
        "train.py",
        old="                module.reshard()",
        new="                pass",
        tests=(
            "core/test_dpo.py::test_measuring_without_training_leaves_the_fp32_shards_in_place",
        ),
    ),
    Fault(
        "heldout-pairs-without-reference",
        "dpo.py",
        old="[*batches, heldout]",
        new="[*batches, heldout[:1]]",
        tests=("core/test_dpo.py::test_heldout_pairs_are_measured_along_the_way",),
    ),
    Fault(
        "heldout-pairs-at-other-steps",
        "dpo.py",
        old="(step % o.heldout_every and step != last)",
        new="False",
        tests=("core/test_dpo.py::test_heldout_pairs_are_measured_along_the_way",),
    ),
    Fault(
        "heldout-pairs-read-late",
        "loop.py",
        old="    heldout_pairs(o.policy)\n",
        new="",
        tests=("core/test_loop.py::test_bad_input_is_one_line_before_anything_expensive",),
    ),
    Fault(
        "improver-refuses-comparisons",
        "loop.py",
        old="single = options is o.rewrites",
        new="single = options is not o.pairs",
        tests=("core/test_loop.py::test_bad_input_is_one_line_before_anything_expensive",),
    ),
    Fault(
        "template-swapped",
        "scorers/base.py",
        old='{"prompt": conversation_text(row), "draft": row["response"]}',
        new='{"prompt": row["response"], "draft": conversation_text(row)}',
        tests=("core/test_improve.py::test_prompt_holds_question_and_draft",),
    ),
    Fault(
        "gold-and-draft-swapped",
        "improve.py",
        old="score_pairs(scorer, [seed for seed, _ in pairs], [draft for _, draft in pairs])",
        new="score_pairs(scorer, [draft for _, draft in pairs], [seed for seed, _ in pairs])",
        tests=(
            "core/test_improve.py::"
            "test_with_scorer_gold_must_beat_the_draft_by_more_than_the_threshold",
        ),
    ),
    Fault(
        "worst-of-n",
        "improve.py",
        old="if rank > highest:",
        new="if not highest or rank < highest:",
        tests=("core/test_improve.py::test_scorer_decides_among_the_finished",),
    ),
    Fault(
        "noise-of-the-same-seed",
        "gen_prompts.py",
        old=(
            "other = found[random.choice([j for j in usable if j != i])]\n"
            "            noise = [word for word in other if word not in found[i]]"
        ),
        new=("other = found[i]\n            noise = other"),
        tests=("core/test_gen_prompts.py::test_two_own_keywords_and_one_of_another_seed",),
    ),
    Fault(
        "union-counts-the-common-twice",
        "plumbing/novelty.py",
        old="(len(mine) + size - common[i])",
        new="(len(mine) + size)",
        tests=("core/test_gen_prompts.py::test_novelty_equals_brute_force",),
    ),
    Fault(
        "own-filter-not-an-input",
        "gen_prompts.py",
        old="iteration=t,\n        keep_files=plugin_files(o.keep),",
        new="iteration=t,",
        tests=("core/test_gen_prompts.py::test_prompts_follow_from_the_users_filter",),
    ),
    Fault(
        "same-lists",
        "gen_prompts.py",
        old='random = rng(seed, "lists", t)',
        new='random = rng(seed, "lists")',
        tests=("core/test_gen_prompts.py::test_lists_are_fresh_in_every_iteration_and_repeatable",),
    ),
    # loop.py: Algorithm 1
    Fault(
        "rejected-of-previous",
        "loop.py",
        old='rejected = y_0 if o.rejected == "base" else y',
        new="rejected = y",
        tests=("core/test_loop.py::test_pairs_are_rewrites_over_base_answers",),
    ),
    Fault(
        "pairs-not-cumulative",
        "loop.py",
        old='run.every("pairs.jsonl", t) if o.data == "cumulative" else',
        new="[] or",
        tests=("core/test_loop.py::test_data_flow_is_the_papers",),
    ),
    Fault(
        "policy-from-previous",
        "loop.py",
        old='start = M_0 if o.start == "base" else M_prev',
        new="start = M_prev",
        tests=("core/test_loop.py::test_data_flow_is_the_papers",),
    ),
    Fault(
        "improver-from-previous",
        "loop.py",
        old="R = train_improver(M_0,",
        new="R = train_improver(M_prev,",
        tests=("core/test_loop.py::test_data_flow_is_the_papers",),
    ),
    Fault(
        "drafts-of-the-first",
        "loop.py",
        old="sample(M_prev, run.seeds,",
        new="sample(M_0, run.seeds,",
        tests=("core/test_loop.py::test_data_flow_is_the_papers",),
    ),
    Fault(
        "rewrites-of-the-first",
        "loop.py",
        old="y_hat = rewrite(R, y, M_0,",
        new="y_hat = rewrite(R, y_0, M_0,",
        tests=("core/test_loop.py::test_data_flow_is_the_papers",),
    ),
    Fault(
        "scored-by-previous",
        "loop.py",
        old="o.pairs, M_0, t, revision)",
        new="o.pairs, M_prev, t, revision)",
        tests=("core/test_loop.py::test_first_model_scores_and_all_models_are_evaluated_alike",),
    ),
    Fault(
        "compared-with-itself",
        "eval/in_run.py",
        old="base_answers = run.heldout_answers(0)",
        new="base_answers = answers",
        tests=("core/test_loop.py::test_first_model_scores_and_all_models_are_evaluated_alike",),
    ),
    Fault(
        "heldout-not-excluded",
        "loop.py",
        old="[self.heldout] if self.o.heldout else []",
        new="[]",
        tests=("core/test_loop.py::test_prompts_are_new_in_every_iteration",),
    ),
    Fault(
        "seeds-limit-ignored",
        "loop.py",
        old="rows = rows[: limit or None]",
        new="rows = rows[:]",
        tests=("core/test_loop.py::test_seeds_limit_and_heldout_limit",),
    ),
    Fault(
        "spin-refers-to-the-first",
        "methods/spin.py",
        old="policy, reference=M_prev, cache",
        new="policy, reference=run.model(0), cache",
        tests=("core/test_methods.py::test_spin_starts_from_and_refers_to_the_opponent",),
    ),
    Fault(
        "spin-window",
        "methods/spin.py",
        old="[-o.spin.window :]",
        new="[: o.spin.window]",
        tests=("core/test_methods.py::test_spin_starts_from_and_refers_to_the_opponent",),
    ),
    Fault(
        "last-of-the-best",
        "methods/ranking.py",
        old="best = max(scored,",
        new="best = max(reversed(scored),",
        tests=("core/test_methods.py::test_first_of_the_best_against_last_of_the_worst",),
    ),
    Fault(
        "reference-never-changes",
        "methods/sapo.py",
        old="return averages[step - step % interval]",
        new="return averages[0]",
        tests=("core/test_sapo.py::test_rounds_end_where_iteration_or_reference_end",),
    ),
    Fault(
        "rest-after-an-end",
        "methods/sapo.py",
        old="        if not ended:\n            # the limit",
        new="        if ended:\n            # the limit",
        tests=("core/test_sapo.py::test_what_follows_a_segment_stays_unless_the_model_has_ended",),
    ),
    Fault(
        "average-the-wrong-way",
        "methods/online.py",
        old="lerp_(local_rows(weight)[0], 1 - decay)",
        new="lerp_(local_rows(weight)[0], decay / 4)",
        tests=("core/test_sapo.py::test_the_average_of_weights_by_hand",),
    ),
    Fault(
        "steps-logged-twice",
        "methods/online.py",
        old='    on_rank0(write_text, stage.scratch / "metrics.jsonl", "")',
        new="    on_rank0(len, ())",
        tests=("core/test_sapo.py::test_a_round_is_repeated_after_a_kill",),
    ),
    Fault(
        "short-answers-chosen",
        "methods/almost.py",
        old="short = length < other_length and length < limit",
        new="short = False",
        tests=("core/test_almost.py::test_comparisons_by_hand",),
    ),
    Fault(
        "clipped-for-the-worse",
        "methods/rlsf.py",
        old="torch.minimum(ratio * advantage",
        new="torch.maximum(ratio * advantage",
        tests=("core/test_almost.py::test_the_clipped_loss_by_hand",),
    ),
    Fault(
        "leaving-the-reference-pays",
        "methods/rlsf.py",
        old="reward - weight",
        new="reward + weight",
        tests=("core/test_almost.py::test_leaving_the_reference_costs",),
    ),
    Fault(
        "end-after-a-cut",
        "methods/rlsf.py",
        old='cut_off = row["finish_reason"] == "length"',
        new="cut_off = False",
        tests=("core/test_almost.py::test_an_answer_that_was_cut_off_has_no_end_token",),
    ),
    Fault(
        "trainings-pile-up",
        "methods/sapo.py",
        old="for old in past[:-2]:",
        new="for old in past[:0]:",
        tests=("core/test_sapo.py::test_a_round_is_repeated_after_a_kill",),
    ),
    Fault(
        "prefix-forgotten",
        "sample.py",
        old="before = chat.text_ids(prefix)",
        new="before = []",
        tests=("core/test_sample.py::test_a_continuation_keeps_the_space_before_it",),
    ),
    Fault(
        "gold-for-one-sample",
        "pairs.py",
        old='if "sample" not in good or pair_id(good)',
        new="if pair_id(good)",
        tests=("core/test_methods.py::test_gold_goes_with_every_sample_of_its_prompt",),
    ),
    Fault(
        "one-shot-budget",
        "loop.py",
        old="pairs = replace(self.pairs, max_pairs=T * self.pairs.max_pairs)",
        new="pairs = self.pairs",
        tests=("core/test_loop.py::test_one_shot_has_the_whole_budget_in_one_iteration",),
    ),
    Fault(
        "gold-is-rejected",
        "methods/controls.py",
        old='{"chosen": seed["response"], "rejected": draft["response"]}',
        new='{"chosen": draft["response"], "rejected": seed["response"]}',
        tests=("core/test_controls.py::test_gold_pairs_leave_out_empty_drafts_and_number_samples",),
    ),
    Fault(
        "one-revision-repeated",
        "methods/controls.py",
        old="y = rewrite(R_1, y, M_0,",
        new="y = rewrite(R_1, y_0, M_0,",
        tests=(
            "core/test_controls.py::test_repeated_revises_with_the_first_improver_and_distils_once",
        ),
    ),
    # demo/
    Fault(
        "doubled-words-allowed",
        "demo/sorting.py",
        old="whole = sorted(answer) == sorted(words)",
        new="whole = set(answer) == set(words)",
        tests=("core/test_sorting.py::test_marks_by_hand",),
    ),
    Fault(
        "gold-in-the-base-text",
        "demo/sorting.py",
        old="base = [answering(next(fresh)) for _ in range(ANSWERS)]",
        new="fresh = iter([list(x) for x in lists])\n"
        "    base = [answering(next(fresh)) for _ in range(ANSWERS)]",
        tests=("core/test_sorting.py::test_gold_prompts_are_nowhere_in_the_base_text",),
    ),
    # plumbing/
    Fault(
        "end-is-eos",
        "formats/chat.py",
        old="self.end = ends[0] if ends else min(stops)",
        new="self.end = min(stops)",
        tests=("core/test_chat.py::test_end_is_what_the_template_writes_and_stops_are_all_known",),
    ),
    Fault(
        "config-wins",
        "plumbing/options.py",
        old="argv = given + argv",
        new="argv = argv + given",
        tests=("core/test_options.py::test_config_file_gives_options_and_flags_win",),
    ),
    Fault(
        "overwrites-its-input",
        "plumbing/stage.py",
        old="os.path.commonpath(ends) in ends and",
        new="ends[0] == ends[1] and",
        tests=("core/test_stage.py::test_a_result_does_not_overlap_with_what_it_is_made_from",),
    ),
    Fault(
        "prefix-of-a-name-overlaps",
        "plumbing/stage.py",
        old="os.path.commonpath(ends)",
        new="os.path.commonprefix(ends)",
        tests=("core/test_stage.py::test_neighbours_do_not_overlap",),
    ),
    Fault(
        "overwrites-others",
        "plumbing/stage.py",
        old="if not manifest and not self.scratch.exists():",
        new="if self.scratch.exists():",
        tests=("core/test_stage.py::test_what_is_not_ours_is_not_overwritten",),
    ),
    Fault(
        "half-written-is-foreign",
        "plumbing/stage.py",
        old="if not manifest and not self.scratch.exists():",
        new="if not manifest:",
        tests=("core/test_stage.py::test_a_half_written_result_is_ours",),
    ),
    Fault(
        "claims-any-directory",
        "loop.py",
        old="        refuse_foreign(o.out)",
        new="        pass",
        tests=("core/test_loop.py::test_bad_input_is_one_line_before_anything_expensive",),
    ),
    Fault(
        "claim-cut-short-is-foreign",
        "plumbing/stage.py",
        old='(".tmp", ".log", ".out", ".err")',
        new='(".log", ".out", ".err")',
        tests=("core/test_loop.py::test_an_interrupted_run_ends_with_one_line",),
    ),
    Fault(
        "claim-half-made-is-foreign",
        "loop.py",
        old='    if not (o.out / "changed.json").is_file():',
        new='    if not (o.out / "config.json").is_file():',
        tests=("core/test_loop.py::test_an_interrupted_run_ends_with_one_line",),
    ),
    Fault(
        "slow-bf16-is-not-said",
        "ops/cpu.py",
        old="if dtype != torch.bfloat16 or",
        new="if dtype == torch.bfloat16 or",
        tests=("core/test_platforms.py::test_a_cpu_without_bf16_is_told_of_float32",),
    ),
    Fault(
        "interrupt-as-an-exception",
        "plumbing/options.py",
        old="    os._exit(128 + number)",
        new="    sys.exit(128 + number)",
        tests=("core/test_options.py::test_an_interrupt_within_a_callback_is_not_lost",),
    ),
    Fault(
        "begun-run-is-claimed-again",
        "loop.py",
        old="    if begun(o.out):\n        return\n",
        new="",
        tests=("core/test_loop.py::test_a_run_that_has_begun_takes_its_own_copies",),
    ),
    Fault(
        "a-log-is-somebody-elses",
        "plumbing/stage.py",
        old='(".tmp", ".log", ".out", ".err")',
        new='(".tmp", ".out", ".err")',
        tests=("core/test_loop.py::test_a_log_of_the_command_may_lie_in_out",),
    ),
    Fault(
        "every-rank-says-it",
        "plumbing/options.py",
        old='    if RANK == 0:\n        line = b"interrupted',
        new='    if True:\n        line = b"interrupted',
        tests=("core/test_loop.py::test_interrupted_ranks_leave_one_line_and_nothing_running",),
    ),
    Fault(
        "runs-within-its-model",
        "loop.py",
        old="        if not o.prepare:\n            refuse_overlap",
        new="        if o.prepare:\n            refuse_overlap",
        tests=("core/test_loop.py::test_bad_input_is_one_line_before_anything_expensive",),
    ),
    Fault(
        "plugins-line-is-its-first",
        "formats/plugins.py",
        old="line {lines[-1]}",
        new="line {lines[0]}",
        tests=("core/test_plugins.py::test_a_failing_call_names_the_last_line_of_the_plugin",),
    ),
    Fault(
        "plugins-line-needs-a-whole-path",
        "formats/plugins.py",
        old='in_project(spec.rpartition(":")[0]).absolute()',
        new='in_project(spec.rpartition(":")[0])',
        tests=("core/test_plugins.py::test_the_line_is_there_for_a_relative_path_too",),
    ),
    Fault(
        "callable-objects-lose-attributes",
        "formats/plugins.py",
        old="if inspect.isfunction(function) else function",
        new="if callable(function) else function",
        tests=("core/test_plugins.py::test_an_object_keeps_its_attributes",),
    ),
    Fault(
        "another-neighbour",
        "formats/plugins.py",
        old="and not file.samefile(found)",
        new="and file.samefile(found)",
        tests=("core/test_plugins.py::test_another_file_than_the_neighbour_is_refused",),
    ),
    Fault(
        "ignored-interrupt-ends-it",
        "plumbing/options.py",
        old="if signal.getsignal(number) != signal.SIG_IGN:",
        new="if True:",
        tests=("core/test_options.py::test_an_interrupt_that_the_caller_ignores_stays_ignored",),
    ),
    Fault(
        "plugin-may-exit",
        "formats/plugins.py",
        old="except (Exception, SystemExit) as error",
        new="except Exception as error",
        tests=("core/test_plugins.py::test_a_plugin_that_cannot_be_loaded_is_one_line",),
    ),
    Fault(
        "neighbours-hide-the-project",
        "formats/plugins.py",
        old="sys.path.append(str(path.parent))",
        new="sys.path.insert(0, str(path.parent))",
        tests=("core/test_plugins.py::test_a_neighbour_does_not_hide_a_module_of_this_project",),
    ),
    Fault(
        "options-not-compared",
        "plumbing/stage.py",
        old='for part in ("options", "inputs"):',
        new='for part in ("inputs",):',
        tests=("core/test_stage.py::test_a_changed_option_is_refused_by_name_and_values",),
    ),
    Fault(
        "damage-unseen",
        "plumbing/stage.py",
        old="if (touched or verify) and read(path) != known_hash:",
        new="if status.st_size != size:",
        tests=("core/test_stage.py::test_a_damaged_result_is_made_again",),
    ),
    Fault(
        "files-beside-a-result-unwatched",
        "plumbing/stage.py",
        old="in files_of(self.out) + self.beside:",
        new="in files_of(self.out):",
        tests=("core/test_stage.py::test_files_beside_a_result_are_watched",),
    ),
    Fault(
        "huge-number-with-traceback",
        "plumbing/ranges.py",
        old="except (ValueError, OverflowError):",
        new="except ValueError:",
        tests=("core/test_options.py::test_a_whole_number_of_400_digits_is_refused",),
    ),
    Fault(
        "limit-of-memory-stays",
        "formats/limits.py",
        old="        resource.setrlimit(resource.RLIMIT_AS, self.before)",
        new="        pass",
        tests=("core/test_chat_template.py::test_a_hostile_template_is_refused_in_one_line",),
    ),
    Fault(
        "timer-of-a-template-stays",
        "formats/limits.py",
        old="signal.setitimer(signal.ITIMER_VIRTUAL, 0)",
        new="pass",
        tests=("core/test_chat_template.py::test_a_hostile_template_is_refused_in_one_line",),
    ),
    Fault(
        "too-much-memory-without-a-word",
        "formats/limits.py",
        old="if kind is MemoryError:",
        new="if False:",
        tests=("core/test_chat_template.py::test_a_hostile_template_is_refused_in_one_line",),
    ),
    Fault(
        "lipsum-for-templates",
        "formats/chat_template.py",
        old='    del environment.globals["lipsum"]\n',
        new="",
        tests=("core/test_chat_template.py::test_a_hostile_template_is_refused_in_one_line",),
    ),
    Fault(
        "verify-reads-nothing",
        "plumbing/stage.py",
        old="(touched or verify) and",
        new="touched and",
        tests=("core/test_stage.py::test_verify_reads_all_files_of_a_result",),
    ),
    Fault(
        "damaged-manifest-counts",
        "plumbing/stage.py",
        old="if known not in (None, digest(manifest)):",
        new="if not known:",
        tests=("core/test_stage.py::test_a_damaged_manifest_is_refused",),
    ),
    Fault(
        "leftover-of-safetensors-stays",
        "plumbing/stage.py",
        old="            left.unlink()",
        new="            pass",
        tests=("core/test_stage.py::test_what_safetensors_left_after_a_kill_is_removed",),
    ),
    Fault(
        "part-damaged-unseen",
        "plumbing/parts.py",
        old='if digest.decode(errors="replace") == digest_of(path, text):',
        new="if digest:",
        tests=(
            "core/test_parts.py::test_each_flipped_bit_is_noticed",
            "core/test_parts.py::test_each_cut_is_noticed",
        ),
    ),
    Fault(
        "part-in-another-place",
        "plumbing/parts.py",
        old="path.name.encode() + content",
        new="content",
        tests=("core/test_parts.py::test_a_part_in_the_place_of_another_is_noticed",),
    ),
    Fault(
        "checkpoint-damaged-unseen",
        "train.py",
        old='if state and state["files"] == digests(target) else',
        new="if state else",
        tests=("core/test_train.py::test_a_resumed_run_equals_an_uninterrupted_one",),
    ),
    Fault(
        "full-disk-with-traceback",
        "plumbing/files.py",
        old="except (OSError, *errors) as error:",
        new="except errors as error:",
        tests=("core/test_parts.py::test_a_file_that_cannot_be_written_is_one_line",),
    ),
    Fault(
        "discarded-is-damage",
        "plumbing/stage.py",
        old='if manifest.get("discarded") and path.suffix',
        new='if manifest.get("kept") and path.suffix',
        tests=("core/test_stage.py::test_a_discarded_result_is_up_to_date",),
    ),
    Fault(
        "scratch-of-another",
        "plumbing/stage.py",
        old='if before.get("identity") != identity:',
        new="if not before:",
        tests=(
            "core/test_stage.py::test_scratch_is_kept_for_the_same_result_and_cleared_for_another",
        ),
    ),
    Fault(
        "no-lock",
        "plumbing/stage.py",
        old="fcntl.LOCK_EX | fcntl.LOCK_NB",
        new="fcntl.LOCK_SH | fcntl.LOCK_NB",
        tests=("core/test_stage.py::test_two_processes_cannot_write_the_same_result",),
    ),
    Fault(
        "windows-fails-later",
        "plumbing/files.py",
        old='if sys.platform == "win32":',
        new='if sys.platform == "windows":',
        tests=("core/test_platforms.py::test_on_windows_every_command_ends_with_one_line",),
    ),
    Fault(
        "bytes-taken-for-kib",
        "ops/meters.py",
        old='1 if sys.platform == "darwin" else 1024',
        new="1024",
        tests=("core/test_platforms.py::test_peak_memory_is_counted_in_the_units_of_the_system",),
    ),
    Fault(
        "error-stays-on-rank-0",
        "plumbing/ranks.py",
        old="if error is not None:",
        new="if error is not None and RANK == 0:",
        tests=("core/test_ranks.py::test_two_processes_split_and_gather_in_order",),
    ),
    Fault(
        "id-by-place",
        "formats/records.py",
        old="digest(messages_of(row) if asks else row)\n",
        new="digest(messages_of(row) if asks else row, number)\n",
        tests=("core/test_records.py::test_ids_follow_from_the_prompt_not_from_the_place",),
    ),
    # formats/
    Fault(
        "answer-in-the-prompt",
        "formats/layouts.py",
        old="    *turns, last = turns\n",
        new="    last = turns[-1]\n",
        tests=("core/test_layouts.py::test_the_answer_is_the_response_and_never_in_the_prompt",),
    ),
    Fault(
        "conversations-may-differ",
        "formats/layouts.py",
        old="if any(turns != found[0] for turns in found):",
        new="if not found[0]:",
        tests=(
            "core/test_layouts.py::test_a_record_that_contradicts_itself_is_refused_with_its_line",
        ),
    ),
    Fault(
        "lines-of-an-array-not-counted",
        "formats/records.py",
        old="line += text.count(",
        new="line = text.count(",
        tests=("core/test_layouts.py::test_errors_name_the_line_of_the_file",),
    ),
    Fault(
        "response-alone",
        "formats/chat.py",
        old="        if self.opening:\n",
        new="        if self.opening is None:\n",
        tests=(
            "core/test_chat_template.py"
            "::test_a_response_has_the_tokens_that_it_has_in_a_conversation",
        ),
    ),
    Fault(
        "two-ends",
        "formats/chat.py",
        old="if self.end_text and text",
        new="if not self.end_text and text",
        tests=("core/test_chat_template.py::test_a_response_has_one_end_token_and_no_text_of_it",),
    ),
    Fault(
        "scorers-take-the-template",
        "formats/chat.py",
        old='not (own_template and "default" in own)',
        new="True",
        tests=(
            "core/test_chat_template.py"
            "::test_a_template_file_replaces_the_models_own_but_not_a_scorers",
        ),
    ),
    Fault(
        "joined-by-id-alone",
        "pairs.py",
        old="if conversation_text(good) != conversation_text(bad):",
        new="if False:",
        tests=("core/test_pairs.py::test_answers_to_other_prompts_are_not_joined",),
    ),
    Fault(
        "useless-pair-trained",
        "dpo.py",
        old='return chosen == rejected and row["chosen"] != row["rejected"]',
        new="return False",
        tests=("core/test_dpo.py::test_pairs_that_the_cut_made_equal_are_left_out",),
    ),
    Fault(
        "numbers-without-range",
        "plumbing/ranges.py",
        old="fits = math.isfinite(value) and allowed.has(value)",
        new="fits = math.isfinite(value)",
        tests=("core/test_options.py::test_numbers_outside_their_range_are_refused",),
    ),
    Fault(
        "not-a-number-passes",
        "plumbing/ranges.py",
        old="fits = math.isfinite(value) and allowed.has(value)",
        new="fits = allowed.has(value)",
        tests=("core/test_options.py::test_any_other_number_must_be_finite",),
    ),
    Fault(
        "zero-norm-clips-all",
        "train.py",
        old="o.max_grad_norm or math.inf",
        new="o.max_grad_norm",
        tests=("core/test_train.py::test_a_norm_of_0_clips_nothing",),
    ),
    Fault(
        "same-tokens-left-out",
        "dpo.py",
        old='    example = Example(row["id"], sequences)',
        new="    if sequences[0] == sequences[1]:\n        return None\n"
        '    example = Example(row["id"], sequences)',
        tests=("core/test_sapo.py::test_a_rejected_response_of_the_same_tokens_is_trained_on",),
    ),
    Fault(
        "earlier-steps-count-as-new",
        "ops/progress.py",
        old="new = self.done - self.first",
        new="new = self.done",
        tests=("core/test_progress.py::test_a_line_a_minute_says_what_is_done_and_left",),
    ),
    Fault(
        "long-draft-is-an-error",
        "improve.py",
        old="return fitting(requests, chat, chat.max_positions, source)",
        new="return requests",
        tests=("core/test_improve.py::test_drafts_that_do_not_fit_are_left_out",),
    ),
    Fault(
        "likelihood-in-another-template",
        "scorers/likelihood.py",
        old="LocalModel(directory, run, own_template=False)",
        new="LocalModel(directory, run)",
        tests=("core/test_scorers.py::test_likelihood_reads_the_template_of_the_policy",),
    ),
    Fault(
        "long-question-is-settled",
        "scorers/likelihood.py",
        old="None if value is None",
        new="1.0 if value is None",
        tests=("core/test_scorers.py::test_what_does_not_fit_is_not_settled",),
    ),
    # eval/ and bench/
    Fault(
        "draw-is-a-loss",
        "eval/stats.py",
        old="0.5 if a == b else float(a > b)",
        new="float(a > b)",
        tests=("eval/test_heldout.py::test_win_rate_against_itself_is_one_half",),
    ),
    Fault(
        "second-order-not-turned",
        "scorers/llm_judge.py",
        old="None if second is None else 1 - second",
        new="second",
        tests=("eval/test_llm_judge.py::test_both_orders_are_asked_and_turned_the_right_way",),
    ),
    Fault(
        "cut-off-thoughts-judge",
        "scorers/llm_judge.py",
        old='None if text.lstrip().startswith("<think>") else text',
        new="text",
        tests=("eval/test_llm_judge.py::test_a_reply_cut_off_is_no_verdict_and_asked_for_again",),
    ),
    Fault(
        "one-letter-cut-off",
        "scorers/llm_judge.py",
        old='(reply["finish"] == "length" and not choice)',
        new='reply["finish"] == "length"',
        tests=("eval/test_llm_judge.py::test_one_letter_ends_at_its_limit_and_is_a_verdict",),
    ),
    Fault(
        "length-not-controlled",
        "eval/alpaca_eval.py",
        old="sigmoid(X[:, 1:] @ b[1:])",
        new="sigmoid(X @ b)",
        tests=(
            "eval/test_alpaca_eval.py::"
            "test_length_controlled_win_rate_takes_out_a_planted_effect_of_length",
        ),
    ),
    Fault(
        "unannotated-unsaid",
        "eval/alpaca_eval.py",
        old="            absent.append(name)\n",
        new="",
        tests=("eval/test_alpaca_eval.py::test_reproducing_says_what_is_missing",),
    ),
    Fault(
        "card-is-a-part",
        "plumbing/stage.py",
        old='others = (manifest_path(out), out / "README.md")',
        new="others = (manifest_path(out),)",
        tests=("eval/test_model_card.py::test_no_stage_notices_a_card",),
    ),
    Fault(
        "licence-of-the-text",
        "eval/model_card.py",
        old='front[1] if front else "")',
        new="text)",
        tests=("eval/test_model_card.py::test_the_licence_is_that_of_M_0",),
    ),
    Fault(
        "cache-path-in-the-card",
        "eval/model_card.py",
        old='return re.sub(cached, r"\\1/\\2", text)',
        new="return text",
        tests=("eval/test_model_card.py::test_of_the_hubs_cache_the_models_id_is_shown",),
    ),
    Fault(
        "improver-score-lost",
        "eval/report.py",
        old='files[f"R_{t}"] = run / f"iter{t}/eval_improver.json"',
        new='files[f"R_{t}"] = run / f"iter{t}/eval.json"',
        tests=("eval/test_report.py::test_an_improvers_score_is_its_own",),
    ),
    Fault(
        "unpaired-error",
        "eval/diagnostics.py",
        old="standard_error([new - old for old, new in pairs])",
        new='standard_error(after["scores"])',
        tests=("eval/test_diagnostics.py::test_rows_by_hand",),
    ),
    Fault(
        "mean-of-n-is-best",
        "eval/heldout.py",
        old="max(group) for",
        new="mean(group) for",
        tests=("eval/test_heldout.py::test_best_and_distinct_of_several_responses_by_hand",),
    ),
    Fault(
        "budget-overrun",
        "scorers/openai_api.py",
        old="self.cache.usd + sum(running.values()) + cost > budget",
        new="self.cache.usd + cost > budget",
        tests=("eval/test_llm_judge.py::test_the_budget_holds_with_many_requests_under_way",),
    ),
    Fault(
        "wrong-row-scored",
        "eval/lm_eval_adapter.py",
        old="rows += range(end - len(continuation), end)",
        new="rows += range(end - len(continuation) - 1, end - 1)",
        tests=("eval/test_lm_eval_adapter.py::test_packing_changes_no_log_prob",),
    ),
    Fault(
        "population-error",
        "eval/stats.py",
        old="np.std(values, ddof=1) / len(values)",
        new="np.std(values, ddof=0) / len(values)",
        tests=("eval/test_stats.py",),
    ),
    Fault(
        "gain-of-another-seed",
        "bench/ablations.py",
        old='rows["base"][seed]["last"]',
        new='rows["base"][min(by_seed)]["last"]',
        tests=("bench/test_ablations.py::test_statistics",),
    ),
    # whatever bytes an input file may hold
    Fault(
        "json-any-depth",
        "plumbing/files.py",
        old="if depth_of(text) > MAX_DEPTH:",
        new="if depth_of(text) > 10 * MAX_DEPTH:",
        tests=("core/test_records.py::test_json_that_python_fails_on_is_refused_by_line",),
    ),
    Fault(
        "json-nan-read",
        "plumbing/files.py",
        old="parse_int=number, parse_constant=number)",
        new="parse_int=number)",
        tests=("core/test_records.py::test_json_that_python_fails_on_is_refused_by_line",),
    ),
    Fault(
        "json-nan-written",
        "plumbing/files.py",
        old="finite = json.loads(json.dumps(value), parse_constant=lambda name: None)",
        new="finite = json.loads(json.dumps(value))",
        tests=("core/test_records.py::test_a_number_that_json_cannot_say_is_written_as_null",),
    ),
    Fault(
        "read-a-directory",
        "plumbing/files.py",
        old="except (OSError, ValueError) as error:  # a directory",
        new="except PermissionError as error:  # a directory",
        tests=("core/test_records.py::test_what_is_no_file_is_refused_in_one_line",),
    ),
    Fault(
        "error-line-unescaped",
        "plumbing/files.py",
        old="super().__init__(CONTROL.sub(lambda found: ascii(found[0])[1:-1], text))",
        new="super().__init__(text)",
        tests=("core/test_records.py::test_control_characters_in_an_error_are_escaped",),
    ),
    Fault(
        "toml-valueerror",
        "plumbing/options.py",
        old="except (ValueError, RecursionError) as error:  # also",
        new="except tomllib.TOMLDecodeError as error:  # also",
        tests=("core/test_options.py::test_toml_that_python_would_fail_on_is_one_line",),
    ),
    Fault(
        "answers-without-a-response",
        "formats/records.py",
        old='        row.setdefault("response", None)\n',
        new="",
        tests=("core/test_records.py::test_answers_have_texts_which_may_be_empty",),
    ),
    Fault(
        "sizes-unchecked",
        "checkpoint.py",
        old="        check_sizes(config, Weights(directory), path.parent)",
        new="        Weights(directory)",
        tests=("core/test_checkpoint.py::test_sizes_are_compared_with_the_weights",),
    ),
    Fault(
        "config-kinds-unchecked",
        "formats/config_json.py",
        old="    check_kinds(raw, FIELDS, path)\n",
        new="",
        tests=("core/test_checkpoint.py::test_a_field_of_another_kind_is_refused_by_name",),
    ),
    Fault(
        "special-tokens-of-any-kind",
        "formats/chat.py",
        old="if not isinstance(value, str) or value",
        new="if False and value",
        tests=("core/test_chat.py::test_settings_of_another_shape_are_refused_by_name",),
    ),
]


# --------------------------------------------------------------------------------------- running


def failures(tree: Path, tests: list[str], *more: str) -> list[str]:
    """The tests of a tree that fail; ValueError where they could not run at all.

    more: options of pytest.
    """
    command = [sys.executable, "-m", "pytest", "-q", "--tb=no", "-rfE", "-p", "no:cacheprovider"]
    inherited = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    # compiled kernels and hashes of a faulty tree must not stay in the user's cache
    own = {"OMP_NUM_THREADS": "1", "XDG_CACHE_HOME": str(tree.parent / "cache")}
    done = subprocess.run(
        [*command, *more, *(f"tests/{test}" for test in tests)],
        cwd=tree,
        env={**inherited, **own},
        capture_output=True,
        text=True,
        timeout=60 * MINUTES,
    )
    lines = done.stdout.splitlines()
    failed = [line.split(" ", 1)[1] for line in lines if line.startswith(("FAILED ", "ERROR "))]
    failed = [name.split(" - ")[0].removeprefix("tests/") for name in failed]
    # a file that cannot be imported, or a test that is not there, says nothing of the fault
    if done.returncode > 1 or not all("::" in name for name in failed):
        raise ValueError(f"the tests did not run: {(lines or [done.stderr])[-1]}")
    return failed


def try_fault(fault: Fault, clean: Path, broken: list[str]) -> tuple[bool, str]:
    """Whether a fault is caught, and by which test or why not. broken: tests that always fail."""
    tree = clean.with_name("faulty")
    shutil.copytree(clean, tree)
    try:
        (tree / fault.file).write_text(fault.patched(tree), "utf-8")
        failed = failures(tree, list(fault.tests), "-x")
    except (ValueError, subprocess.TimeoutExpired) as error:
        return False, str(error)
    finally:
        shutil.rmtree(tree)
    if not failed:
        return False, "all tests pass"
    if failed[0] in broken:
        return False, f"{failed[0]} fails without the fault too"
    return True, failed[0]


def choose(names: list[str]) -> list[Fault]:
    known = {fault.name for fault in FAULTS}
    unknown = [name for name in names if name not in known]
    if unknown:
        sys.exit(f"error: no fault {', '.join(unknown)}; there are {', '.join(sorted(known))}")
    return [fault for fault in FAULTS if not names or fault.name in names]


def main(names: list[str]) -> int:
    chosen = choose(names)
    begin = time.time()
    missed = []
    with TemporaryDirectory(prefix="faults-") as folder:
        # copied once, so that all are tried on the same tree
        clean = Path(folder) / "clean"
        shutil.copytree(ROOT, clean, ignore=shutil.ignore_patterns(*NOT_COPIED))

        # the tests without any fault, in another copy, which they may write to
        plain = shutil.copytree(clean, clean.with_name("plain"))
        tests = dict.fromkeys(test for fault in chosen for test in fault.tests)
        broken = failures(plain, list(tests))
        shutil.rmtree(plain)
        print(f"{len(tests)} tests without a fault: {len(broken)} fail  {since(begin)}", flush=True)

        for fault in chosen:
            start = time.time()
            caught, why = try_fault(fault, clean, broken)
            verdict = "caught by" if caught else "NOT CAUGHT:"
            print(f"{fault.name:<26} {verdict} {why}  {since(start)}", flush=True)
            if not caught:
                missed.append(fault.name)
    counts = {"faults": len(chosen), "caught": len(chosen) - len(missed), "not_caught": missed}
    print(json.dumps({**counts, "seconds": round(time.time() - begin, 1)}))
    return int(bool(missed))


def since(start: float) -> str:
    return f"({time.time() - start:.0f} s)"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
