"""Have answers of a finished run graded by a language model: `python -m privzoo.judge run=<run folder> endpoint=… model=…`.

The run's model answers prompts of its validation split; the judge sees prompt, reference and answer, and grades correctness
and similarity from 1 to 5. Grades go to `<run folder>/judge.json` and, as means, into the run's record.
"""

import http.client
import json
import os
import random
import re
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from omegaconf import OmegaConf
from rich.console import Console
from rich.progress import track
from rich.table import Table

from privzoo.cli import exit_on_error, read_arguments
from privzoo.errors import UserError, first_line
from privzoo.files import write_json
from privzoo.finished import Finished, load_finished
from privzoo.results import write_record
from privzoo.run_loggers.mlflow_logger import MlflowLogger

ARGUMENTS = {
    "run": "a run folder that train has finished",
    "endpoint": "of an OpenAI-compatible server, such as http://localhost:8000/v1",
    "model": "name of the judge at the endpoint, or without one a local folder or hub name of a causal language model",
    "key_env": "the environment variable that holds the endpoint's key (default OPENAI_API_KEY)",
    "count": "prompts to be answered and graded (default 50)",
    "seed": "of their choice (default 0)",
    "max_new_tokens": "of an answer (default 64)",
    "mlflow": "true: mean grades go to the run's MLflow (MLFLOW_TRACKING_URI, else in the run folder)",
    "send": "true: validation rows may leave this machine for the endpoint's",
}
GRADES = ("correctness", "similarity")
LOCAL = ("localhost", "127.0.0.1", "::1")
ATTEMPTS = 4
TASK = """You grade an answer to a question. Reply with one JSON object and nothing else:
{"correctness": <1 to 5>, "similarity": <1 to 5>}
correctness: is what the answer says right, judged by the reference? 5: entirely, 1: not at all.
similarity: does it say what the reference says? 5: the same, 1: something else."""

Judge = Callable[[str], str]  # a request in words to a reply


def judge(
    run: str,
    model: str,
    endpoint: str | None = None,
    key_env: str = "OPENAI_API_KEY",
    count: int = 50,
    seed: int = 0,
    max_new_tokens: int = 64,
    send: bool = False,
    mlflow: bool = False,
) -> dict[str, Any]:
    """The content of judge.json: mean grades, how many answers got none, and each row with its grades.

    What was graded before an error or Ctrl-C is kept in judge.json; the record gets the means of whole runs alone.

    Args:
        rest: as in `ARGUMENTS`.
    Raises:
        UserError: for an argument out of range, a run that answers no prompts, an endpoint that is elsewhere without
            `send`, or that cannot be reached; with `mlflow`, if MLflow cannot be had.
    """
    for name, value in (("count", count), ("max_new_tokens", max_new_tokens)):
        if type(value) is not int or value < 1:
            raise UserError(f"Expected {name}={value} to be a whole number of at least 1.")
    if endpoint is not None and urlsplit(endpoint).scheme not in ("http", "https"):
        raise UserError(f"Expected endpoint={endpoint} to begin with http:// or https://.")
    if endpoint is not None and urlsplit(endpoint).hostname not in LOCAL and not send:
        raise UserError(
            f"Validation rows would leave this machine for {urlsplit(endpoint).hostname}: add send=true if they may, or "
            "take a judge that runs here."
        )
    finished = load_finished(Path(run))
    if not hasattr(finished.task, "questions"):
        raise UserError(
            f"{run} is a run of task={finished.record.task}, which answers no prompts: there is nothing to judge."
        )
    to_mlflow = _mlflow(finished, Path(run)) if mlflow else None
    ask = _endpoint(endpoint, model, os.environ.get(key_env)) if endpoint is not None else _local(model)
    asked = _questions(finished, count, seed, max_new_tokens)
    answers = _answers(finished, asked, max_new_tokens)
    found: dict[str, Any] = {"judge": model, "endpoint": endpoint, "seed": seed, "rows": []}
    try:
        for row in track(answers, "graded", total=len(asked), console=Console(stderr=True)):
            found["rows"].append(row | graded(ask(_request(row))))
    finally:
        if found["rows"]:
            write_json(Path(run) / "judge.json", found | _summary(found["rows"]))
    found |= _summary(found["rows"])
    means = {f"judge_{name}": found[name] for name in GRADES if found[name] is not None}
    others = {name: value for name, value in finished.record.metrics.items() if not name.startswith("judge_")}
    record = replace(finished.record, metrics=others | means)  # of an earlier judge nothing stays
    write_record(Path(run), record)
    if to_mlflow is not None:
        to_mlflow.finish(record.to_json())
    return found


def _mlflow(finished: Finished, folder: Path) -> MlflowLogger:
    """The MLflow run of a run folder: means go there, rows with their texts do not."""
    settings = OmegaConf.to_container(finished.cfg, resolve=True)
    assert isinstance(settings, dict)
    plain = {str(key): value for key, value in settings.items()}
    return MlflowLogger(folder, plain, **plain["logger"].get("mlflow", {}))


def _questions(finished: Finished, count: int, seed: int, max_new_tokens: int) -> list[Any]:
    task = finished.task
    task.load(finished.cfg.data_root)
    task.prepare(finished.processor)
    asked = task.questions(max_new_tokens)
    return random.Random(seed).sample(asked, min(count, len(asked)))


def _answers(finished: Finished, asked: list[Any], max_new_tokens: int) -> Iterator[dict[str, str]]:
    """Question, reference and answer; made as they are wanted, so that a judge that is not there is noticed early."""
    from privzoo.tasks.decoding import generated

    processor = finished.processor
    for first in range(0, len(asked), 16):
        part = asked[first : first + 16]
        ids = generated(finished.model, processor, [each.ids for each in part], max_new_tokens=max_new_tokens)
        for each, text in zip(part, processor.batch_decode(ids, skip_special_tokens=True), strict=True):
            yield {"question": each.text, "reference": each.reference, "answer": text.strip()}


def _request(row: dict[str, str]) -> str:
    return f"{TASK}\n\nQuestion:\n{row['question']}\n\nReference:\n{row['reference']}\n\nAnswer:\n{row['answer']}\n"


def graded(reply: str) -> dict[str, Any]:
    """The grades in a judge's reply, and the reply itself where it has none.

    >>> graded('Sure: {"correctness": 4, "similarity": 2}')
    {'correctness': 4, 'similarity': 2}
    >>> graded('{"correctness": 6, "similarity": 2}')
    {'correctness': None, 'similarity': None, 'reply': '{"correctness": 6, "similarity": 2}'}
    """
    for found in re.findall(r"\{[^{}]*\}", reply):
        try:
            grades = {name: json.loads(found)[name] for name in GRADES}
        except (json.JSONDecodeError, KeyError, TypeError):
            continue
        if all(type(grade) is int and 1 <= grade <= 5 for grade in grades.values()):
            return grades
    return {**dict.fromkeys(GRADES), "reply": reply[:500]}


def _summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    given = [row for row in rows if row[GRADES[0]] is not None]
    means = {name: sum(row[name] for row in given) / len(given) if given else None for name in GRADES}
    return {"graded": len(given), "without_a_grade": len(rows) - len(given), **means}


def _endpoint(endpoint: str, model: str, key: str | None) -> Judge:
    """A judge at an OpenAI-compatible server; a busy or failing one is asked again, after a while, but not one that never
    was there."""
    here = urlsplit(endpoint).hostname in LOCAL
    opener = urllib.request.build_opener(*([urllib.request.ProxyHandler({})] if here else []))  # a proxy is another machine
    met = False

    def ask(request: str) -> str:
        """The reply; UserError where there is none."""
        nonlocal met
        body = {"model": model, "messages": [{"role": "user", "content": request}], "temperature": 0, "max_tokens": 100}
        headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {key}"} if key else {})
        call = urllib.request.Request(f"{endpoint.rstrip('/')}/chat/completions", json.dumps(body).encode(), headers)
        for attempt in range(1, ATTEMPTS + 1):
            try:
                with opener.open(call, timeout=120) as answer:
                    met = True
                    return str(json.load(answer)["choices"][0]["message"]["content"])
            except urllib.error.HTTPError as error:
                met, reason = True, f"HTTP {error.code} {error.reason}"
                again = error.code == 429 or error.code >= 500
            except (OSError, http.client.HTTPException, ValueError, KeyError, IndexError, TypeError) as error:
                reason, again = f"{type(error).__name__}: {first_line(error)}", met and isinstance(error, OSError)
            if not again or attempt == ATTEMPTS:
                break
            time.sleep(0.5 * 4**attempt)
        raise UserError(
            f"The judge at {endpoint} gave no answer ({reason}): check endpoint, model and key, and judge again."
        )

    return ask


def _local(path: str) -> Judge:
    """A judge that runs here."""
    from privzoo.models.loading import load
    from privzoo.tasks.decoding import generated

    loaded = load(path, "causal_lm")
    processor = loaded.processor

    def ask(request: str) -> str:
        if processor.chat_template is not None:
            chat = [{"role": "user", "content": request}]
            request = processor.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
        ids = processor(request, verbose=False).input_ids[-(processor.model_max_length - 100) :]
        (made,) = generated(loaded.model, processor, [ids], max_new_tokens=100)
        return processor.decode(made, skip_special_tokens=True)

    return ask


def main() -> None:
    """Entry point of `privzoo-judge`."""
    with exit_on_error():
        given: dict[str, Any] = dict(read_arguments(sys.argv[1:], ARGUMENTS, required=["run", "model"]))
        for key in ("count", "seed", "max_new_tokens"):
            if key in given and not given[key].isdecimal():
                raise UserError(f"Expected {key}={given[key]} to be a whole number.")
            given |= {key: int(given[key])} if key in given else {}
        for key in ("send", "mlflow"):
            if given.setdefault(key, "false") not in ("true", "false"):
                raise UserError(f"Expected {key}={given[key]} to be true or false.")
        found = judge(**(given | {key: given[key] == "true" for key in ("send", "mlflow")}))
        print(f"{found['graded']} answers graded by {found['judge']}, {found['without_a_grade']} without a grade")
        table = Table()
        for column in ("grade", "mean", "1", "2", "3", "4", "5"):
            table.add_column(column)
        for name in GRADES:
            counts = [str(sum(row[name] == grade for row in found["rows"])) for grade in range(1, 6)]
            table.add_row(name, "–" if found[name] is None else f"{found[name]:.2f}", *counts)
        Console().print(table)


if __name__ == "__main__":
    main()
