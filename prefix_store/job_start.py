"""What the prefix of a job may start from, where that is another prefix: asked at submit, and again by the worker."""

from __future__ import annotations

from collections.abc import Callable

from prefix_store.errors import PrefixMismatch
from prefix_store.jobs import TrainingSpec
from prefix_store.prefix import Method, PrefixManifest

KV, EMBEDS, MEMORY = (Method.PREFIX, Method.TEXT), (Method.PROMPT,), (Method.PREFIX_PLUS,)
# What each built-in method goes on from; of a plugged-in one only the worker knows.
STARTS = {
    "prefix": KV,
    "prefix_mlp": KV,
    "prompt": EMBEDS,
    "prompt_mlp": EMBEDS,
    "prompt_lstm": EMBEDS,
    "prefix_plus": MEMORY,
}
Fits = Callable[[PrefixManifest], None]


def check_kind(method: str, source: str, manifest: PrefixManifest) -> None:
    """Raises PrefixMismatch unless the method goes on from such a prefix."""
    kinds = STARTS.get(method, tuple(Method))
    if manifest.method not in kinds:
        raise PrefixMismatch(
            f"init_from: method {method} starts from a prefix of method {' or '.join(kinds)}, "
            f"and {source} is one of {manifest.method}",
            param="init_from",
        )


def check(spec: TrainingSpec, manifest: PrefixManifest, fits: Fits) -> None:
    """Raises PrefixMismatch unless a job may start from the prefix that it names; `fits` raises it for the model."""
    check_kind(spec.method, str(spec.init_from), manifest)
    try:
        fits(manifest)
    except PrefixMismatch as error:
        raise PrefixMismatch(f"init_from: {spec.init_from}: {error.message}", param="init_from") from None
    expected = {
        "virtual_tokens": (spec.virtual_tokens, manifest.virtual_tokens),
        # a method's prefixes have real tokens behind their virtual ones; a decoder beside an encoder begins at 0
        "position_offset": (0 if manifest.geometry.encoder else manifest.virtual_tokens, manifest.position_offset),
        "stacks": (", ".join(spec.stacks or manifest.stacks), ", ".join(manifest.stacks)),
        "feature_map": (spec.feature_map if manifest.feature_map is not None else None, manifest.feature_map),
        # None is for whichever model
        "base_digest": (spec.base_digest or manifest.base_digest, manifest.base_digest or spec.base_digest),
    }
    for field, (wanted, there) in expected.items():
        if wanted != there:
            raise PrefixMismatch(
                f"init_from: {spec.init_from}: expected {field} {wanted}, it has {there}", param="init_from"
            )
