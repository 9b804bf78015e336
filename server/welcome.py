"""What whoever started the server reads when it answers."""

from __future__ import annotations

import shlex
from collections.abc import Sequence

from prefix_store.model.frozen import FrozenModel
from prefix_store.prefix import PrefixVersion

SHOWN = 8
USUAL_LENGTH = 16
SAMPLE_PROMPT = "Once upon a time"


def text(
    address: str,
    frozen: FrozenModel,
    prefixes: Sequence[PrefixVersion],
    free_slots: int,
    *,
    dtype: str,
    open_mode: bool,
) -> str:
    """The start-up block. `prefixes`: the first `SHOWN` of the default tenant's, and one more if there are more."""
    faster = "" if dtype == "float32" else " (tokens may differ from float32's)"
    names = [version.name for version in prefixes[:SHOWN]]
    more = " …" if len(prefixes) > SHOWN else ""
    length = max((version.virtual_tokens for version in prefixes), default=0) or USUAL_LENGTH
    access = "open mode, one tenant: there is no API key" if open_mode else "by API key"
    lines = {
        "model": f"{frozen.name}, {dtype}{faster} on {frozen.device}, context {frozen.context_length}",
        "prefixes": (", ".join(names) or "none yet") + more,
        "room": f"for {free_slots // length} prefixes of {length} tokens side by side on the device",
        "access": access,
        "try": try_line(address, names, open_mode=open_mode),
    }
    return "\n".join([f"\nantefix serves {address}", *(f"  {name:9} {line}" for name, line in lines.items()), ""])


def try_line(address: str, names: Sequence[str], *, open_mode: bool) -> str:
    """One line for a shell: the same prompt after two prefixes; the bare model stands in where there are fewer."""
    chosen = [f'"prefix_id": "{name}", ' for name in names[:2]]
    if len(chosen) < 2:
        chosen.append("")
    rest = f'"prompt": "{SAMPLE_PROMPT}", "max_tokens": 40, "temperature": 0'
    bodies = " ".join(shlex.quote("{" + prefix + rest + "}") for prefix in chosen)
    key = "" if open_mode else ' -H "Authorization: Bearer $ANTEFIX_API_KEY"'
    post = f"curl -s {address}/generate -H 'Content-Type: application/json'{key} -d \"$body\""
    return f"for body in {bodies}; do {post}; echo; done"
