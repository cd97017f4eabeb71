"""Wrong directions, queries and updates of DPZero: (name, lines, file, old, new, tests) as in tests/mutants.py."""

ZEROTH, WEIGHTS = "tests/methods/test_zeroth_order.py::test_", "tests/methods/test_zeroth_order_weights.py::test_"
DIRECTIONS, LOSSES = "tests/methods/test_directions.py::test_", "tests/privacy/test_preflight_losses.py::test_"
ZEROTH_PY, DIRECTIONS_PY, PREFLIGHT_PY = "methods/zeroth_order.py", "methods/directions.py", "privacy/preflight.py"

QUERY, UPDATE = ZEROTH + "a_query_by_hand", ZEROTH + "an_update_by_hand"
ONE_MORE, PAIRS = ZEROTH + "one_example_moves_the_sum_by_at_most_c", ZEROTH + "a_thousand_random_pairs"
WHOLE = ZEROTH + "a_release_is_clipped_sum_plus_noise_over_b_along_the_directions"
RUN, NEIGHBOURS = ZEROTH + "directions_of_a_run", ZEROTH + "released_numbers_of_neighbours"
FACTORS = "clip_factors(torch.linalg.vector_norm(slopes, ord=order, dim=1), clip_norm)[:, None]"
NAME = 'f"{self.number} {self._names[id(parameter)]}"'
STREAM = 'self.key.stream("direction", self.release, self.digest, name, block)'
BACK = "        finally:\n            self.walker.displace(direction, at, 0.0)\n"
NOTHING = "return {'directions': torch.zeros(self.directions)}"
LOSSES_OF_BATCH = "        found = [self._by_unit(micro_batch) for micro_batch in batch.micro_batches]\n"

QUERY_MUTANTS = [
    ("beside a coarse base neighbours move a row's loss", "7", PREFLIGHT_PY, "if fine < coarse else ():",
     "if False else ():", (LOSSES + "beside_a_coarse_base_rows_may_not_influence_one_another",)),
    ("noise is keyed by rounded weights", "35", "methods/base.py", "*own, *self._exact_copies()]", "*own]",
     (WEIGHTS + "the_noise_is_keyed_by_the_float32_copies_of_bfloat16_weights",)),
    ("clip the sum of slopes", "5", ZEROTH_PY, FACTORS,
     "clip_factors(torch.linalg.vector_norm(slopes.sum(0)).expand(len(slopes)), clip_norm)[:, None]", (QUERY,)),
    ("slopes not clipped", "5", ZEROTH_PY, FACTORS,
     "clip_factors(torch.linalg.vector_norm(slopes, ord=order, dim=1), math.inf)[:, None]", (ONE_MORE, PAIRS, NEIGHBOURS)),
    ("an example moves the sum by 2C, and C is accounted", "31", ZEROTH_PY, FACTORS,
     FACTORS.replace("clip_norm", "2 * clip_norm"), (ONE_MORE, PAIRS, NEIGHBOURS)),
    ("each of K slopes clipped alone", "5", ZEROTH_PY, FACTORS, "clip_factors(slopes.abs(), clip_norm)",
     (f"{ONE_MORE}[3]", f"{PAIRS}[3]")),
    ("slopes normalised", "5", ZEROTH_PY, FACTORS, "(clip_norm / slopes.norm(dim=1))[:, None]",
     (QUERY,)),
    ("NaN unmasked in slopes", "9", ZEROTH_PY, "torch.where(factors > 0, slopes * factors, torch.zeros_like(slopes))",
     "(slopes * factors)", (ZEROTH + "a_poisoned_example_contributes_nothing",)),
    ("slopes over lambda, not twice lambda", "5", ZEROTH_PY, "/ (2 * self.smoothing)", "/ self.smoothing", (QUERY,)),
    ("one side of the difference is theta", "5", ZEROTH_PY, "(self.smoothing, -self.smoothing)", "(self.smoothing, 0.0)",
     (QUERY,)),
    ("ascent", "5", ZEROTH_PY, "both[:, 0] - both[:, 1]", "both[:, 1] - both[:, 0]", (QUERY, UPDATE)),
    ("sum over directions, not mean", "5", ZEROTH_PY, "(setting.batch_size * self.directions)", "setting.batch_size",
     (WHOLE,)),
    ("a step along other directions", "5", ZEROTH_PY, "zip(self._directions(setting.number)",
     "zip(self._directions(setting.number + 1)", (WHOLE, ZEROTH + "without_privacy_it_is_mezo")),
    ("an empty draw leaves the weights unrounded", "19", ZEROTH_PY, "        both = torch.stack(",
     f"        if not batch.micro_batches:\n            {NOTHING}\n        both = torch.stack(",
     (WEIGHTS + "an_empty_draw_rounds_weights_as_any_other",)),
    ("half the noise on slopes", "6", "privacy/noise.py", "scale = setting.noise_multiplier",
     "scale = 0.5 * setting.noise_multiplier", (NEIGHBOURS, ZEROTH + "k_numbers_are_one_gaussian_event")),
    ("noise on a copy of the slopes", "6", "methods/base.py", "self.mechanism.release(sums, batch",
     "self.mechanism.release({name: value.clone() for name, value in sums.items()}, batch", (NEIGHBOURS, WHOLE)),
    ("a stop in mid-release", "35", ZEROTH_PY, LOSSES_OF_BATCH,
     f"        if self.stop_requested:\n            raise Interrupted\n{LOSSES_OF_BATCH}",
     (WEIGHTS + "a_stop_comes_before_the_weights_are_moved",)),
    ("weights left moved after an error", "32", ZEROTH_PY, BACK,
     BACK.replace("finally:", "except ValueError:\n            raise\n        else:"),
     (WEIGHTS + "weights_are_whole_after_an_error_in_a_forward",)),
    ("weights left moved after the query", "32", ZEROTH_PY, BACK, "        finally:\n            pass\n", (QUERY, UPDATE)),
    ("smoothing off the grid", "32", ZEROTH_PY, "max(1, round(smoothing / GRID)) * GRID", "float(smoothing)",
     (WEIGHTS + "float32_weights_come_back_to_within_rounding",)),
    ("what rests is moved", "16", ZEROTH_PY, "number, self.active)", "number, self.trainable)",
     (WEIGHTS + "a_direction_runs_along_the_phase_alone",)),
    ("no pre-flight of losses", "7", ZEROTH_PY, "check_losses(self.model, losses, self._rows, collate, allowed)", "pass",
     (WEIGHTS + "preflight_looks_at_losses",)),
    ("slopes may round as they will", "27", ZEROTH_PY, "self._rows, collate, allowed)", "self._rows, collate)",
     (WEIGHTS + "preflight_knows_what_rounding_does_to_slopes",)),
    ("rounding under autocast unseen", "27", ZEROTH_PY,
     "self._rows and torch.is_autocast_enabled(self.device.type)", "False",
     (WEIGHTS + "rounding_under_autocast_is_seen_before_the_first_release",)),
    ("losses with a graph", "32", ZEROTH_PY, "    @torch.no_grad()\n    def _losses(",
     "    @torch.enable_grad()\n    def _losses(", (WEIGHTS + "losses_are_taken_without_a_graph",)),
    ("any optimizer will do", "16", ZEROTH_PY, "if not isinstance(made, SeededSGD):", "if made is None:",
     (WEIGHTS + "an_optimizer_that_wants_gradients_is_refused",)),
    ("moved weights told by rounded bits", "16", "privacy/callback.py", "in module.exact.items()}",
     "in module.trainable.items()}", (WEIGHTS + "small_updates_of_bfloat16_weights_count_as_moved",)),
]  # fmt: skip

DIRECTION_MUTANTS = [
    ("noise from the direction's stream", "30", "privacy/noise.py", 'self.key.stream("noise"', 'self.key.stream("direction"',
     (ZEROTH + "noise_is_apart_from_the_direction",)),
    ("directions from the noise's stream", "30", DIRECTIONS_PY, STREAM, STREAM.replace("direction", "noise"),
     (DIRECTIONS + "a_direction_is_its_own_stream",)),
    ("directions not keyed by the weights", "30", ZEROTH_PY, "self.mechanism.digest + self.weights", "self.mechanism.digest",
     (RUN,)),
    ("one direction for all releases", "30", ZEROTH_PY, "Direction(key, kind, release,", "Direction(key, kind, 0,", (RUN,)),
    ("K times one direction", "30", DIRECTIONS_PY, NAME, "self._names[id(parameter)]",
     (RUN, DIRECTIONS + "directions_that_differ_in_anything_are_independent")),
    ("one direction for all tensors", "30", DIRECTIONS_PY, NAME, "str(self.number)",
     (DIRECTIONS + "directions_that_differ_in_anything_are_independent",)),
    ("one direction for all blocks", "30", DIRECTIONS_PY, STREAM, STREAM.replace("block", "0"),
     (DIRECTIONS + "a_direction_is_drawn_again_as_it_was",)),
    ("the sphere is not one", "30", DIRECTIONS_PY, 'self._scale if self.kind == "sphere" else 1.0', "1.0",
     (DIRECTIONS + "length_over_all_parameters_together[sphere]",)),
    ("every sign from one bit of a word", "30", DIRECTIONS_PY, "torch.arange(32, dtype=torch.int32, device=device)[:, None]",
     "torch.full((32, 1), 5, dtype=torch.int32, device=device)", (DIRECTIONS + "moments[rademacher]",)),
    ("autocast keeps old weights", "32", DIRECTIONS_PY, "        torch.clear_autocast_cache()", "        pass",
     (DIRECTIONS + "autocast_sees_moved_weights",)),
    ("updates in the parameter's own precision", "32", DIRECTIONS_PY, ">= 4:\n            return",
     ">= 2:\n            return",
     (DIRECTIONS + "an_update_of_a_millionth_is_not_swallowed", WEIGHTS + "bfloat16_weights_come_back_bit_by_bit")),
    ("places reckoned from rounded weights", "32", DIRECTIONS_PY, ".add_(exact[place])", ".add_(flat[place])",
     (DIRECTIONS + "low_precision_stands_at_rounded_exact_places",)),
    ("float32 copies rounded by a checkpoint", "32 35", DIRECTIONS_PY,
     'self.state[parameter]["exact"] = state["exact"].detach().clone().to(parameter.device)', "assert parameter is not None",
     (DIRECTIONS + "exact_copies_outlive_a_checkpoint", WEIGHTS + "a_resumed_run_makes_the_same_weights")),
    ("the model never sees the copy", "32", DIRECTIONS_PY, "parameter.copy_(exact)", "pass",
     (DIRECTIONS + "an_update_of_a_millionth_is_not_swallowed",)),
    ("one rate for all groups", "5", DIRECTIONS_PY, '-group["lr"]', '-self.param_groups[0]["lr"]',
     (DIRECTIONS + "a_step_by_hand",)),
]  # fmt: skip

LOSSES_MUTANTS = [
    ("gates stay shut for the losses", "7", PREFLIGHT_PY, "with gates_open(trainable_parameters(model)), _nudged(model):",
     "with _nudged(model):",
     (LOSSES + "coupling_is_refused[a gate that is 0 before a mean]",)),
    ("nudged weights stay nudged", "32", PREFLIGHT_PY, "finally:\n        for view, bit in views:",
     "finally:\n        for view, bit in []:", (LOSSES + "a_right_model_passes_and_is_left_as_it_was",)),
    ("the same losses are not asked for twice", "29", PREFLIGHT_PY,
     "if not torch.equal(found.nan_to_num(), losses(collate(together)).nan_to_num()):", "if found is None:",
     (LOSSES + "dropout_is_refused",)),
    ("kept copies of weights go unnoticed", "29", PREFLIGHT_PY, "if torch.equal(before, nudged):", "if before is nudged:",
     (LOSSES + "a_kept_copy_of_the_weights_is_refused",)),
    ("rows without a finite loss pass", "9", PREFLIGHT_PY,
     "if not finite.any():\n        raise UserError(f\"None of {len(together)} examples has a finite loss",
     "if False:\n        raise UserError(f\"None of {len(together)} examples has a finite loss",
     (LOSSES + "only_rows_with_a_finite_loss_are_compared",)),
    ("rounding of losses unseen", "27", PREFLIGHT_PY, "if rounding > allowed:", "if rounding > 1:",
     (LOSSES + "rounding_beyond_what_is_allowed_is_refused",)),
    ("fewer losses than rows pass", "7", PREFLIGHT_PY, "if found.shape != (len(together),):", "if found.dim() > 1:",
     (LOSSES + "losses_are_one_a_row",)),
]  # fmt: skip

LAPLACE = "tests/methods/test_laplace.py::test_"
ACCOUNTING_PY, NOISE_PY = "privacy/accounting.py", "privacy/noise.py"
LAPLACE_MUTANTS = [
    ("Laplace noise after clipping by L2", "5", ZEROTH_PY, "return 1 if self.mechanism.plan.noise == LAPLACE else 2",
     "return 2",
     (LAPLACE + "one_example_moves_the_sum_by_at_most_c_in_l1[3]",)),
    ("Laplace accounted as Gaussian", "39", ACCOUNTING_PY, "if release.noise == LAPLACE:\n        return",
     "if False:\n        return",
     (LAPLACE + "one_release_costs_what_the_integral_says",)),
    ("sampling left out of Laplace's account", "39", ACCOUNTING_PY,
     "value_discretization_interval=grid, sampling_prob=release.sample_rate\n", "value_discretization_interval=grid\n",
     (LAPLACE + "one_release_costs_what_the_integral_says",)),
    ("pure epsilon without sampling's other side", "39", ACCOUNTING_PY, "math.log1p(release.sample_rate * math.expm1(",
     "release.sample_rate * math.log1p(math.expm1(", (LAPLACE + "pure_epsilon_is_the_largest_privacy_loss",)),
    ("Gaussian noise in a Laplace plan", "6", NOISE_PY, "if self.plan.noise == GAUSSIAN:", "if True:",
     (LAPLACE + "noise_is_laplace_of_scale_sigma_c", LAPLACE + "released_numbers_of_neighbours")),
    ("parts with Laplace noise", "6", NOISE_PY, "if parts is not None and setting.noise != GAUSSIAN:", "if False:",
     (LAPLACE + "parts_are_for_gaussian_noise",)),
    ("a plan calibrated for the other noise", "39", "privacy/plan.py", "phase.noise_multiplier, self.noise), taken",
     "phase.noise_multiplier), taken", (LAPLACE + "a_plan_is_calibrated_for_its_noise",)),
    ("the ledger forgets the kind of noise", "39", "privacy/ledger.py", "e.noise_multiplier, e.noise)",
     "e.noise_multiplier)",
     (LAPLACE + "the_ledger_keeps_the_kinds_apart",)),
    ("releases charged as Gaussian", "39", "privacy/callback.py", "weights, setting.noise)", "weights)",
     (LAPLACE + "releases_are_charged_as_laplace",)),
    ("gradients under Laplace noise", "6", "methods/base.py", "if mechanism.plan.noise not in self.noises:", "if False:",
     (LAPLACE + "methods_that_bound_gradients_refuse",)),
]  # fmt: skip

FEW_SHOT = "tests/tasks/test_few_shot.py::test_"
FEW_SHOT_PY = "tasks/few_shot.py"
FEW_SHOT_MUTANTS = [
    ("the validation split cut too", "38", FEW_SHOT_PY, 'if split != "train":', "if False:",
     (FEW_SHOT + "the_validation_split_is_whole",)),
    ("training rows under another name", "38", FEW_SHOT_PY, 'if digest == self._digests.get("train"):', "if False:",
     (FEW_SHOT + "the_train_split_under_another_name_is_refused",)),
    ("the first rows of each class", "36", FEW_SHOT_PY,
     "np.random.default_rng([self.seed, number]).choice(rows, min(self.per_class, len(rows)), replace=False)",
     "rows[: self.per_class]",
     (FEW_SHOT + "the_seed_alone_decides",)),
    ("rows chosen twice", "15", FEW_SHOT_PY, "len(rows)), replace=False", "len(rows)), replace=True",
     (FEW_SHOT + "k_rows_of_each_class_in_the_order_of_the_source",)),
    ("the card does not say for whom", "38", "privacy/card.py", "*([selection] if selection else [])", "",
     (FEW_SHOT + "a_selection_is_a_limit_of_the_card",)),
]  # fmt: skip

ZEROTH_ORDER_MUTANTS = [*LAPLACE_MUTANTS, *FEW_SHOT_MUTANTS, *QUERY_MUTANTS, *DIRECTION_MUTANTS, *LOSSES_MUTANTS]
