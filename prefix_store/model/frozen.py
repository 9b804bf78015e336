"""The one base model of a process: loaded, frozen, measured."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer, PreTrainedModel

from prefix_store import tensors
from prefix_store.errors import ModelUnsupported
from prefix_store.geometry import EncoderGeometry, ModelGeometry
from prefix_store.model import sites
from prefix_store.prefix import PrefixManifest

BUNDLED = Path(__file__).parent.parent / "bundled" / "model"
BUNDLED_NAME = "antefix-demo"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
# These rotate every row of a packed batch by the longest row's length, so a row would depend on its neighbours.
BATCH_DEPENDENT_ROPE = ("dynamic", "longrope")
# T5's positions are relative, so nothing ends at the length that it was trained on
RELATIVE_LENGTH = 512
_WEIGHTS = (".safetensors", ".bin")
_TEXT_FILES = ("*.json", "*.jinja", "*.model", "*.spm", "*.txt")
# Others of transformers' encoder-decoder models have attention, positions or biases of another make.
ENCODER_DECODERS = ("bart", "mbart", "pegasus", "marian", "t5", "mt5", "blenderbot", "blenderbot-small", "plbart")


@dataclass(frozen=True)
class FrozenModel:
    """A language model in eval mode whose parameters need no gradient.

    `context_length` is in tokens, virtual tokens included; an encoder-decoder model's holds for source and answer each.
    `digest` is the `base_digest` of prefixes made from it.
    """

    model: PreTrainedModel
    tokenizer: Any
    geometry: ModelGeometry
    digest: str
    name: str
    context_length: int

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.model.device

    @property
    def dtype(self) -> torch.dtype:
        """What the weights are."""
        return self.model.dtype

    def check_fits(self, manifest: PrefixManifest) -> None:
        """Raises PrefixMismatch unless a prefix with this manifest may be served on the model."""
        tensors.check_fits(manifest, self.geometry, self.digest, self.context_length)

    @property
    def is_encoder_decoder(self) -> bool:
        """Whether an encoder reads the prompt, and a decoder of its own writes the answer."""
        return self.geometry.encoder is not None

    @property
    def is_relative(self) -> bool:
        """Whether tokens know how far apart they are, by a bias on their attention, and no positions (T5)."""
        return hasattr(self.model.config, "relative_attention_num_buckets")

    def source_embeds(self, ids: torch.Tensor) -> torch.Tensor:
        """`[..., E]`: what an encoder may be given in place of tokens, in front of which a soft prompt then stands.

        Some families scale the embeddings of tokens outside of their table, and do not scale what they are given.
        """
        encoder: Any = self.model.get_encoder()
        embeds: torch.Tensor = encoder.get_input_embeddings()(ids) * getattr(encoder, "embed_scale", 1)
        return embeds

    @property
    def start_id(self) -> int:
        """The token that every answer of an encoder-decoder model begins with, unseen by the user."""
        return _start_of(self.model)

    @property
    def start_ids(self) -> tuple[int, ...]:
        """`start_id`, and the token that comes next by a rule of the generation config, which need not be asked for."""
        forced = getattr(self.model.generation_config, "forced_bos_token_id", None)
        return (self.start_id,) if forced is None else (self.start_id, int(forced))

    @property
    def last_id(self) -> int | None:
        """The token that an answer ends with where its length cuts it short, if the generation config has that rule."""
        forced = getattr(self.model.generation_config, "forced_eos_token_id", None)
        # of several transformers' greedy search takes the first in the vocabulary
        return min(forced) if isinstance(forced, list) else forced

    @property
    def banned_ids(self) -> frozenset[int]:
        """Tokens that the generation config lets no answer have; longer sequences of them are not looked at.

        An end that it names there is possible all the same, as in transformers.
        """
        banned = getattr(self.model.generation_config, "bad_words_ids", None) or []
        return frozenset(ids[0] for ids in banned if len(ids) == 1) - self._configured_ends

    @property
    def vocabulary_size(self) -> int:
        """Token ids that the model has an embedding for."""
        embeddings: Any = self.model.get_input_embeddings()
        size: int = embeddings.num_embeddings
        return size

    @property
    def end_ids(self) -> frozenset[int]:
        """Every token that ends a text, by the model's generation config and by its tokenizer."""
        own = getattr(self.tokenizer, "eos_token_id", None)
        return self._configured_ends | ({own} if own is not None else set())

    @property
    def _configured_ends(self) -> frozenset[int]:
        configured = getattr(self.model.generation_config, "eos_token_id", None)
        several = configured if isinstance(configured, list) else [configured]
        return frozenset(token for token in several if token is not None)

    @property
    def has_sliding_window(self) -> bool:
        """Whether any layer sees only the last so many tokens."""
        config = self.model.config.get_text_config()
        kinds = getattr(config, "layer_types", None)
        return "sliding_attention" in kinds if kinds else getattr(config, "sliding_window", None) is not None


def load(source: str | Path, *, device: str = "cpu", dtype: str = "float32", name: str | None = None) -> FrozenModel:
    """Loads a hub id or a folder with eager attention. Raises ModelUnsupported with the reason."""
    folder = _folder(source)
    try:
        config = AutoConfig.from_pretrained(folder)
        _check_config(config)
        tokenizer = AutoTokenizer.from_pretrained(folder)
        maker = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
        model = _load_whole(maker, folder, dtype).to(_available(device))
    except ModelUnsupported:
        raise
    except Exception as error:  # whatever a damaged folder makes of transformers, it is one line to the operator
        raise ModelUnsupported(
            f"cannot load the model {str(source)!r}: {type(error).__name__}: {str(error)[:500]}"
        ) from error
    label = name or (BUNDLED_NAME if folder == BUNDLED else Path(str(source)).name)
    return freeze(model, tokenizer, digest=digest_of(folder), name=label)


def freeze(model: PreTrainedModel, tokenizer: Any, *, digest: str, name: str) -> FrozenModel:
    """Wraps a model made elsewhere; its parameters stop needing gradients. Raises ModelUnsupported."""
    model.eval().requires_grad_(False)
    if model.config.is_encoder_decoder:
        _start_of(model)
        sites.mark(model)
    else:
        # GPT-2 warns about padding by looking for the pad id in every batch, which costs a device sync a step
        model.config.pad_token_id = None
    return FrozenModel(model, tokenizer, measure(model), digest, name, context_length(model.config))


def measure(model: PreTrainedModel) -> ModelGeometry:
    """Reads the geometry off a two-token prefill: configs name these numbers in a dozen ways, the cache in one."""
    probe = torch.zeros(1, 2, dtype=torch.long, device=model.device)
    both = model.config.is_encoder_decoder
    config: Any = model.config if both else model.config.get_text_config()
    inputs = {"decoder_input_ids": probe} if both else {}
    with torch.inference_mode():
        cache: Any = getattr(model(probe, **inputs, use_cache=True), "past_key_values", None)
    cache = getattr(cache, "self_attention_cache", cache)
    if not getattr(cache, "layers", None):
        raise ModelUnsupported(f"{model.config.model_type}: the model keeps no keys and values a prefix could join")
    shapes = {(layer.keys.shape, layer.values.shape) for layer in cache.layers}
    if len(shapes) != 1 or len({shape for pair in shapes for shape in pair}) != 1:
        raise ModelUnsupported("layers with unequal key and value shapes cannot be served yet")
    _, kv_heads, _, head_dim = cache.layers[0].keys.shape
    if len(cache.layers) != _first(config, "decoder_layers", "num_decoder_layers", "num_hidden_layers"):
        raise ModelUnsupported("layers that share keys and values cannot be served yet")
    return ModelGeometry(
        family=config.model_type,
        layers=len(cache.layers),
        query_heads=_first(config, "decoder_attention_heads", "num_attention_heads"),
        kv_heads=kv_heads,
        head_dim=head_dim,
        hidden_size=config.hidden_size,
        encoder=_encoder(config) if both else None,
    )


def _encoder(config: Any) -> EncoderGeometry:
    """BART's and T5's names; the families after them have kept one or the other."""
    heads = _first(config, "encoder_attention_heads", "num_attention_heads")
    head_dim = getattr(config, "d_kv", None) or config.hidden_size // heads
    return EncoderGeometry(layers=_first(config, "encoder_layers", "num_layers"), heads=heads, head_dim=head_dim)


def _start_of(model: PreTrainedModel) -> int:
    """What `generate` begins answers with. Raises ModelUnsupported where the model names nothing to begin with."""
    for name in ("decoder_start_token_id", "bos_token_id"):
        for config in (model.generation_config, model.config):
            if (start := getattr(config, name, None)) is not None:
                return int(start)
    raise ModelUnsupported(
        f"{model.config.model_type}: the model's config names neither a decoder_start_token_id nor a bos_token_id, so "
        "there is nothing for an answer to begin with"
    )


def _first(config: Any, *names: str) -> int:
    """The first of these numbers that a config has."""
    return next(int(value) for value in (getattr(config, name, None) for name in names) if value is not None)


def context_length(config: Any) -> int:
    """Positions the model was made for, virtual tokens included."""
    text = config.get_text_config()
    positions = getattr(text, "max_position_embeddings", None) or getattr(text, "n_positions", None)
    if positions is None and hasattr(text, "relative_attention_num_buckets"):
        return RELATIVE_LENGTH
    if positions is None:
        raise ModelUnsupported(f"{config.model_type}: the model's config names no max_position_embeddings")
    return int(positions)


def digest_of(folder: Path) -> str:
    """sha256 over the names and bytes of the config and weight files, in name order."""
    digest = hashlib.sha256()
    for path in sorted(folder.iterdir()):
        if path.name == "config.json" or path.suffix in _WEIGHTS:
            with path.open("rb") as file:
                content = hashlib.file_digest(file, "sha256").hexdigest()
            digest.update(f"{path.name}\0{content}\n".encode())
    return digest.hexdigest()


def _folder(source: str | Path) -> Path:
    path = Path(source).expanduser()
    if path.is_dir():
        return path.resolve()
    if path.is_absolute() or str(source).startswith((".", "~")):
        raise ModelUnsupported(f"ANTEFIX_MODEL={source}: no such folder")
    from huggingface_hub import snapshot_download

    try:
        fetched = Path(snapshot_download(str(source), allow_patterns=[*_TEXT_FILES, "*.safetensors"]))
        if not list(fetched.glob("*.safetensors")):  # older repositories, loaded with weights_only
            fetched = Path(snapshot_download(str(source), allow_patterns=[*_TEXT_FILES, "pytorch_model*.bin"]))
        return fetched
    except Exception as error:
        raise ModelUnsupported(
            f"{str(source)!r} is neither a folder nor a hub model that can be fetched: {error}"
        ) from error


def _load_whole(maker: Any, folder: Path, dtype: str) -> Any:
    """The model, if the checkpoint has all of it: transformers draws what it lacks at random, anew in each process."""
    both: Any = maker.from_pretrained(
        folder, dtype=DTYPES[dtype], attn_implementation="eager", output_loading_info=True
    )
    model, loaded = both
    wrong = sorted(str(key) for key in [*loaded["missing_keys"], *loaded["mismatched_keys"]])
    if wrong:
        raise ModelUnsupported(f"the checkpoint lacks {len(wrong)} of the model's weights, such as {wrong[0]}")
    return model


def _available(device: str) -> torch.device:
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise ModelUnsupported(f"the device {device!r} was asked for, and this torch sees no GPU")
    chosen = torch.device(device)
    if chosen.type == "cuda" and chosen.index is not None:
        torch.cuda.set_device(chosen)  # streams, events and kernels of this thread are on that one from now on
    return chosen


def _check_config(config: Any) -> None:
    if config.is_encoder_decoder and config.model_type not in ENCODER_DECODERS:
        raise ModelUnsupported(
            f"{config.model_type}: of encoder-decoder models these families are served: {', '.join(ENCODER_DECODERS)}"
        )
    rope = getattr(config.get_text_config(), "rope_parameters", None) or {}
    nested = [value for value in rope.values() if isinstance(value, dict)] or [rope]
    for parameters in nested:
        kind = parameters.get("rope_type")
        if kind in BATCH_DEPENDENT_ROPE:
            raise ModelUnsupported(f"rope_type {kind!r} makes a row's positions depend on its neighbours in the batch")
