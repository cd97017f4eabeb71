"""SQuAD as a user has it, in a folder of files: trained, answered in words, scored, and scored again from the folder."""

import json

import pytest

CITIES = ["Rome", "Oslo", "Paris", "Lima", "Cairo"]


def row(number: int) -> dict:
    city = CITIES[number % len(CITIES)]
    return {
        "id": str(number), "context": f"The fair number {number} was held in {city} .", "question": "Where was the fair ?",
        "answers": {"text": [city, f"the city of {city}"], "answer_start": [28, 28]},
    }  # fmt: skip


@pytest.fixture
def squad(tmp_path):
    (tmp_path / "data" / "squad").mkdir(parents=True)
    for split, numbers in (("train", range(60)), ("validation", range(60, 72))):
        lines = (json.dumps(row(number)) + "\n" for number in numbers)
        (tmp_path / "data" / "squad" / f"{split}.jsonl").write_text("".join(lines))
    return [
        "task=squad", "method=dp_lora", "model=tiny_lm", "task.max_length=64", "task.completions.max_new_tokens=8",
        "batch_size=20", "epochs=1", "trainer.accelerator=cpu", f"data_root={tmp_path}/data", f"output_dir={tmp_path}/runs",
    ]  # fmt: skip


def test_trained_scored_and_scored_again(squad, privzoo, tmp_path):
    code, output = privzoo(*squad, "eps=8")
    assert code == 0, output
    assert "exact_match" in output
    (run,) = (tmp_path / "runs").iterdir()
    record = json.loads((run / "result.json").read_text())
    assert (record["headline"], record["higher_is_better"], record["num_examples"]) == ("f1", True, 60)
    assert all(0 <= record[f"metric/{name}"] <= 1 for name in ("f1", "exact_match", "token_accuracy"))
    code, output = privzoo(f"run={run}", module="privzoo.evaluate")
    assert code == 0, output
    lines = [line for line in output.splitlines() if "f1" in line or "exact_match" in line or "perplexity" in line]
    assert len(lines) == 3
    for line in lines:
        _, now, before = (cell.strip() for cell in line.strip("│ ").split("│"))
        assert float(now) == pytest.approx(float(before), rel=1e-4)


def test_a_row_without_an_answer_is_one_sentence(squad, privzoo, tmp_path):
    file = tmp_path / "data" / "squad" / "validation.jsonl"
    file.write_text(file.read_text() + json.dumps(row(72) | {"answers": {"text": [], "answer_start": []}}) + "\n")
    code, output = privzoo(*squad, "eps=8")
    assert code == 2
    assert "row 12: 'answers' holds no text, expected at least one" in output
    assert not (tmp_path / "runs").exists()
