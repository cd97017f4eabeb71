"""Wrong clipping functions, adaptive clipping, optimizers and averages: (name, lines, file, old, new, tests) as in
tests/mutants.py."""

FUNCTIONS = "tests/privacy/clipping/test_functions.py::test_"
(FUNCTIONS_PY, LOOP_PY, BOOK_KEEPING_PY, GROUPED_PY, TWO_PASS_PY, OPACUS_PY) = (
    f"privacy/clipping/{name}.py"
    for name in ("functions", "loop", "book_keeping", "grouped", "ghost_two_pass", "opacus_hooks")
)
PREFLIGHT_PY = "privacy/preflight.py"

FUNCTION_MUTANTS = [
    ("AUTO-V divides by a norm that has underflowed", "5", FUNCTIONS_PY, "norms.clamp(min=SMALLEST_NORM)",
     "norms.clamp(min=1e-37)", (FUNCTIONS + "gradients_of_any_size_in_float32[1e-30-AutoV-BookKeeping]",)),
    ("AUTO-S takes gamma off", "5", FUNCTIONS_PY, "norms + self.stability", "(norms - self.stability).abs()",
     (FUNCTIONS + "by_hand", FUNCTIONS + "the_shipped_functions_keep_the_bound[AutoS]")),
    ("AUTO-S clips by nothing", "5", FUNCTIONS_PY, "clip_norm / divisors,", "clip_norm / divisors.clamp(max=1),",
     (FUNCTIONS + "one_example_moves_the_sum_by_at_most_c[BookKeeping-AutoS]",)),
    ("automatic clipping keeps a poisoned norm", "9", FUNCTIONS_PY,
     "torch.where(torch.isfinite(norms), clip_norm / divisors, torch.zeros_like(norms))", "clip_norm / divisors",
     (FUNCTIONS + "the_shipped_functions_keep_the_bound[AutoV]", FUNCTIONS + "a_poisoned_row_is_left_out[BookKeeping-AutoS]")),
    ("the twin is normalised", "5", FUNCTIONS_PY, "    if math.isinf(clip_norm):\n        return clip_factors(norms, clip_norm)\n",
     "    clip_norm = min(clip_norm, 1e9)\n", (FUNCTIONS + "the_shipped_functions_keep_the_bound[AutoS]",)),
    ("a stability constant of nothing", "5", FUNCTIONS_PY, "not SMALLEST_NORM <= self.stability", "not -9 <= self.stability",
     (FUNCTIONS + "stability_out_of_range",)),
    ("factors that hang on other units accepted", "5", FUNCTIONS_PY, "if factor != own or factor < 0", "if factor < 0",
     (FUNCTIONS + "a_function_that_breaks_the_promise_is_refused[by the largest]",)),
    ("contributions above C accepted", "5", FUNCTIONS_PY, " or not within:", ":",
     (FUNCTIONS + "a_function_that_breaks_the_promise_is_refused[a little too long]",)),
    ("the loop clips flat", "5 33", LOOP_PY, "self.clipping(_norm", "FLAT(_norm", (FUNCTIONS + "the_loop_by_hand",)),
    ("the engine clips flat", "33", BOOK_KEEPING_PY, "self.clipping(norms, clip_norm)", "FLAT(norms, clip_norm)",
     (FUNCTIONS + "every_engine_equals_the_loop[BookKeeping-AutoV-rows]",)),
    ("groups are clipped flat", "33", GROUPED_PY, "self.grouping.clipping(squares", "FLAT(squares",
     (FUNCTIONS + "every_engine_equals_the_loop[by layer-AutoV-rows]",)),
    ("two passes clip flat", "33", TWO_PASS_PY, "factors = self.clipping(", "factors = FLAT(",
     (FUNCTIONS + "every_engine_equals_the_loop[GhostTwoPass-AutoV-rows]",)),
    ("what replaces the second pass clips flat", "33", TWO_PASS_PY, "BookKeeping(self.model, clipping=self.clipping)",
     "BookKeeping(self.model)", (FUNCTIONS + "a_poisoned_row_is_left_out[GhostTwoPass-AutoV]",)),
    ("Opacus' gradients are clipped flat", "33", OPACUS_PY, "factors = self.clipping(", "factors = FLAT(",
     (FUNCTIONS + "every_engine_equals_the_loop[OpacusHooks-AutoV-rows]",)),
    ("the pre-flight's loop clips flat", "33", PREFLIGHT_PY, "Loop(model, groups, clipping), None", "Loop(model, groups), None",
     (FUNCTIONS + "the_preflight_compares_by_the_engines_own_function[AutoV-all]",)),
    ("the pre-flight believes a clipping function", "5", PREFLIGHT_PY, '    check_function(getattr(engine, "clipping", FLAT))\n',
     "", (FUNCTIONS + "the_preflight_refuses_a_wrong_function",)),
]  # fmt: skip

CLIPPING_MUTANTS = [*FUNCTION_MUTANTS]
