"""Loads a pretrained model with its tokenizer or image processor, and tells which weights the checkpoint lacked."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import nn
from transformers import PretrainedConfig, ResNetConfig
from transformers.models.auto import modeling_auto

from privzoo.errors import UserError
from privzoo.models.group_norm import GroupNormResNetConfig, has_batchnorm
from privzoo.models.mean_pooling import MeanPoolingClassifier, MeanPoolingConfig
from privzoo.models.pairs import check_pairs
from privzoo.models.quantization import keep_quantized_weights, quantization_options
from privzoo.models.sources import explained, locate, quiet_transformers

_AUTO_CLASSES: dict[str, tuple[Any, Any]] = {  # the class that loads, and the model types that it knows
    "sequence_classification": (
        transformers.AutoModelForSequenceClassification,
        modeling_auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
    ),
    "causal_lm": (transformers.AutoModelForCausalLM, modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES),
    "question_answering": (
        transformers.AutoModelForQuestionAnswering,
        modeling_auto.MODEL_FOR_QUESTION_ANSWERING_MAPPING_NAMES,
    ),
    "prompt": (  # of these, what sees both sides is loaded as a masked language model
        transformers.AutoModelForCausalLM,
        modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES | modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    ),
    "image_classification": (
        transformers.AutoModelForImageClassification,
        modeling_auto.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES,
    ),
}
_DROPOUT_NAMES = ("dropout", "pdrop", "drop_path", "layerdrop", "drop_rate")
_ALWAYS_OFF = ("att", "drop_path", "layerdrop")  # masks that hang on padding, or leave out a layer for all rows at once


@dataclass
class LoadedModel:
    """A model that is ready to be fine-tuned or evaluated.

    Attributes:
        model: a transformers model in evaluation mode, dropout of its hidden states set to the value asked for.
        processor: its tokenizer (padding on the right, with a pad token) or its PIL image processor.
        new_head: names, as in `model.named_parameters()`, of what the checkpoint did not hold and was drawn afresh;
            a method that trains a part only (BiTFiT) trains these as well. Never part of the model's body.
    """

    model: nn.Module
    processor: Any
    new_head: tuple[str, ...]


def load(
    path: str,
    kind: str,
    num_labels: int | None = None,
    dtype: str = "float32",
    dropout: float = 0.0,
    seed: int = 0,
    pooling: str | None = None,
    quantization: str | None = None,
    replace_batchnorm: bool = False,
    texts: int = 1,
) -> LoadedModel:
    """A pretrained model for a kind of task.

    The new head is drawn from a generator of its own: it hangs on `seed` (and the model) only, and the global
    generator is left as it was. A head of another number of labels than asked for counts as new. Weights of the body
    that the checkpoint lacks are an error, never drawn. Nothing of transformers' bars and warnings is shown.

    Args:
        path: a local folder, "tiny_encoder", "tiny_lm" or "tiny_vit" (part of privzoo), or a name on the hub. An
            unreachable hub is noticed within seconds, and the local cache is used if it holds the model.
        kind: "sequence_classification", "causal_lm", "image_classification", "question_answering" (where an answer starts
            and ends), or "prompt": a masked language model where the architecture sees both sides of a word, a causal one
            otherwise.
        num_labels: size of the classification head; None keeps the checkpoint's. Means nothing to language models.
        dtype: name of a floating type of torch; what the file holds is converted.
        dropout: probability in [0, 1) that every dropout of hidden states gets; those of attention probabilities and of
            whole layers or paths are 0 whatever it is.
        seed: of the new head.
        pooling: "mean" puts a linear head on the mean of the last hidden states, for encoders that were trained to embed
            a sentence by it; "pair" embeds both texts of a row so, each alone, and puts a linear head on the two; None takes
            the architecture's own head (for BERT, one on the first token). For "sequence_classification" only.
        quantization: "nf4" stores the linear layers of the body in 4 bits and computes them in bfloat16; all else has
            `dtype`. Such a base cannot be trained itself, only an adapter beside it.
        replace_batchnorm: a ResNet gets group norms in the place of its batch norms, with their scales and shifts. Any model
            that has batch norms is an error otherwise.
        texts: how many texts a row has, 1 or 2.
    Raises:
        UserError: for each of these values that is not as said, a folder that is not a model or is damaged, a model
            of another kind, an unreachable hub.
    """
    _check_arguments(kind, dropout, pooling)
    storage = {"dtype": _float_type(dtype), **quantization_options(quantization)}
    source, cached_only = locate(path)
    options = {"local_files_only": cached_only, "trust_remote_code": False}
    with quiet_transformers(), explained(path):
        config = _configuration(path, transformers.AutoConfig.from_pretrained(source, **options), kind, pooling)
        pairs = config.pairs if isinstance(config, MeanPoolingConfig) else pooling == "pair"
        if pairs and texts != 2:
            raise UserError(
                f"model.pooling=pair puts a head on two texts, but a row of this task has {texts}: set "
                "model.pooling=mean or null."
            )
        if replace_batchnorm:
            config = _with_group_norms(path, config)
        _set_dropout(config, dropout)
        if num_labels is not None and kind.endswith("classification"):
            config.num_labels = num_labels
        processor = _processor(source, kind, config, options)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            pooled = pooling is not None and not isinstance(config, MeanPoolingConfig)
            auto_class = _auto_class(kind, config, pooled)
            model, new_head = _weights(path, auto_class, source, config=config, **storage, **options)
            if pooled:
                model = MeanPoolingClassifier.around(model, config.num_labels, pairs)
                new_head = ("classifier.weight", "classifier.bias")
    _check_loaded(path, kind, model, processor, new_head)
    if pairs:
        check_pairs(path, processor, model.eval())
    return LoadedModel(model.eval(), processor, new_head)


def _check_arguments(kind: str, dropout: float, pooling: str | None) -> None:
    _known(kind, "kind", _AUTO_CLASSES)
    if not isinstance(dropout, (int, float)) or not 0 <= dropout < 1:
        raise UserError(f"dropout={dropout} is no probability: expected 0 <= model.dropout < 1.")
    if pooling not in (None, "mean", "pair"):
        raise UserError(f"Unknown pooling={pooling!r}: expected model.pooling=mean, pair or null.")


def _check_loaded(path: str, kind: str, model: Any, processor: Any, new_head: tuple[str, ...]) -> None:
    """What only the loaded model shows: that it can do what is asked of it, and mixes no rows."""
    if kind == "prompt" and new_head:
        raise UserError(
            f"Model {path!r} lacks weights that say words, such as {new_head[0]}, and a prompt needs them: take a "
            "language model as it was pretrained, such as model=roberta_base, or task.head=classifier."
        )
    if has_batchnorm(model):
        raise UserError(
            f"Model {path!r} has batch norms, which mix the rows of a batch, so that none has a gradient of its own: set "
            "model.replace_batchnorm=true (ResNets: group norms take their place), or choose another model."
        )
    if kind != "image_classification":
        _check_vocabulary(path, processor, model)


def _auto_class(kind: str, config: Any, pooled: bool) -> Any:
    """The class of transformers that loads the weights."""
    if pooled:
        return transformers.AutoModel
    return transformers.AutoModelForMaskedLM if kind == "prompt" and _sees_both_sides(config) else _AUTO_CLASSES[kind][0]


def _with_group_norms(path: str, config: PretrainedConfig) -> PretrainedConfig:
    if isinstance(config, GroupNormResNetConfig):
        return config
    if type(config) is not ResNetConfig:
        raise UserError(
            f"model.replace_batchnorm=true is for ResNets, but {path!r} is of type {config.model_type!r}: set it to false."
        )
    return GroupNormResNetConfig.from_dict({k: v for k, v in config.to_dict().items() if k != "model_type"})


def _known(value: str, name: str, choices: Iterable[str]) -> None:
    if value not in choices:
        raise UserError(f"Unknown {name}={value!r}: expected one of {', '.join(choices)}.")


def _float_type(dtype: str) -> torch.dtype:
    found = getattr(torch, str(dtype), None)
    if not isinstance(found, torch.dtype) or not found.is_floating_point or found.itemsize < 2:
        raise UserError(
            f"Unknown dtype={dtype!r}: expected a floating type of torch, such as model.dtype=float32 or bfloat16."
        )
    return found


def _configuration(path: str, config: Any, kind: str, pooling: str | None) -> Any:
    """The configuration that the checkpoint holds, once it is known to do what is asked of it."""
    own = isinstance(config, MeanPoolingConfig)
    if own and not isinstance(config.encoder, PretrainedConfig):
        raise ValueError("its configuration holds no encoder")
    _check_kind(path, config, kind)
    stored = getattr(config, "quantization_config", None)
    if stored is not None and not stored.get("load_in_4bit"):  # 8-bit layers look at all rows for columns that stand out
        raise UserError(
            f"Model {path!r} is stored quantised by {stored.get('quant_method')}, which may mix examples: give one in full "
            "precision, and model.quantization=nf4 for 4 bits."
        )
    if pooling is not None and not own:
        _check_can_be_pooled(path, config, kind)
    return config


def _weights(path: str, auto_class: Any, source: str, **options: Any) -> tuple[Any, tuple[str, ...]]:
    """The model of a class of transformers, and the names of what its checkpoint lacked."""
    model, report = auto_class.from_pretrained(source, ignore_mismatched_sizes=True, output_loading_info=True, **options)
    if getattr(model, "is_loaded_in_4bit", False) and not keep_quantized_weights(model):
        raise UserError(f"Model {path!r} has no linear layer to quantise: set model.quantization=null.")
    return model, _new_head(path, model, report, whole=auto_class is not transformers.AutoModel)


def _check_kind(path: str, config: PretrainedConfig, kind: str) -> None:
    wanted = kind.replace("_", " ")
    own = isinstance(
        config, {"sequence_classification": MeanPoolingConfig, "image_classification": GroupNormResNetConfig}.get(kind, ())
    )
    if config.model_type not in _AUTO_CLASSES[kind][1] and not own:
        raise UserError(
            f"Model {path!r} is of type {config.model_type!r}, which cannot do {wanted}: choose another model= or"
            " model.path=, or another task=."
        )
    # transformers would load an encoder as a language model that sees the words it is to predict.
    if kind == "causal_lm" and _sees_both_sides(config):
        raise UserError(
            f"Model {path!r} is an encoder ({config.model_type}), which sees the words it would have to predict:"
            " choose a causal language model for this task, such as model=tiny_lm or model=gpt2."
        )


def _sees_both_sides(config: PretrainedConfig) -> bool:
    is_encoder = not (getattr(config, "is_decoder", False) or config.is_encoder_decoder)
    return config.model_type in modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES and is_encoder


def _check_can_be_pooled(path: str, config: PretrainedConfig, kind: str) -> None:
    if kind != "sequence_classification" or config.is_encoder_decoder:
        what = "an encoder-decoder" if config.is_encoder_decoder else f"for {kind.replace('_', ' ')}"
        raise UserError(
            f"model.pooling=mean or pair makes a classifier of an encoder, but {path!r} is {what}: set model.pooling=null."
        )


def _set_dropout(config: PretrainedConfig, dropout: float) -> None:
    """Sets every dropout field, whatever the architecture calls it, in nested configurations too; some to 0 always."""
    for name, value in list(vars(config).items()):
        if isinstance(value, PretrainedConfig):
            _set_dropout(value, dropout)
        # None means "as another field" (classifier_dropout); booleans are switches, not probabilities.
        elif (value is None or type(value) in (int, float)) and any(part in name for part in _DROPOUT_NAMES):
            setattr(config, name, 0.0 if any(part in name for part in _ALWAYS_OFF) else dropout)


def _processor(source: str, kind: str, config: PretrainedConfig, options: dict) -> Any:
    if kind == "image_classification":
        # PIL also where torchvision is installed: its resizing differs, and results must not.
        return transformers.AutoImageProcessor.from_pretrained(source, backend="pil", **options)
    tokenizer = transformers.AutoTokenizer.from_pretrained(source, **options)
    tokenizer.padding_side = "right"
    if tokenizer.pad_token is None:
        if tokenizer.eos_token is None:
            raise UserError(
                f"The tokenizer of {source} has neither a pad nor an end token: name one in its tokenizer_config.json."
            )
        tokenizer.pad_token = tokenizer.eos_token
    if config.get_text_config().pad_token_id is None:
        config.get_text_config().pad_token_id = tokenizer.pad_token_id
    return tokenizer


def _new_head(path: str, model: transformers.PreTrainedModel, report: dict, whole: bool) -> tuple[str, ...]:
    """Parameters that were drawn afresh, in the model's order; a fresh one in the body is a damaged checkpoint.

    `model` is the whole model, head and body, or the body alone.
    """
    fresh = set(report["missing_keys"]) | {key[0] for key in report["mismatched_keys"]}
    names = tuple(name for name, _ in model.named_parameters() if name in fresh)
    body = f"{model.base_model_prefix}." if whole else ""
    # Checkpoints pretrained without a sentence-level task have no pooler; it is part of a classifier's head.
    lost = [name for name in names if name.startswith(body) and ".pooler." not in f".{name}"]
    if lost:
        raise UserError(
            f"Model {path!r} lacks {len(lost)} weights of its body or holds them in another shape, for example"
            f" {lost[0]}: its files belong to another model; fetch it again or give another model.path."
        )
    return names


def _check_vocabulary(path: str, tokenizer: Any, model: transformers.PreTrainedModel) -> None:
    rows = len(model.get_input_embeddings().weight)  # type: ignore[arg-type]
    if len(tokenizer) > rows:
        raise UserError(
            f"The tokenizer of {path!r} knows {len(tokenizer)} tokens but the model embeds {rows}: they belong to"
            " different models; give model.path a folder in which they match."
        )
