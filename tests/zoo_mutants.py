"""Wrong adapters, 4-bit bases and phases: (name, lines, file, old, new, tests) as in tests/mutants.py."""

CONTRACT, ADAPTERS = "tests/methods/test_contract.py::test_", "tests/models/test_adapters.py::test_"
QUANTIZATION, COMPOSITION = "tests/models/test_quantization.py::test_", "tests/test_composition.py::test_"
SPLITS, IDENTITY = "tests/tasks/test_splits.py::test_", "tests/test_identity.py::test_what_a_users_method_imports_counts"
TRAINABLE = "tests/methods/test_trainable.py::test_"
BASE_PY, TRAINABLE_PY, CONFIG_PY = "methods/base.py", "methods/trainable.py", "config.py"
ADAPTERS_PY, QUANTIZATION_PY = "models/adapters.py", "models/quantization.py"
TWO_PHASES = CONTRACT + "the_twin_is_ordinary_training[dp_bitfit_two_phase]"

ZOO_MUTANTS = [
    ("training rows are scored as validation", "22", "run.py", "refuse_same_rows(task.train, task.validation)", "pass",
     ("tests/test_bad_input.py::test_training_rows_are_not_validation_rows",)),
    ("rows of one length are the same", "22", "tasks/splits.py", "return all(name in other and",
     "return True or all(name in other and",
     (SPLITS + "the_same_rows_under_two_names_are_refused",)),
    ("further splits unseen", "22", "tasks/splits.py", "in {0, len(validation) - len(train)}:", "in {0}:",
     (SPLITS + "the_same_rows_under_two_names_are_refused",)),
    ("slices that meet pass", "22", "tasks/splits.py", "return max(a[0], b[0]) < min(a[1], b[1])", "return a == b",
     (SPLITS + "a_split_with_rows_of_the_training_split_is_refused[train[:10%]]",)),
    ("sums of splits pass", "22", "tasks/splits.py", 'for a in one.split("+")', "for a in [one]",
     (SPLITS + "a_split_with_rows_of_the_training_split_is_refused[train+validation]",)),
    ("slices of two units pass", "22", "tasks/splits.py", "or a[2] != b[2]", "", (SPLITS + "what_cannot_be_told_may_meet",)),
    ("what a user's code imports does not count", "35", "identity.py", "for file in map(Path, imported) if",
     "for file in map(Path, ()) if", (IDENTITY,)),
    ("what a user's code imports late does not count", "35", "identity.py", "return named | beside |", "return named |",
     (IDENTITY,)),
    ("a base in 8 bits passes", "12", "models/loading.py", 'not stored.get("load_in_4bit")', "False",
     ("tests/models/test_loading.py::test_a_base_in_8_bits_is_refused",)),
    ("evaluate scores in another precision", "24", "evaluate.py", "score(task, model.to(device), cfg, device)",
     'score(task, model.to(device), OmegaConf.merge(cfg, {"trainer": {"precision": "32-true"}}), device)',
     ("tests/test_run.py::test_the_other_methods_and_the_score_again"
      "[task=toy_text method=dp_head trainer.precision=bf16-mixed]",)),
    ("quantised weights are chosen with the floats", "16", TRAINABLE_PY, 'pattern == "all" or parameter.is_floating_point()',
     "True", (TRAINABLE + "a_quantised_base_is_not_trained_itself",)),
    ("later phases count the first one's batch", "24", "privacy/plan.py", "drawn + taken * phase.batch_size",
     "drawn + taken * self.batch_size", ("tests/privacy/test_plan.py::test_phases_are_composed_in_one_account",)),
    ("the second phase trains what the first did", "16", BASE_PY, "self.start_phase(setting.phase)", "pass", (TWO_PHASES,)),
    ("moments outlive a phase", "24", BASE_PY, "self._optimizer().state.clear()", "pass", (TWO_PHASES,)),
    ("one lr for all phases", "24", "methods/schedule.py", "self.highest[setting.phase] *", "self.highest[0] *",
     (TWO_PHASES,)),
    ("a resumed run is in the first phase", "35", BASE_PY, "        if start:\n", "        if False:\n",
     (CONTRACT + "goes_on_from_a_checkpoint[dp_bitfit_two_phase]",)),
    ("phases of any length", "24", CONFIG_PY, "or (left > 0) != (None in given) or left < 0", "",
     (COMPOSITION + "phases_must_come_to_the_epochs",)),
    ("one clip norm for all phases", "6", CONFIG_PY, 'float(phase.get("clip_norm", cfg.clip_norm))', "float(cfg.clip_norm)",
     (COMPOSITION + "the_plan_of_phases",)),
    ("one batch size for all phases", "4", CONFIG_PY, 'phase.get("batch_size", cfg.batch_size)', "cfg.batch_size",
     (COMPOSITION + "the_plan_of_phases",)),
    ("frozen weights are not looked at", "26", BASE_PY, "if name not in self.trainable)", "if name in self.trainable)",
     (CONTRACT + "a_frozen_weight_or_buffer_that_moves_is_noticed",)),
    ("the new head stays as drawn beside an adapter", "16", ADAPTERS_PY, '"modules_to_save": heads or None',
     '"modules_to_save": None', (ADAPTERS + "lora_lies_on_query_and_value_and_the_new_head_is_trained_with_it",)),
    ("an adapter from the global generator", "36", ADAPTERS_PY, "torch.manual_seed(seed)", "pass",
     (ADAPTERS + "an_adapter_changes_nothing_at_first_and_hangs_on_its_seed_alone",)),
    ("an adapter that moves the global generator", "36", ADAPTERS_PY, "with torch.random.fork_rng(devices=[]):", "if True:",
     (ADAPTERS + "an_adapter_changes_nothing_at_first_and_hangs_on_its_seed_alone",)),
    ("new biases on the output too", "16", ADAPTERS_PY, "and module is not output", "",
     (ADAPTERS + "new_biases_move_every_linear_layer_of_the_body",)),
    ("weights packed anew at a validation", "26", QUANTIZATION_PY, "support_avx512bf16_for_cpu = False",
     "support_avx512bf16_for_cpu = True", (QUANTIZATION + "the_body_is_in_4_bits_twice_quantised_and_the_rest_is_not",)),
    ("biases rounded by the first forward pass", "26", QUANTIZATION_PY, "layer.bias.data.to(layer.compute_dtype)",
     "layer.bias.data", (QUANTIZATION + "the_base_is_never_written",)),
    ("quantised once", "26", QUANTIZATION_PY, "bnb_4bit_use_double_quant=True", "bnb_4bit_use_double_quant=False",
     (QUANTIZATION + "the_body_is_in_4_bits_twice_quantised_and_the_rest_is_not",)),
    ("a probe of the whole model", "16", TRAINABLE_PY, "chosen = set(new_head) or _outside_the_body(model)",
     "chosen = {n for n, _ in model.named_parameters()}",
     (TRAINABLE + "chosen_parameters_and_the_new_head[head-expected5]",)),
]  # fmt: skip
