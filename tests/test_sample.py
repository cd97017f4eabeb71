"""`python -m privzoo.sample`: completions of a run's own model, before and after."""

import json

import pytest

from privzoo.errors import UserError
from privzoo.sample import sample

NAMES = ["Anchor", "Basil", "Clove", "Elm", "Fig", "Iris", "Mango", "Sage"]
ASKED = "name : Basil ; food : 3"
PROMPTS = ["name : Quince ; price : high ; food : greek =", "name : Olive ; area : beach ="]


@pytest.fixture(scope="module")
def run(tmp_path_factory, privzoo):
    """A run over a file of one's own, whose answers are all alike."""
    folder = tmp_path_factory.mktemp("sample")
    rows = [{"q": f"name : {NAMES[i % 8]} ; food : {i}", "a": "Quill serves bread ."} for i in range(200)]
    (folder / "own.json").write_text(json.dumps(rows))
    code, output = privzoo(
        "task=jsonl", "method=dp_full", "model=tiny_lm", "eps=inf", f"data.path={folder}/own.json",
        "task.data.columns={prompt: q, response: a}", "task.complete=8", "task.max_length=48", "batch_size=50", "epochs=4",
        "lr=3e-3", "trainer.accelerator=cpu", f"output_dir={folder}/runs",
    )  # fmt: skip
    assert code == 0, output
    (made,) = (folder / "runs").iterdir()
    return made


def test_one_prompt_streams_to_the_terminal(run, privzoo):
    """And the task's template is put around it: it learned to answer after one."""
    code, output = privzoo(f"run={run}", f"prompt={ASKED}", "max_new_tokens=12", module="privzoo.sample")
    assert code == 0, output
    assert output.startswith(ASKED)
    assert "Quill serves bread ." in output
    code, before = privzoo(f"run={run}", f"prompt={ASKED}", "untrained=true", module="privzoo.sample")
    assert code == 0, before
    assert "Quill serves bread ." not in before


def test_a_batch_of_prompts_from_a_file(run, privzoo, tmp_path):
    """Each completion stands after its own prompt, whatever is in the batch."""
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS) + "\n\n")
    code, output = privzoo(f"run={run}", f"prompts={tmp_path}/prompts.txt", "raw=true", module="privzoo.sample")
    assert code == 0, output
    alone = [sample(str(run), [prompt], raw=True)[0] for prompt in PROMPTS]
    assert output.strip() == "\n\n".join(f"{p}{t}" for p, t in zip(PROMPTS, alone, strict=True)).strip()
    assert sample(str(run), PROMPTS, raw=True, batch_size=1) == alone


def test_draws_hang_on_the_seed(run):
    one, again, other = (sample(str(run), PROMPTS, temperature=2.0, seed=seed, raw=True) for seed in (0, 0, 1))
    assert one == again != other
    greedy = sample(str(run), PROMPTS, raw=True)
    assert sample(str(run), PROMPTS, temperature=2.0, top_k=1, raw=True) == greedy
    assert sample(str(run), PROMPTS, temperature=1.0, top_p=1e-6, raw=True) == greedy


def test_a_text_is_one_prompt(run):
    assert sample(str(run), ASKED, max_new_tokens=4) == sample(str(run), [ASKED], max_new_tokens=4)


def test_a_stop_ends_a_completion(run):
    whole = sample(str(run), [ASKED], max_new_tokens=12)[0]
    assert "bread" in whole
    assert sample(str(run), [ASKED], max_new_tokens=12, stop="bread") == [whole.split("bread")[0]]
    assert len(sample(str(run), PROMPTS, max_new_tokens=1, num_beams=2, raw=True)) == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["prompt=a", "temperature=-1"], "temperature=-1.0 to be 0 or a number of at least 0.001"),
        (["prompt=a", "temperature=1e-45"], "temperature=1e-45 to be 0 or a number"),
        (
            ["prompt=a", "temperature=1", "seed=99999999999999999999"],
            "seed=99999999999999999999 to be a whole number from 0 on",
        ),
        (["prompt=a", "top_k=5"], "temperature above 0 beside top_k"),
        (["prompt=a", "temperature=1", "num_beams=3"], "temperature=0 beside num_beams=3"),
        (["prompt=a", "top_p=2", "temperature=1"], "top_p=2.0"),
        (["prompt=a", "max_new_tokens=9999"], "at most"),
        (["prompt=a", "max_new_tokens=x"], "max_new_tokens=x to be a whole number"),
        (["prompt=a", "raw=yes"], "raw=yes to be true or false"),
        (["prompt=a", "prompts=b"], "one of them"),
        ([], "prompt=<text> or prompts=<file>"),
        (["prompts=/no/such/file"], "cannot be read"),
        (["prompt=a", "temprature=1"], "did you mean 'temperature'?"),
    ],
    ids=lambda each: " ".join(each) if isinstance(each, list) else "",
)
def test_mistakes_are_one_sentence(arguments, message, run, privzoo):
    code, output = privzoo(f"run={run}", *arguments, module="privzoo.sample")
    assert code == 2
    assert message in output
    assert "Traceback" not in output


def test_a_classifier_says_nothing(privzoo, tmp_path):
    code, output = privzoo(
        "task=toy_text", "method=dp_head", "eps=inf", "epochs=0.02", f"output_dir={tmp_path}", "trainer.accelerator=cpu"
    )
    assert code == 0, output
    (run,) = tmp_path.iterdir()
    with pytest.raises(UserError, match="whose model says no text"):
        sample(str(run), ["a"])
