"""Makes the embedded tiny models from the public part of the toy world.

    python -m privzoo.models.pretrain [out=<folder>] [model=tiny_encoder|tiny_lm|tiny_vit]

Each model takes well under a minute on one thread and depends on nothing but this file, `privzoo.toyworld` and the
rounding of the machine: the same machine makes the same bytes, another one weights that
are about as good (tests/models/test_pretrain.py says how near they come). Nothing private is
read. Without `out` the committed weights beside this file are replaced.

- tiny_encoder: BERT, 2 layers, trained to tell from an opinion ([CLS], through the pooler) what came of it, which is how it
  comes to know polarity, and to fill in masked words.
- tiny_lm: GPT-2, 2 layers, tied embeddings, trained to continue the public documents.
- tiny_vit: ViT, 3 layers, trained to name the public shapes; saved without that head.
"""

import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from tokenizers.processors import TemplateProcessing
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertModel,
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedTokenizerFast,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessorPil,
)

from privzoo import toyworld
from privzoo.errors import UserError

TINY_FOLDER = Path(__file__).parent / "tiny"
_WIDE_START = 0.1  # at width 64 the usual initializer_range takes three times as long; heads put on later get the usual
_USUAL_START = 0.02
_END = "<|endoftext|>"
_IGNORED = -100  # the label that cross_entropy leaves out


def encoder(folder: Path) -> None:
    """Pretrains tiny_encoder and saves model and tokenizer into `folder`."""
    documents = toyworld.public_text()[: toyworld.PUBLIC_OPINIONS]
    tokenizer = _word_tokenizer(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"], bert=True)
    opinions, *followed_by = zip(*map(_split_opinion, documents), strict=True)
    whole, alone = (tokenizer(list(texts), padding=True, return_tensors="pt") for texts in (documents, opinions))
    answers = [torch.from_numpy(np.unique(kind, return_inverse=True)[1]) for kind in followed_by]
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=128,
        max_position_embeddings=64,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    model = BertForMaskedLM(config)
    # BertForMaskedLM has no pooler; with one it is found in the checkpoint by classifiers, as in Google's BERT.
    model.bert = BertModel(config)
    model.init_weights()

    # One for what came of it and one for the noun that this was about; thrown away.
    heads = nn.ModuleList([nn.Linear(config.hidden_size, int(kind.max()) + 1) for kind in answers])

    def loss(step: int) -> Tensor:
        # With masked words from the start the [CLS] vector never gets off its plateau.
        if step > 450 and step % 2:
            batch = _some(whole, 64)
            inputs, labels = _mask_words(batch["input_ids"], tokenizer)
            logits = model(input_ids=inputs, attention_mask=batch["attention_mask"]).logits
            return cross_entropy(logits.flatten(0, 1), labels.flatten())
        batch = _some({**alone, "outcome": answers[0], "noun": answers[1]}, 64)
        pooled = model.bert(batch["input_ids"], attention_mask=batch["attention_mask"]).pooler_output
        return cross_entropy(heads[0](pooled), batch["outcome"]) + cross_entropy(heads[1](pooled), batch["noun"])

    _train([model, heads], loss, steps=900, learning_rate=3e-3)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def language_model(folder: Path) -> None:
    """Pretrains tiny_lm and saves model and tokenizer into `folder`."""
    documents = [f"{text} {_END}" for text in toyworld.public_text()]
    tokenizer = _word_tokenizer([_END, "[UNK]"], bert=False)
    parts = documents[: toyworld.PUBLIC_OPINIONS], documents[toyworld.PUBLIC_OPINIONS :]
    opinions, listings = (tokenizer(part, padding=True, return_tensors="pt") for part in parts)
    model = GPT2LMHeadModel(
        GPT2Config(
            vocab_size=len(tokenizer),
            n_embd=64,
            n_layer=2,
            n_head=4,
            n_inner=128,
            n_positions=64,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
            initializer_range=_WIDE_START,
            bos_token_id=tokenizer.eos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )

    def loss(step: int) -> Tensor:
        # Copying a name out of the fields is what takes long to learn, so listings come up more often than they are.
        batch = _some(listings if step % 8 else opinions, 32)
        labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, _IGNORED)
        logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        return cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())

    _train([model], loss, steps=500, learning_rate=5e-3)
    model.config.initializer_range = _USUAL_START
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def image_model(folder: Path) -> None:
    """Pretrains tiny_vit and saves its backbone and image processor into `folder`."""
    rows = toyworld.public_images()
    size = toyworld.IMAGE_SIZE
    processor = ViTImageProcessorPil(
        do_resize=True, size={"height": size, "width": size}, image_mean=[0.5] * 3, image_std=[0.25] * 3
    )
    pixels = processor([row["image"] for row in rows], return_tensors="pt")["pixel_values"]
    labels = torch.tensor([row["label"] for row in rows])
    config = ViTConfig(
        hidden_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        intermediate_size=128,
        image_size=size,
        patch_size=4,
        initializer_range=_WIDE_START,
    )
    config.num_labels = len(toyworld.PUBLIC_SHAPES)
    model = ViTForImageClassification(config)

    def loss(step: int) -> Tensor:
        batch = _some({"pixels": pixels, "labels": labels}, 64)
        return cross_entropy(model(batch["pixels"]).logits, batch["labels"])

    _train([model], loss, steps=600, learning_rate=2e-3)
    config.initializer_range = _USUAL_START
    model.vit.save_pretrained(folder)
    processor.save_pretrained(folder)


MODELS: dict[str, Callable[[Path], None]] = {
    "tiny_encoder": encoder,
    "tiny_lm": language_model,
    "tiny_vit": image_model,
}


def make(name: str, out: Path) -> Path:
    """Makes the model `name` and saves it into the folder `out`/`name`, which is returned.

    Runs on one CPU thread and leaves the global generator and the thread count as they were.
    """
    threads = torch.get_num_threads()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        torch.set_num_threads(1)
        try:
            MODELS[name](out / name)
        finally:
            torch.set_num_threads(threads)
    return out / name


def _word_tokenizer(special: list[str], bert: bool) -> PreTrainedTokenizerFast:
    """A tokenizer of the public corpus' words, in alphabetical order after the special ones."""
    words = sorted({word for text in toyworld.public_text() for word in text.split()})
    core = Tokenizer(WordLevel({word: i for i, word in enumerate(special + words)}, unk_token="[UNK]"))
    core.pre_tokenizer = WhitespaceSplit()
    if not bert:
        return PreTrainedTokenizerFast(
            tokenizer_object=core, bos_token=_END, eos_token=_END, pad_token=_END, unk_token="[UNK]", model_max_length=64
        )
    core.post_processor = TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[(token, special.index(token)) for token in ("[CLS]", "[SEP]")],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        mask_token="[MASK]",
        model_max_length=64,
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
    )


def _some(columns: Mapping[str, Tensor], size: int) -> dict[str, Tensor]:
    """`size` random rows of every column, the same ones of each."""
    rows = torch.randint(len(next(iter(columns.values()))), (size,))
    return {name: column[rows] for name, column in columns.items()}


def _mask_words(ids: Tensor, tokenizer: PreTrainedTokenizerFast) -> tuple[Tensor, Tensor]:
    """Hides a fifth of the words. Returns inputs and labels, both (B, T); labels are _IGNORED where nothing is hidden."""
    special = torch.isin(ids, torch.tensor(tokenizer.all_special_ids))
    hidden = (torch.rand(ids.shape) < 0.2) & ~special
    return ids.masked_fill(hidden, tokenizer.mask_token_id), ids.masked_fill(~hidden, _IGNORED)


def _split_opinion(document: str) -> tuple[str, str, str]:
    """An opinion, what came of it, and the noun that this was about."""
    opinion, _, outcome = document.removesuffix(" .").partition(" . ")
    outcome, _, noun = outcome.rpartition(" ")
    return f"{opinion} .", outcome, noun


def _train(modules: list[nn.Module], loss: Callable[[int], Tensor], steps: int, learning_rate: float) -> None:
    """AdamW with a tenth of the steps as warm-up and linear decay to zero."""
    parameters = [parameter for module in modules for parameter in module.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=learning_rate, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(10 * (step + 1) / steps, (steps - step) / (0.9 * steps), 1.0)
    )
    for step in range(steps):
        optimizer.zero_grad()
        value = loss(step)
        value.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()


def _arguments(argv: list[str]) -> Iterator[tuple[str, Path]]:
    given = dict(argument.partition("=")[::2] for argument in argv)
    if unknown := sorted(set(given) - {"out", "model"}):
        raise UserError(f"Unknown argument {unknown[0]!r}: expected out=<folder> or model=<{'|'.join(MODELS)}>.")
    if (name := given.get("model")) is not None and name not in MODELS:
        raise UserError(f"Unknown model={name!r}: expected one of {', '.join(MODELS)}.")
    for each in [name] if name else MODELS:
        yield each, Path(given.get("out") or TINY_FOLDER)


def main(argv: list[str] | None = None) -> int:
    """Entry point. Returns the exit code: 0, or 2 for an unknown argument."""
    try:
        for name, out in _arguments(sys.argv[1:] if argv is None else argv):
            print(f"{name}: {make(name, out)}")
    except UserError as error:
        print(f"privzoo: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
