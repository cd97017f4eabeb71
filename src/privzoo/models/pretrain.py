"""Makes the embedded tiny models from the public part of the toy world.

    python -m privzoo.models.pretrain [out=<folder>] [model=tiny_encoder|tiny_lm|tiny_vit]

Each model takes well under a minute on one thread and depends on nothing but this file, `privzoo.toyworld` and the
rounding of the machine: the same machine makes the same bytes. Nothing private is read. Without `out` the committed
weights beside this file are replaced.

- tiny_encoder: BERT, 2 layers, trained to tell from an opinion ([CLS], through the pooler) what came of it, which is how it
  comes to know polarity, and to fill in masked words.
- tiny_lm: GPT-2, 2 layers, tied embeddings, trained to continue the public documents.
- tiny_vit: ViT, 3 layers, trained to name the public shapes; saved without that head.
"""

import random
import sys
from collections.abc import Callable, Iterator
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
_IGNORED = -100  # the label that cross_entropy leaves out


def encoder(folder: Path) -> None:
    """Pretrains tiny_encoder and saves model and tokenizer into `folder`."""
    documents = toyworld.public_text()
    tokenizer = _word_tokenizer(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"], bert=True)
    rng = random.Random(1)
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

    opinions = [_split_opinion(text) for text in documents[: toyworld.PUBLIC_OPINIONS]]
    answers = [sorted(set(kind)) for kind in list(zip(*opinions, strict=True))[1:]]
    heads = nn.ModuleList([nn.Linear(config.hidden_size, len(kind)) for kind in answers])  # thrown away

    def loss(step: int) -> Tensor:
        # With masked words from the start the [CLS] vector never gets off its plateau.
        if step > 200 and step % 4 == 0:
            batch = tokenizer(rng.choices(documents, k=32), padding=True, return_tensors="pt")
            inputs, labels = _mask_words(batch.pop("input_ids"), tokenizer)
            return cross_entropy(model(inputs, **batch).logits.flatten(0, 1), labels.flatten())
        texts, *followed_by = zip(*rng.choices(opinions, k=64), strict=True)
        pooled = model.bert(**tokenizer(list(texts), padding=True, return_tensors="pt")).pooler_output
        total = pooled.new_zeros(())
        for head, kind, given in zip(heads, answers, followed_by, strict=True):
            total = total + cross_entropy(head(pooled), torch.tensor([kind.index(answer) for answer in given]))
        return total

    _train([model, heads], loss, steps=700, learning_rate=3e-3)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def language_model(folder: Path) -> None:
    """Pretrains tiny_lm and saves model and tokenizer into `folder`."""
    documents = toyworld.public_text()
    end = "<|endoftext|>"
    tokenizer = _word_tokenizer([end, "[UNK]"], bert=False)
    rng = random.Random(2)
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
            bos_token_id=tokenizer.eos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )

    def loss(step: int) -> Tensor:
        # Copying a name out of the fields is what takes long to learn, so listings come up more often than they are.
        part = documents[toyworld.PUBLIC_OPINIONS :] if step % 8 else documents
        chosen = [f"{text} {end}" for text in rng.choices(part, k=64)]
        batch = tokenizer(chosen, padding=True, return_tensors="pt")
        labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, _IGNORED)
        logits = model(**batch).logits
        return cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())

    _train([model], loss, steps=600, learning_rate=4e-3)
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
    rng = np.random.default_rng(3)
    model = ViTForImageClassification(
        ViTConfig(
            hidden_size=64,
            num_hidden_layers=3,
            num_attention_heads=4,
            intermediate_size=128,
            image_size=size,
            patch_size=4,
            num_labels=len(toyworld.PUBLIC_SHAPES),
        )
    )

    def loss(step: int) -> Tensor:
        chosen = torch.from_numpy(rng.integers(len(rows), size=64))
        return cross_entropy(model(pixels[chosen]).logits, labels[chosen])

    _train([model], loss, steps=800, learning_rate=2e-3)
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
        end = special[0]
        return PreTrainedTokenizerFast(
            tokenizer_object=core, bos_token=end, eos_token=end, pad_token=end, unk_token="[UNK]", model_max_length=64
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


def _mask_words(ids: Tensor, tokenizer: PreTrainedTokenizerFast) -> tuple[Tensor, Tensor]:
    """Hides a fifth of the words. Returns inputs and labels, both (B, T); labels are _IGNORED where nothing is hidden."""
    special = torch.isin(ids, torch.tensor(tokenizer.all_special_ids))
    hidden = (torch.rand(ids.shape) < 0.2) & ~special
    return ids.masked_fill(hidden, tokenizer.mask_token_id), ids.masked_fill(~hidden, _IGNORED)


def _split_opinion(document: str) -> tuple[str, str, str]:
    """An opinion, what came of it, and the noun that this was about."""
    opinion, _, outcome = document.removesuffix(" .").partition(" . ")
    return f"{opinion} .", *outcome.rsplit(" ", 1)


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
