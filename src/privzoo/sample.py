"""Let a finished run's language model go on from prompts: `python -m privzoo.sample run=<run folder> prompt="…"`.

From Python: `sample("<run folder>", ["…"], temperature=0.7)`.
"""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from privzoo.cli import exit_on_error, read_arguments
from privzoo.errors import UserError
from privzoo.finished import load_finished

ARGUMENTS = {
    "run": "a run folder that train has finished",
    "prompt": "text to go on from, as it stands",
    "prompts": "a text file with one prompt a line, in place of prompt",
    "temperature": "0 (the default): the likeliest token; above 0: drawn, the more freely the higher",
    "top_k": "draw among so many likeliest tokens",
    "top_p": "draw among the likeliest tokens that have this probability together",
    "num_beams": "sequences that are followed at a time, without drawing (default 1)",
    "max_new_tokens": "the end of a text that has not come to its end token (default 64, or what the model takes)",
    "stop": "a text before which a completion ends",
    "seed": "of the draws (default 0)",
    "batch_size": "prompts at a time (default 16)",
    "raw": "true: prompts are not put into the task's template",
    "untrained": "true: the model that the run began with",
}


def sample(
    run: str,
    prompts: Sequence[str] | str,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    num_beams: int = 1,
    max_new_tokens: int | None = None,
    stop: str | None = None,
    seed: int = 0,
    batch_size: int = 16,
    raw: bool = False,
    untrained: bool = False,
    stream: bool = False,
) -> list[str]:
    """What the saved model makes of each prompt.

    A prompt is put into the task's template where that asks for one text (`raw=True`: it is not). Without `temperature` the
    result hangs on the model and the prompt alone; with it on `seed` and on the batch, too.

    Args:
        run: run folder of a causal language model.
        prompts: at least one; a text is one prompt.
        rest: as in `ARGUMENTS`.
        stream: print a single prompt and its completion as it comes.
    Returns:
        The completions, without the prompts, special tokens and `stop`.
    Raises:
        UserError: for an argument out of range, or a run without a language model.
    """
    prompts = [prompts] if isinstance(prompts, str) else prompts
    if type(seed) is not int or not 0 <= seed < 2**63:
        raise UserError(f"Expected seed={seed} to be a whole number from 0 on, below 2^63.")
    drawing = _settings(temperature, top_k, top_p, num_beams, 64 if max_new_tokens is None else max_new_tokens)
    if type(batch_size) is not int or batch_size < 1 or not prompts:
        raise UserError(f"Expected a prompt and batch_size={batch_size} to be a whole number of at least 1.")
    record, _, task, model, processor = load_finished(Path(run), untrained)
    if task.kind != "causal_lm":
        raise UserError(f"{run} is a run of task={record.task}, whose model says no text: take a language model's run.")
    import torch

    from privzoo.tasks.decoding import continued, generated
    from privzoo.tasks.prompt_tokens import start_tokens

    texts = [prompt if raw else task.in_template(prompt) for prompt in prompts]
    start = start_tokens(processor)
    ids = [start + processor(text, add_special_tokens=False, verbose=False).input_ids for text in texts]
    _leave_room(drawing, processor.model_max_length, max(map(len, ids)), fixed=max_new_tokens is not None)
    if stream and len(prompts) == 1:
        print(prompts[0], end="", flush=True)
    made: list[list[int]] = []
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        for first in range(0, len(ids), batch_size):
            part = ids[first : first + batch_size]
            made += generated(model, processor, part, stop=stop, stream=stream and len(prompts) == 1, **drawing)
    completions = [continued(processor, prompt, new) for prompt, new in zip(ids, made, strict=True)]
    return [text.split(stop)[0] if stop else text for text in completions]


def _leave_room(settings: dict[str, Any], most: int, longest: int, fixed: bool) -> None:
    """Take fewer new tokens than were meant, in place, where a model of `most` tokens has no room for them.

    Raises:
        UserError: if their number is `fixed`, or there is no room for any.
    """
    if not fixed:
        settings["max_new_tokens"] = min(settings["max_new_tokens"], max(most - longest, 1))
    if settings["max_new_tokens"] > most - longest:
        raise UserError(
            f"Expected prompt and max_new_tokens to be at most {most} tokens together, found {longest} and "
            f"{settings['max_new_tokens']}: shorten one."
        )


def _settings(
    temperature: float, top_k: int | None, top_p: float | None, num_beams: int, max_new_tokens: int
) -> dict[str, Any]:
    """Of a GenerationConfig, once they are known to be possible."""
    checks = [
        ("temperature", temperature, temperature == 0 or temperature >= 1e-3, "0 or a number of at least 0.001"),
        ("top_k", top_k, top_k is None or (type(top_k) is int and top_k >= 1), "a whole number of at least 1"),
        ("top_p", top_p, top_p is None or 0 < top_p <= 1, "a number above 0, up to 1"),
        ("num_beams", num_beams, type(num_beams) is int and num_beams >= 1, "a whole number of at least 1"),
        ("max_new_tokens", max_new_tokens, type(max_new_tokens) is int and max_new_tokens >= 1, "a whole number from 1 on"),
    ]
    for name, value, good, expected in checks:
        if not good:
            raise UserError(f"Expected {name}={value} to be {expected}.")
    if temperature == 0 and (top_k is not None or top_p is not None):
        raise UserError("Expected temperature above 0 beside top_k and top_p: without it nothing is drawn.")
    if temperature > 0 and num_beams > 1:
        raise UserError(f"Expected temperature=0 beside num_beams={num_beams}: beams are followed, not drawn.")
    drawn = {"do_sample": True, "temperature": temperature, "top_k": top_k or 0, "top_p": top_p or 1.0}
    return {"max_new_tokens": max_new_tokens, "num_beams": num_beams, **(drawn if temperature > 0 else {})}


def main() -> None:
    """Entry point of `privzoo-sample`: each completion after its prompt; a single one appears word by word."""
    with exit_on_error():
        given = read_arguments(sys.argv[1:], ARGUMENTS, required=["run"])
        run, prompts = given.pop("run"), _prompts(given.pop("prompt", None), given.pop("prompts", None))
        arguments = {key: _parsed(key, value) for key, value in given.items()}
        streamed = len(prompts) == 1 and "stop" not in arguments and arguments.get("num_beams", 1) == 1
        completions = sample(run, prompts, stream=streamed, **arguments)
        if not streamed:
            for prompt, completion in zip(prompts, completions, strict=True):
                print(f"{prompt}{completion}\n")


def _prompts(prompt: str | None, file: str | None) -> list[str]:
    if (prompt is None) == (file is None):
        raise UserError("Expected prompt=<text> or prompts=<file>, one of them.")
    if prompt is not None:
        return [prompt]
    path = Path(str(file)).expanduser()
    try:
        lines = [line for line in path.read_text("utf-8-sig").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"prompts={file} cannot be read ({error}): name a text file in UTF-8, one prompt a line.") from error
    if not lines:
        raise UserError(f"prompts={file} holds no prompt: write one a line.")
    return lines


def _parsed(key: str, value: str) -> Any:
    kind = {"stop": str, "raw": bool, "untrained": bool, "temperature": float, "top_p": float}.get(key, int)
    if kind is bool and value in ("true", "false"):
        return value == "true"
    try:
        if kind is not bool:
            return kind(value)
    except ValueError:
        pass
    expected = {bool: "true or false", float: "a number", int: "a whole number"}[kind]
    raise UserError(f"Expected {key}={value} to be {expected}.")


if __name__ == "__main__":
    main()
