"""Wrong adapters, 4-bit bases and phases: (name, lines, file, old, new, tests) as in tests/mutants.py."""

CONTRACT, ADAPTERS = "tests/methods/test_contract.py::test_", "tests/models/test_adapters.py::test_"
QUANTIZATION, COMPOSITION = "tests/models/test_quantization.py::test_", "tests/test_composition.py::test_"
TRAINABLE, RESUME = "tests/methods/test_trainable.py::test_", "tests/test_resume.py::test_"
BASE_PY, TRAINABLE_PY, CONFIG_PY = "methods/base.py", "methods/trainable.py", "config.py"
ADAPTERS_PY, QUANTIZATION_PY = "models/adapters.py", "models/quantization.py"
TWO_PHASES = CONTRACT + "the_twin_is_ordinary_training[dp_bitfit_two_phase]"

ZOO_MUTANTS = [
    ("the second phase trains what the first did", "16", BASE_PY, "self.start_phase(setting.phase)", "pass", (TWO_PHASES,)),
    ("moments outlive a phase", "24", BASE_PY, "self._optimizer().state.clear()", "pass", (TWO_PHASES,)),
    ("one lr for all phases", "24", "methods/schedule.py", "self.highest[setting.phase] *", "self.highest[0] *",
     (TWO_PHASES,)),
    ("a resumed run is in the first phase", "35", BASE_PY, "        if start:\n", "        if False:\n",
     (RESUME + "two_phases_are_one_account_on_both_sides_of_the_boundary[within the second phase]",)),
    ("phases of any length", "24", CONFIG_PY, "or (left > 0) != (None in given) or left < 0", "",
     (COMPOSITION + "phases_must_come_to_the_epochs",)),
    ("one clip norm for all phases", "6", CONFIG_PY, 'float(phase.get("clip_norm", cfg.clip_norm))', "float(cfg.clip_norm)",
     (COMPOSITION + "the_plan_of_phases",)),
    ("one batch size for all phases", "4", CONFIG_PY, 'phase.get("batch_size", cfg.batch_size)', "cfg.batch_size",
     (COMPOSITION + "the_plan_of_phases",)),
    ("frozen weights are not looked at", "26", BASE_PY, "if name not in self.trainable)", "if name in self.trainable)",
     (CONTRACT + "a_frozen_weight_that_moves_is_noticed",)),
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
     "chosen = set(names)", (TRAINABLE + "chosen_parameters_and_the_new_head[head-expected4]",)),
]  # fmt: skip
