"""Wrong clipping functions, adaptive clipping, optimizers and averages: (name, lines, file, old, new, tests) as in
tests/mutants.py."""

FUNCTIONS = "tests/privacy/clipping/test_functions.py::test_"
ADAPTIVE, ADAPTIVE_RUN = "tests/privacy/clipping/test_adaptive.py::test_", "tests/methods/test_adaptive.py::test_"
(FUNCTIONS_PY, LOOP_PY, BOOK_KEEPING_PY, GROUPED_PY, TWO_PASS_PY, OPACUS_PY) = (
    f"privacy/clipping/{name}.py"
    for name in ("functions", "loop", "book_keeping", "grouped", "ghost_two_pass", "opacus_hooks")
)
PREFLIGHT_PY = "privacy/preflight.py"
ADAPTIVE_PY, NOISE_PY = "privacy/clipping/adaptive.py", "privacy/noise.py"
OPTIMIZERS, AVERAGE = "tests/methods/test_optimizers.py::test_", "tests/methods/test_average.py::test_"
STATE = "tests/test_resume_state.py::test_"
CONTENTS_PY = "methods/contents.py"
BASE_PY, FIRST_ORDER_PY, OPTIMIZERS_PY, DP_ADAM_PY, AVERAGE_PY = (
    f"methods/{name}.py" for name in ("base", "first_order", "optimizers", "dp_adam", "average")
)

FUNCTION_MUTANTS = [
    ("AUTO-V divides by a norm that has underflowed", "5", FUNCTIONS_PY, "norms.clamp(min=SMALLEST_NORM)",
     "norms.clamp(min=1e-37)", (FUNCTIONS + "gradients_of_any_size_in_float32[1e-30-AutoV-BookKeeping]",)),
    ("AUTO-S takes gamma off", "5", FUNCTIONS_PY, "norms + self.stability", "(norms - self.stability).abs()",
     (FUNCTIONS + "by_hand", FUNCTIONS + "the_shipped_functions_keep_the_bound[AutoS]")),
    ("AUTO-S clips by nothing", "5", FUNCTIONS_PY, "clip_norm / divisors,", "clip_norm / divisors.clamp(max=1),",
     (FUNCTIONS + "one_example_moves_the_sum_by_at_most_c[BookKeeping-AutoS]",)),
    ("automatic clipping keeps a poisoned norm", "9", FUNCTIONS_PY,
     "torch.where(torch.isfinite(norms), clip_norm / divisors, torch.zeros_like(norms))", "clip_norm / divisors",
     (FUNCTIONS + "the_shipped_functions_keep_the_bound[AutoV]",
      FUNCTIONS + "a_poisoned_row_is_left_out[BookKeeping-AutoS]")),
    ("the twin is normalised", "5", FUNCTIONS_PY,
     "    if math.isinf(clip_norm):\n        return clip_factors(norms, clip_norm)\n",
     "    clip_norm = min(clip_norm, 1e9)\n", (FUNCTIONS + "the_shipped_functions_keep_the_bound[AutoS]",)),
    ("a stability constant of nothing", "5", FUNCTIONS_PY, "not SMALLEST_NORM <= self.stability", "not -9 <= self.stability",
     (FUNCTIONS + "stability_out_of_range",)),
    ("factors that hang on other units accepted", "5", FUNCTIONS_PY,
     "if not math.isclose(factor, own, rel_tol=1e-6) or factor < 0", "if factor < 0",
     (FUNCTIONS + "a_function_that_breaks_the_promise_is_refused[by the largest]",)),
    ("contributions above C accepted", "5", FUNCTIONS_PY, " or not within:", ":",
     (FUNCTIONS + "a_function_that_breaks_the_promise_is_refused[a little too long]",)),
    ("the loop clips flat", "5 33", LOOP_PY, "clip_norm, self.clipping, self.shares)", "clip_norm, FLAT, self.shares)",
     (FUNCTIONS + "the_loop_by_hand",)),
    ("the engine clips flat", "33", BOOK_KEEPING_PY, "self.clipping(norms, clip_norm)", "FLAT(norms, clip_norm)",
     (FUNCTIONS + "every_engine_equals_the_loop[BookKeeping-AutoV-rows]",)),
    ("groups are clipped flat", "33", GROUPED_PY, "self.grouping.factors(group, squares.sqrt())",
     "FLAT(squares.sqrt(), self.grouping.clip_norm)",
     (FUNCTIONS + "every_engine_equals_the_loop[by layer-AutoV-rows]",)),
    ("two passes clip flat", "33", TWO_PASS_PY, "factors = self.clipping(", "factors = FLAT(",
     (FUNCTIONS + "every_engine_equals_the_loop[GhostTwoPass-AutoV-rows]",)),
    ("what replaces the second pass clips flat", "33", TWO_PASS_PY, "BookKeeping(self.model, clipping=self.clipping)",
     "BookKeeping(self.model)", (FUNCTIONS + "a_poisoned_row_is_left_out[GhostTwoPass-AutoV]",)),
    ("Opacus' gradients are clipped flat", "33", OPACUS_PY, "factors = self.clipping(", "factors = FLAT(",
     (FUNCTIONS + "every_engine_equals_the_loop[OpacusHooks-AutoV-rows]",)),
    ("the pre-flight's loop clips flat", "33", PREFLIGHT_PY, "Loop(model, groups, clipping, getattr",
     "Loop(model, groups, FLAT, getattr",
     (FUNCTIONS + "the_preflight_compares_by_the_engines_own_function[AutoV-all]",)),
    ("the pre-flight believes a clipping function", "5", PREFLIGHT_PY,
     '    check_function(getattr(engine, "clipping", FLAT))\n', "", (FUNCTIONS + "the_preflight_refuses_a_wrong_function",)),
]  # fmt: skip

SPLIT = "left = sigma**-2 - (2 * count_noise) ** -2"
ADAPTIVE_MUTANTS = [
    ("the count is free", "6", ADAPTIVE_PY, SPLIT, "left = sigma**-2",
     (ADAPTIVE + "two_sums_cost_what_one_of_sigma_costs", ADAPTIVE + "noise_by_hand")),
    ("the count costs as if it moved by one", "6", ADAPTIVE_PY, SPLIT, "left = sigma**-2 - count_noise**-2",
     (ADAPTIVE + "two_sums_cost_what_one_of_sigma_costs",)),
    ("b_i released in place of b_i - 1/2", "5", ADAPTIVE_PY, " - COUNT_SENSITIVITY * len(each)", "",
     (ADAPTIVE + "count_by_hand", ADAPTIVE_RUN + "one_example_moves_both_sums_by_no_more_than_their_sensitivity")),
    ("an example without a finite norm counts by no bound", "9", ADAPTIVE_PY, " & each.isfinite()", " | each.isnan()",
     (ADAPTIVE + "count_by_hand",)),
    ("noise of the first C for all", "6", ADAPTIVE_PY, "of_gradients * clip_norm)", "of_gradients * setting.clip_norm)",
     (ADAPTIVE + "parts_by_hand", ADAPTIVE + "each_part_gets_its_own_noise")),
    ("the plan's sigma on the gradients, noise on the count besides", "6", ADAPTIVE_PY,
     "return left**-0.5, count_noise", "return sigma, count_noise", (ADAPTIVE + "noise_by_hand",)),
    ("a count that takes the whole budget accepted", "6", ADAPTIVE_PY, "if left <= 0:", "if left < -1e9:",
     (ADAPTIVE + "a_count_that_takes_the_whole_budget[0.5]",)),
    ("C_t moves the wrong way", "34", ADAPTIVE_PY, "torch.exp(-self.rate", "torch.exp(self.rate",
     (ADAPTIVE + "update_by_hand", ADAPTIVE + "it_finds_the_quantile")),
    ("the part without its half", "3", ADAPTIVE_PY, "/ setting.batch_size + 0.5", "/ setting.batch_size",
     (ADAPTIVE + "update_by_hand",)),
    ("C_t grows without bound", "5", ADAPTIVE_PY, "moved.clamp(1 / FARTHEST, FARTHEST)", "moved",
     (ADAPTIVE + "it_neither_vanishes_nor_overflows",)),
    ("parts that the plan does not pay for are released", "6", NOISE_PY,
     "if not cost <= noise_multiplier**-2 * (1 + 1e-9):", "if cost < 0:",
     (ADAPTIVE + "parts_that_the_plan_does_not_pay_for[parts0-of a noise multiplier of 1.41421 in all, found 1.407]",
      ADAPTIVE + "parts_that_the_plan_does_not_pay_for[parts2-found 0]")),
    ("a sum in two parts", "6", NOISE_PY,
     "if Counter(name for part in parts for name in part.names) != Counter(sums):", "if False:",
     (ADAPTIVE + "parts_that_the_plan_does_not_pay_for[parts8-in exactly one part]",)),
    ("one noise for all parts", "6", NOISE_PY, "self._add_noise(total, scales[name],", "self._add_noise(total, scale,",
     (ADAPTIVE + "each_part_gets_its_own_noise", ADAPTIVE_RUN + "releases_by_hand")),
    ("gradients clipped to the plan's C, noise for C_t", "5", FIRST_ORDER_PY,
     "clip_norm = setting.clip_norm if self.adaptive is None else self.adaptive.clip_norm(setting)\n        self",
     "clip_norm = setting.clip_norm\n        self", (ADAPTIVE_RUN + "releases_by_hand",)),
    ("C_t of one phase goes on into the next", "6", FIRST_ORDER_PY, "self.adaptive.scale.fill_(1)", "pass",
     (ADAPTIVE_RUN + "a_new_phase_begins_at_its_own_clip_norm",)),
    ("later phases unchecked", "6", ADAPTIVE_PY, "self.noise_multipliers(plan.at(first))",
     "self.noise_multipliers(plan.at(0))", (ADAPTIVE_RUN + "every_phase_is_checked",)),
    ("C_t does not key the noise", "35 36", BASE_PY,
     "[*(self.trainable | copied).items(), *own, *", "[*(self.trainable | copied).items(), *",
     (ADAPTIVE_RUN + "the_clip_norm_lies_in_the_checkpoint_and_keys_the_noise", ADAPTIVE_RUN + "releases_by_hand")),
    ("C_t missing from the checkpoint", "35", BASE_PY,
     "for name in self.trainable} | self._own_state().keys()", "for name in self.trainable}",
     (ADAPTIVE_RUN + "the_clip_norm_lies_in_the_checkpoint_and_keys_the_noise",)),
]  # fmt: skip

GOES_ON = OPTIMIZERS + "it_trains_and_goes_on_from_a_checkpoint"
OPTIMIZER_MUTANTS = [
    ("the noise stays in the second moment", "6", DP_ADAM_PY, "state[\"exp_avg_sq\"] / correction - noise_square)",
     "state[\"exp_avg_sq\"] / correction)", (OPTIMIZERS + "two_steps_by_hand",)),
    ("the noise of the last release alone is taken off", "6", DP_ADAM_PY,
     "noise_square = state[\"noise_square\"] / correction", "noise_square = group[\"noise_std\"] ** 2",
     (OPTIMIZERS + "two_steps_by_hand",)),
    ("a standard deviation taken for a variance", "6", DP_ADAM_PY, "group[\"noise_std\"] ** 2", "group[\"noise_std\"]",
     (OPTIMIZERS + "two_steps_by_hand",)),
    ("the floor is one, noise or not", "6", DP_ADAM_PY, "min=group[\"floor\"] * noise_square", "min=group[\"floor\"]",
     (OPTIMIZERS + "without_noise_it_is_adam", OPTIMIZERS + "the_floor_by_hand")),
    ("it is told sigma C, not sigma C / B", "6", FIRST_ORDER_PY, "of_gradients * clip_norm / setting.batch_size",
     "of_gradients * clip_norm", (OPTIMIZERS + "the_method_tells_it_the_noise_on_the_mean",)),
    ("it is told the noise of the plan's C", "6", FIRST_ORDER_PY,
     "clip_norm = setting.clip_norm if adaptive is None else adaptive.clip_norm(setting)\n            noise",
     "clip_norm = setting.clip_norm\n            noise",
     (OPTIMIZERS + "it_is_told_the_noise_of_the_clip_norm_that_adapts",)),
    ("the head is told nothing", "6", OPTIMIZERS_PY, "for group in optimizer.param_groups:",
     "for group in optimizer.param_groups[:1]:", (OPTIMIZERS + "the_method_tells_it_the_noise_on_the_mean",)),
    ("the loss is looked at again within a step", "5", OPTIMIZERS_PY,
     "closure is not None and closure.default is inspect.Parameter.empty", "False",
     (OPTIMIZERS + "what_cannot_be_used_is_refused_in_a_sentence",)),
    ("numbers of the optimizer are not sealed", "35", CONTENTS_PY, " {state} {numbers}", " {state}",
     (OPTIMIZERS + "the_seal_covers_numbers_of_the_optimizer",)),
    ("an average takes the place of the weights", "35", AVERAGE_PY, "parameter.copy_(kept[name])", "kept[name].clone()",
     (AVERAGE + "by_hand_and_training_knows_nothing_of_it", AVERAGE + "scored_at_the_other_point_and_back_to_the_bit")),
    ("the way back rounds", "35", AVERAGE_PY, "kept = {name: parameter.detach().clone()",
     "kept = {name: parameter.detach()", (AVERAGE + "scored_at_the_other_point_and_back_to_the_bit",)),
    ("the last weights are scored", "35", AVERAGE_PY, "        average.copy_to(parameters)", "        average.begun",
     (AVERAGE + "by_hand_and_training_knows_nothing_of_it",)),
    ("averaged in the model's dtype", "27", AVERAGE_PY, "torch.promote_types(p.dtype, torch.float32)", "p.dtype",
     (AVERAGE + "in_bf16_it_is_kept_in_float32",)),
    ("a lost average is not missed", "35", CONTENTS_PY, "if held.keys() != now.keys():", "if False:",
     (ADAPTIVE_RUN + "the_clip_norm_lies_in_the_checkpoint_and_keys_the_noise",)),
    ("what a checkpoint was taken at is not sealed", "35", CONTENTS_PY, " {checkpoint.get('weights')}", "",
     (ADAPTIVE_RUN + "the_clip_norm_lies_in_the_checkpoint_and_keys_the_noise",)),
    ("the last weights are saved", "35", "run.py", "    with method.published():\n        state = whole_state(",
     "    if True:\n        state = whole_state(",
     (STATE + "what_is_saved_and_scored_is_the_average",)),
    ("noise hangs on the average", "35", BASE_PY, ' if not name.startswith("average.")]', "]",
     (AVERAGE + "the_checkpoint_holds_it_sealed_and_no_noise_hangs_on_it",)),
]  # fmt: skip

CLIPPING_MUTANTS = [*FUNCTION_MUTANTS, *ADAPTIVE_MUTANTS, *OPTIMIZER_MUTANTS]
