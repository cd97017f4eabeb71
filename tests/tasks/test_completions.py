"""Greedy completions and SQuAD's scores: by hand, and whatever the batch."""

import copy
import itertools

import peft
import pytest
import torch
import transformers
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import WordLevel

from privzoo.errors import UserError
from privzoo.tasks.completions import Completions
from privzoo.tasks.decoding import _Printed, continued, generated
from privzoo.tasks.language_modelling import PromptCompletion

ROWS = {
    "c": ["w1 w2 w3", "w4", "w5 w6 w7 w8 w9", "w10 w11"],
    "answers": [["w12"], ["w13 w14", "w15"], ["w16 w17"], ["w18", "w19", "w20 w21"]],
}


@pytest.fixture
def ready(source, folder, gpt_tokenizer):
    def of(rows=ROWS, max_new_tokens=5, max_length=16, tokenizer=gpt_tokenizer):
        completions = Completions("answers", max_new_tokens)
        task = PromptCompletion("qa", source, "{c} w0", "{answers}", max_length, completions)
        task.load(folder(train=rows, validation=rows))
        task.prepare(tokenizer)
        return task

    return of


@pytest.mark.parametrize(
    ("said", "true", "f1", "exact"),
    [
        ("Denver Broncos", ["Denver Broncos"], 1.0, 1.0),
        ("the  DENVER broncos.", ["Denver Broncos"], 1.0, 1.0),  # case, article, point and blanks do not count
        ("a Broncos", ["Denver Broncos"], 2 / 3, 0.0),  # precision 1, recall 1/2
        ("Broncos of Denver", ["Denver Broncos", "Broncos"], 0.8, 0.0),  # the better of 4/5 and 1/2
        ("x", ["y", "X"], 1.0, 1.0),  # any reference
        ("", ["Denver"], 0.0, 0.0),
        ("  The cat's, an (old) one -- A.  ", ["cats old one"], 1.0, 1.0),
        ("a.an", ["aan"], 1.0, 1.0),  # punctuation goes before articles do
        ("Theatre", ["atre"], 0.0, 0.0),
        ("no no yes", ["no yes yes"], 2 / 3, 0.0),  # words count as often as they stand
    ],
)
def test_scores_by_hand(said, true, f1, exact):
    found = Completions("answers", 8).scores([said], [true])
    assert found == {"f1": pytest.approx(f1, abs=1e-6), "exact_match": exact}


def test_the_scores_are_means_over_rows():
    found = Completions("answers", 8).scores(["x", "y z", "q"], [["x"], ["y"], ["r"]])
    assert found["exact_match"] == pytest.approx(1 / 3)
    assert found["f1"] == pytest.approx((1 + 2 / 3 + 0) / 3)


def by_hand(model, ids, new_tokens, end=0, once=0, least=0):
    """Token by token, by the definition: the likeliest next one until the end token, but for one that says an n-gram of this
    completion again or ends it too soon."""
    made = []
    with torch.no_grad():
        while len(made) < new_tokens:
            said = {tuple(made[i : i + once]) for i in range(len(made) - once + 1)} if once else set()
            order = model(torch.tensor([ids + made])).logits[0, -1].argsort(descending=True).tolist()
            free = (token for token in order if (*made, token)[-once:] not in said) if said else iter(order)
            best = next(token for token in free if token != end or len(made) >= least)
            if best == end:
                break
            made.append(best)
    return made


def test_a_completion_is_the_likeliest_token_after_token_whatever_stands_beside_it(ready, gpt, gpt_tokenizer):
    task, completions = ready(), Completions("answers", 5)
    prompts = [row["input_ids"][: row["context"]].tolist() for row in (task.validation[i] for i in range(4))]
    assert len({len(prompt) for prompt in prompts}) > 1
    expected = [gpt_tokenizer.decode(by_hand(gpt, prompt, 5), skip_special_tokens=True) for prompt in prompts]
    assert completions.made(gpt.eval(), gpt_tokenizer, prompts) == expected
    assert [completions.made(gpt, gpt_tokenizer, [prompt])[0] for prompt in prompts] == expected
    assert len(set(expected)) > 1, "a model that says the same of everything shows nothing"


@pytest.mark.parametrize("num_beams", [1, 2])
def test_an_ngram_comes_once_though_the_prompt_says_it(num_beams, gpt, gpt_tokenizer):
    """transformers' own option counts the prompt's, too: a summary could not quote its article."""
    free = [by_hand(gpt, prompt, 12) for prompt in ([3, 4, 5], [6], [7, 8])]
    assert any(len(made) - 1 > len(set(itertools.pairwise(made))) for made in free), "nothing repeats itself"
    settings = {"max_new_tokens": 12, "num_beams": num_beams}
    once = generated(gpt.eval(), gpt_tokenizer, free, once=2, **settings)
    assert all(len(made) - 1 == len(set(itertools.pairwise(made))) for made in once)
    assert any(set(itertools.pairwise(made)) & set(itertools.pairwise(said)) for made, said in zip(once, free, strict=True))
    if num_beams == 1:
        assert once == [by_hand(gpt, prompt, 12, once=2) for prompt in free]
    asked = Completions("answers", 12, num_beams=num_beams, no_repeat_ngram_size=2)
    assert asked.made(gpt, gpt_tokenizer, free) == gpt_tokenizer.batch_decode(once, skip_special_tokens=True)


def test_a_completion_does_not_end_too_soon(gpt, gpt_tokenizer):
    said = {start: by_hand(gpt, [start], 2) for start in range(3, 30)}
    start, end = next((start, made[1]) for start, made in said.items() if made[1] < 32 and made[0] != made[1])
    prompt = [start]  # after which the model says `end` second
    gpt_tokenizer.eos_token = gpt_tokenizer.convert_ids_to_tokens(end)
    expected = by_hand(gpt, prompt, 6, end, least=4)
    assert len(expected) >= 4
    assert generated(gpt, gpt_tokenizer, [prompt], max_new_tokens=6, min_new_tokens=4) == [expected]
    asked = Completions("answers", 6, min_new_tokens=4)
    assert asked.made(gpt, gpt_tokenizer, [prompt]) == [gpt_tokenizer.decode(expected, skip_special_tokens=True)]
    assert generated(gpt, gpt_tokenizer, [prompt], max_new_tokens=6) == [by_hand(gpt, prompt, 6, end)]


def test_an_empty_prompt_is_gone_on_from(gpt, gpt_tokenizer):
    expected = [gpt_tokenizer.decode(by_hand(gpt, prompt, 5)) for prompt in ([0], [3, 4])]
    assert Completions("answers", 5).made(gpt.eval(), gpt_tokenizer, [[], [3, 4]]) == expected


@pytest.mark.parametrize("adapted", [False, True])
def test_the_models_own_settings_of_generation_take_no_part_and_stay(adapted, gpt, gpt_tokenizer):
    """Such as a penalty on repetition, which checkpoints for chat come with."""
    prompts = [[3, 4, 5], [6], [7, 8]]
    expected = [gpt_tokenizer.decode(by_hand(gpt, prompt, 5)) for prompt in prompts]
    own = {"repetition_penalty": 7.0, "min_new_tokens": 5, "do_sample": True, "num_return_sequences": 2}
    gpt.generation_config.update(**own)
    model = peft.get_peft_model(gpt, peft.LoraConfig(target_modules=["c_attn"])) if adapted else gpt
    before = copy.deepcopy(gpt.generation_config)
    assert Completions("answers", 5).made(model.eval(), gpt_tokenizer, prompts) == expected
    assert gpt.generation_config.to_dict() == model.generation_config.to_dict() == before.to_dict()


def asked_for(task, model, monkeypatch):
    """The prompts that an evaluation of all validation rows asks the model to go on from."""
    asked = []

    def made(self, model, processor, prompts):
        asked.extend(prompts)
        return ["w1"] * len(prompts)

    monkeypatch.setattr(Completions, "made", made)
    task.evaluate(model, [task.collate([task.validation[i] for i in range(len(task.validation))])])
    return asked


def test_a_prompt_hangs_on_no_answer(ready, gpt, monkeypatch):
    """A long answer takes room from its prompt in training; where an answer is asked for it may not show."""
    long = ROWS | {"answers": [[" ".join(["w12"] * 20)], *ROWS["answers"][1:]]}
    assert ready(long).validation[0]["context"] < ready().validation[0]["context"]
    assert asked_for(ready(long), gpt, monkeypatch) == asked_for(ready(), gpt, monkeypatch)


def test_a_prompt_too_long_loses_its_beginning_and_keeps_its_start_token(ready, gpt, bos_tokenizer, monkeypatch):
    rows = {"c": [" ".join(f"w{i}" for i in range(1, 25)), "w4"], "answers": [["w12"], ["w13"]]}
    first, second = asked_for(ready(rows, tokenizer=bos_tokenizer), gpt, monkeypatch)
    assert first == [0, *(3 + i for i in range(16, 25)), 3]  # 16 - 5 tokens: <s>, the last nine words, w0 of the template
    assert second == [0, 7, 3]


@pytest.mark.parametrize("size", [1, 3, 4])
def test_evaluate_holds_each_completion_against_the_references_of_its_own_row(ready, gpt, size, monkeypatch, batches):
    task = ready()
    answers = {0: "w12", 1: "w15", 2: "w17", 3: "no"}  # right; right by the second reference; half; wrong
    rows = [task.validation[i] for i in range(4)]
    prompts = {tuple(row["input_ids"][: row["context"]].tolist()): i for i, row in enumerate(rows)}

    def made(self, model, processor, asked):
        return [answers[prompts[tuple(prompt)]] for prompt in asked]

    monkeypatch.setattr(Completions, "made", made)
    order = [rows[i] for i in (2, 0, 3, 1)]
    scores = task.evaluate(gpt, [task.collate(rows) for rows in batches(order, size)])
    assert scores["exact_match"] == 0.5
    assert scores["f1"] == pytest.approx((1 + 1 + 2 / 3 + 0) / 4)
    assert tuple(scores) == task.metrics == ("f1", "exact_match", "perplexity", "token_accuracy", "loss")
    assert task.higher_is_better is True


def test_training_takes_the_first_reference_and_the_digest_sees_them_all(ready):
    task = ready()
    row = task.train[1]
    assert row["input_ids"].tolist()[row["context"] :] == [15, 16, 0]  # w13 w14 <end>
    changed = ROWS | {"answers": [["w12"], ["w13 w14", "w29"], ["w16 w17"], ["w18", "w19", "w20 w21"]]}
    moved = ROWS | {"answers": [["w12", "w13 w14"], ["w15"], ["w16 w17"], ["w18", "w19", "w20 w21"]]}
    assert len({task.fingerprint(), ready(changed).fingerprint(), ready(moved).fingerprint()}) == 3


def test_the_row_number_reaches_no_model(ready, gpt):
    task = ready()
    batch = task.collate([task.train[i] for i in range(4)])
    other = batch | {"row": batch["row"] + 7}
    assert torch.equal(task.losses(gpt, batch), task.losses(gpt, other))


@pytest.mark.parametrize("new_tokens", [0, 16, 40, None, "5", 8.5, True])
def test_room_for_prompt_and_completion(source, new_tokens):
    with pytest.raises(UserError, match=f"max_new_tokens={new_tokens}, expected a whole number from 1 to 15"):
        PromptCompletion("qa", source, "{c}", "{answers}", 16, Completions("answers", new_tokens))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_beams": 0}, "num_beams=0 to be a whole number of at least 1"),
        ({"no_repeat_ngram_size": -1}, "no_repeat_ngram_size=-1 to be a whole number of at least 0"),
        ({"no_repeat_ngram_size": 2.5}, "no_repeat_ngram_size=2.5 to be a whole number"),
        ({"min_new_tokens": True}, "min_new_tokens=True to be a whole number"),
        ({"min_new_tokens": 9}, "min_new_tokens=9 is above max_new_tokens=8"),
    ],
)
def test_numbers_of_a_completion(options, message, source):
    with pytest.raises(UserError, match=message):
        PromptCompletion("qa", source, "{c}", "{answers}", 16, Completions("answers", 8, **options))


def test_a_completion_keeps_the_blank_that_it_begins_with(capsys):
    """SentencePiece's decoder leaves it out at the beginning of what it is given."""
    words = Tokenizer(WordLevel({"▁a": 0, "▁b": 1, "▁c": 2}, unk_token="▁a"))
    words.pre_tokenizer, words.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    processor = transformers.PreTrainedTokenizerFast(tokenizer_object=words)
    assert processor.decode([1, 2]) == "b c"
    assert continued(processor, [0], [1, 2]) == " b c"
    printed = _Printed(processor, [0])
    for ids in ([[0]], [1], [2]):
        printed.put(torch.tensor(ids))
    printed.end()
    assert capsys.readouterr().out == " b c\n"
