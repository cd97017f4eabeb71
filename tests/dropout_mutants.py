"""Wrong dropout: (name, lines, file, old, new, tests) as in tests/mutants.py."""

MASKS, METHODS = "tests/privacy/test_dropout.py::test_", "tests/methods/test_dropout.py::test_"
PREFLIGHT = "tests/privacy/test_preflight.py::test_"
DROPOUT_PY, COUPLING_PY, SAMPLING_PY = "privacy/dropout.py", "privacy/coupling.py", "privacy/sampling.py"

DROPOUT_MUTANTS = [
    ("torch's own masks", "28 29", "methods/base.py", "with self.dropout.of(micro_batch):", "if micro_batch is not None:",
     (METHODS + "one_example_less_moves_the_sum_by_at_most_c", METHODS + "engines_and_micro_batches_agree",
      METHODS + "both_losses_of_a_slope_see_the_same_masks", METHODS + "preflight_and_resume")),
    ("masks by the place in the micro-batch", "28", DROPOUT_PY,
     "for example in self.rows.examples", "for example in range(len(self.rows.examples))",
     (MASKS + "an_examples_mask_does_not_hang_on_who_else_is_there",
      METHODS + "one_example_less_moves_the_sum_by_at_most_c")),
    ("examples named by their place in the micro-batch", "28", SAMPLING_PY, "[number for number, _ in part]",
     "list(range(len(part)))", (METHODS + "engines_and_micro_batches_agree",)),
    ("the same masks in every release", "28", DROPOUT_PY, 'stream("dropout", self.rows.release,', 'stream("dropout", 0,',
     (MASKS + "masks_of_other_things_are_others[release]", METHODS + "masks_are_others_in_another_release")),
    ("the same masks in every run", "28", DROPOUT_PY, "self.rows.release, self.digest,", 'self.rows.release, "",',
     (MASKS + "masks_of_other_things_are_others[digest]",)),
    ("the same masks at every place", "28", DROPOUT_PY, "self.uses += 1", "pass",
     (MASKS + "masks_of_other_things_are_others[place]",)),
    ("dropout does not scale what it leaves", "28", DROPOUT_PY, ".div_(1 - p)", "",
     (MASKS + "a_share_p_is_dropped_and_the_rest_grows",)),
    ("evaluation takes masks", "28", DROPOUT_PY, "if not training or p == 0:", "if p == 0:",
     (MASKS + "dropout_that_is_off_takes_no_mask",)),
    ("attention's dropout keyed as if it were rows", "28", DROPOUT_PY, "value.dim() not in (2, 3)", "value.dim() < 2",
     (MASKS + "what_cannot_be_keyed_is_refused",)),
    ("rows elsewhere keyed as if they came first", "28", DROPOUT_PY, "or len(value) != len(self.rows.examples)", "",
     (MASKS + "what_cannot_be_keyed_is_refused",)),
    ("attention drops by itself", "28", DROPOUT_PY, "if p > 0:", "if p > 1:", (MASKS + "what_cannot_be_keyed_is_refused",)),
    ("a number of a module's own is no dropout", "28", DROPOUT_PY, '"drop" in name', '"droq" in name',
     (MASKS + "dropout_of_every_kind_is_found",)),
    ("a draw of too few names gets masks", "28", DROPOUT_PY, "or len(micro_batch.examples) != micro_batch.rows", "",
     (METHODS + "a_draw_of_too_few_names",)),
    ("only plain dropout keyed, the rest torch's", "28", COUPLING_PY, "isinstance(module, _DropoutNd) and", "False and",
     (PREFLIGHT + "dropout_of_other_kinds[Dropout2d]",)),
    ("dropout beside checkpointing let through", "28", COUPLING_PY, "if dropping and", "if False and",
     (PREFLIGHT + "dropout_beside_gradient_checkpointing",)),
    ("attention's dropout set from the configuration", "28", "models/loading.py",
     "0.0 if any(part in name for part in _ALWAYS_OFF) else dropout", "dropout",
     ("tests/models/test_loading.py::test_every_dropout_but_that_of_attention_is_set",)),
]  # fmt: skip
