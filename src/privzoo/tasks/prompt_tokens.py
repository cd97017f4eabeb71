"""Prompts and targets as tokens, within the room that a row has."""

import pyarrow as pa

from privzoo.tasks.templates import Template, filled


def joined(start: list[int], prompt: list[int], target: list[int], max_length: int) -> tuple[list[int], int]:
    """A row of at most `max_length` tokens, and how many of them come before the target.

    The target is kept whole if it fits beside one token to predict it from; then the start token, then as much of the
    prompt's end as there is room for.

    >>> joined([0], [1, 2, 3, 4], [8, 9], max_length=5)
    ([0, 3, 4, 8, 9], 3)
    >>> joined([0], [1, 2, 3, 4], [6, 7, 8, 9], max_length=3)
    ([0, 6, 7], 1)
    """
    first = (start + prompt)[:1]
    target = target[: max_length - len(first)]
    context = shortened(start, prompt, max_length - len(target))
    return context + target, len(context)


def shortened(start: list[int], prompt: list[int], room: int) -> list[int]:
    """The start token and as much of the prompt's end as `room` tokens have place for; where that is 1, one token alone.

    >>> shortened([0], [1, 2, 3, 4], 3), shortened([0], [1, 2], 1), shortened([], [1, 2], 1)
    ([0, 3, 4], [0], [2])
    """
    left = room - len(start)
    return start + prompt[max(0, len(prompt) - left) :] if left > 0 else (start + prompt)[:1]


def start_tokens(processor) -> list[int]:
    """[start token] if the tokenizer begins texts with one, else []."""
    bos = [processor.bos_token_id]
    return bos if processor("").input_ids[:1] == bos else []


def template_ids(processor, parts: Template, table: pa.Table) -> list[list[int]]:
    """Ids of each row's filled template, without special tokens."""
    # verbose=False: no warning about long rows, which are cut
    return processor(filled(parts, table), add_special_tokens=False, verbose=False).input_ids


def cut_to(processor, parts: Template, cells: dict[str, str], column: str, room: int) -> list[int]:
    """Ids of a filled template, in at most `room` tokens if it can be had by taking words off the end of one column.

    Args:
        cells: the row's texts by column.
        column: the one that is shortened; the rest of the template stays as it is.
    """

    def ids_with(text: str) -> list[int]:
        whole = "".join(lit + ((text if name == column else cells[name]) if name else "") for lit, name in parts)
        return processor(whole, add_special_tokens=False, verbose=False).input_ids

    ids, own = ids_with(cells[column]), processor(cells[column], add_special_tokens=False, verbose=False).input_ids
    left = len(own)
    while len(ids) > room and left > 0:
        left = max(0, left - max(1, len(ids) - room))
        ids = ids_with(processor.decode(own[:left], skip_special_tokens=False, clean_up_tokenization_spaces=False))
    return ids
