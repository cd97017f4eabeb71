"""A few rows for each task of conf/task in the hub's format: tests read them as a user's files."""

import io
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

WORDS = ["a", "good", "film", "of", "no", "great", "length"]


def write(node: Any, folder: Path, rows: int = 40) -> None:
    """A Parquet file for each split of the data set that this task's yaml names."""
    source = node.data.get("source", node.data)
    place = folder / source.folder
    place.mkdir(parents=True, exist_ok=True)
    for number, split in enumerate(source.splits.values()):
        table = pa.table(columns(node, [f"{split} {i}" for i in range(rows - number)], number))
        pq.write_table(table, place / f"{split}.parquet")


def pictures(count: int, shift: int) -> list[dict]:
    """Small PNG files as the hub stores them, each of a colour of its own."""
    found = []
    for i in range(count):
        file = io.BytesIO()
        Image.new("RGB", (32, 32), (i * 5 % 256, shift * 90 % 256, i * 11 % 256)).save(file, "PNG")
        found.append({"bytes": file.getvalue(), "path": f"{i}.png"})
    return found


def columns(node: Any, names: list[str], shift: int) -> dict[str, list]:
    """Texts of 2 to 60 words that begin with the row's name, labels in turn (one row without, where there may be such);
    or SQuAD's four columns, or COPA's, or DROP's, or a prompt and its reference; or running text."""
    texts = [" ".join([name, *(WORDS[(i * k + shift) % 7] for k in range(i * 7 % 60))]) for i, name in enumerate(names)]
    if node.get("completions") and node.completions.get("one_text"):  # several rows of a prompt, with their own references
        prompt = node.prompt.split("{")[1].split("}")[0]
        pooled = [texts[i - i % 3] for i in range(len(texts))] if node.completions.get("pooled") else texts
        return {prompt: pooled, node.completions.references: [text.rsplit(" ", 1)[1] for text in texts]}
    if "candidates" in node:
        asked = [("cause", "effect")[i % 2] for i in range(len(names))]
        right = [i % 3 % 2 for i in range(len(names))]
        return {"premise": texts, "question": asked, "choice1": names, "choice2": texts[::-1], node.label: right}
    if node.get("completions") and node.completions.references == "answers_spans":
        spans = [{"spans": [text.split()[-1], "3"][: 1 + i % 2], "types": ["span"]} for i, text in enumerate(texts)]
        return {"passage": texts, "question": [f"how many {name} ?" for name in names], "answers_spans": spans}
    if node.get("completions") or "answers" in node:
        last = [text.split()[-1] for text in texts]
        answers = [{"text": [word], "answer_start": [text.rindex(word)]} for text, word in zip(texts, last, strict=True)]
        return {"id": names, "context": texts, "question": [f"what is {name} ?" for name in names], "answers": answers}
    if "image" in node and not isinstance(node.label, str):
        flags = {name: [(i + k) % 3 == 0 for i in range(len(names))] for k, name in enumerate(node.label)}
        return {node.image: pictures(len(names), shift), "celeb_id": list(range(len(names))), **flags}
    if "image" in node:
        return {node.image: pictures(len(names), shift), node.label: [i % node.num_labels for i in range(len(names))]}
    if "label" not in node:
        return {node.text: texts}
    labels = [i % node.num_labels for i in range(len(names))]
    if node.get("unlabelled") is not None:
        labels[1] = node.unlabelled
    return dict.fromkeys(node.text, texts) | {node.label: labels, "idx": list(range(len(names)))}
