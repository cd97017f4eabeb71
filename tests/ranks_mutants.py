"""Wrong runs of several processes: (name, lines, file, old, new, tests) as in tests/mutants.py."""

RANKS, LAUNCH = "tests/privacy/test_ranks.py::test_", "tests/test_launch.py::test_"
METHODS, CALLBACK = "tests/methods/test_ranks.py::test_", "tests/privacy/test_callback.py::test_"
RANKS_PY, BASE_PY, CALLBACK_PY = "privacy/ranks.py", "methods/base.py", "privacy/callback.py"

ADD_UP = "        self.ranks.add_up(sums)\n"
RELEASE = "        self.mechanism.release(sums, batch.release, self.weights, self.parts(batch.release))\n"
PRIVATE_DATA_END = "        # ---- private data end here ----\n"

RANKS_MUTANTS = [
    ("every rank treats the whole draw", "18", RANKS_PY, "return drawn[self.rank :: self.count]", "return drawn",
     (RANKS + "shares_are_the_draw", METHODS + "two_processes_are_one[dp_full]")),
    ("the first rank treats the whole draw", "18", RANKS_PY, "return drawn[self.rank :: self.count]",
     "return drawn if self.first else drawn[:0]", (RANKS + "shares_are_the_draw",)),
    ("shares hang on lengths", "18", "privacy/sampling.py", "for unit in ranks.share(drawn)]",
     "for unit in ranks.share(np.array(sorted(drawn, key=lambda unit: self.length(self.rows[unit]))))]",
     (RANKS + "shares_do_not_hang_on_what_a_process_makes_of_a_row",)),
    ("each rank updates by its own share", "17", BASE_PY, ADD_UP, "",
     (METHODS + "two_processes_are_one[dp_full]", METHODS + "two_processes_are_one[dpzero]")),
    ("every rank's noise is in the sum", "17", BASE_PY, ADD_UP + PRIVATE_DATA_END + RELEASE, RELEASE + ADD_UP,
     (METHODS + "noise_is_drawn_once_for_all", METHODS + "noise_is_that_of_one_process[dp_full]")),
    ("ranks with other weights add up", "17", RANKS_PY, "if any(not torch.equal(each[1:], own[1:]) for each in found):",
     "if False:", (RANKS + "a_stop_and_weights_are_everybodys",)),
    ("a rank ends alone", "35", RANKS_PY, "return any(bool(each[0]) for each in found)", "return stop",
     (RANKS + "a_stop_and_weights_are_everybodys",)),
    ("a rank ends without its share", "18", BASE_PY, "return self.stop_requested and self.ranks.count == 1",
     "return self.stop_requested", (METHODS + "a_rank_gives_its_share_before_it_stops",)),
    ("sums of all types travel as one", "17", RANKS_PY,
     "alike = bucket and (value.dtype, value.device) == (bucket[0].dtype, bucket[0].device)", "alike = True",
     (RANKS + "sums_are_added_up_bucket_by_bucket",)),
    ("processes that know nothing of one another", "18", CALLBACK_PY, "(trainer.world_size, ranks.count,", "(1, 1,",
     (CALLBACK + "several_processes_are_refused",)),
    ("a strategy that adds up gradients", "17", CALLBACK_PY, "Replicas.__name__ if ranks.count > 1 else ", "",
     (CALLBACK + "several_processes_are_refused",)),
    ("half of a draw by one process", "18", CALLBACK_PY, "if batches.ranks != ranks:", "if False:",
     (CALLBACK + "a_loader_of_another_share_is_refused",)),
    ("a filler is in the sum", "18", "methods/first_order.py",
     "            self.engine(lambda each=filler: self.losses(each), clip_norm)",
     "            self.engine(lambda each=filler: self.losses(each), clip_norm, into=sums)",
     (METHODS + "two_processes_are_one[dp_bitfit, dealt out]",)),
    ("a filler's slopes are in the sum", "18", "methods/zeroth_order.py", "            self.losses(filler)",
     "            found.append(self._by_unit(filler))",
     (METHODS + "two_processes_are_one[dpzero of an adapter, dealt out]",)),
    ("ranks make other passes", "18", "privacy/clipping/book_keeping.py", "if seen.layouts.closed:", "if False:",
     (METHODS + "no_rank_makes_a_proof_of_its_own_after_the_preflight",)),
    ("ranks with other data", "18 24", "identity.py",
     'ranks.require_equal("configuration, data, weights, code and versions", digest)', "pass",
     (LAUNCH + "ranks_that_see_other_data",)),
]  # fmt: skip
