"""Every error this project raises on purpose.

AntefixError
├── InvalidRequest               what the caller sent cannot be served as it stands
│   ├── InvalidName              not a legal prefix or tenant name
│   ├── InvalidPrefix            a prefix file that is damaged, unsafe or not what it claims
│   │   └── PrefixMismatch       a sound prefix that does not fit this model
│   ├── ContextLengthExceeded    prefix + prompt + max_tokens over the model's context
│   ├── ChatTemplateMissing      messages, for a model that has no form for them
│   └── InvalidTrainingData      examples that cannot be trained on
├── PayloadTooLarge              over a size cap
├── RequestTimeout               a body that stopped on its way
├── NotFound                     unknown, or another tenant's: never told apart
│   ├── PrefixNotFound
│   ├── ModelNotFound            a name that is neither the base model's nor a prefix's
│   ├── JobNotFound
│   └── NoSuchFile
├── Unauthorized                 no key, or not a valid one
├── Forbidden                    a valid key without the needed scope
├── QuotaExceeded                the tenant may not have more of it
├── RateLimited                  the tenant has asked for too much in this minute
├── Conflict                     not in this state
│   └── StillRunning             the same request, by its Idempotency-Key, is being answered
├── KeyReused                    an Idempotency-Key that came with another request
├── PreconditionFailed           it is no longer what the caller thinks it is
├── LeaseLost                    this worker no longer owns the job
├── Overloaded                   the queue is full; try again later
├── StoreUnavailable             the store cannot be reached
├── StoreCorrupt                 stored bytes do not match their digest
├── ModelUnsupported             a model that cannot be served right
├── Loading                      this server is not ready yet
└── GenerationFailed             the engine could not finish a request
    ├── PrefixNumerics           the prefix or the prompt makes this model's logits overflow
    ├── OutOfMemory              there is no memory for it now, not even for it alone
    └── ShuttingDown             this server takes no more requests; another one, or a later one, does
"""

from __future__ import annotations


class AntefixError(Exception):
    """Base of the tree. `code` is stable for clients; `param` names the offending field, if one does."""

    code = "internal_error"

    def __init__(self, message: str, *, param: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.param = param


class InvalidRequest(AntefixError):
    """What the caller sent cannot be served as it stands."""

    code = "invalid_request"


class InvalidName(InvalidRequest):
    """Not a legal prefix or tenant name."""

    code = "invalid_name"


class InvalidPrefix(InvalidRequest):
    """A prefix file that is damaged, unsafe or not what it claims."""

    code = "invalid_prefix"


class PrefixMismatch(InvalidPrefix):
    """A sound prefix that does not fit this model."""

    code = "prefix_mismatch"


class ContextLengthExceeded(InvalidRequest):
    """Prefix, prompt and max_tokens together exceed the model's context."""

    code = "context_length_exceeded"


class ChatTemplateMissing(InvalidRequest):
    """Messages, for a model that has no form for them."""

    code = "chat_template_missing"


class InvalidTrainingData(InvalidRequest):
    """Examples that cannot be trained on; the message names the line."""

    code = "invalid_training_file"


class PayloadTooLarge(AntefixError):
    """Over a size cap."""

    code = "payload_too_large"


class RequestTimeout(AntefixError):
    """A body that stopped on its way."""

    code = "request_timeout"


class NotFound(AntefixError):
    """Unknown, or another tenant's: the two are never told apart."""

    code = "not_found"


class PrefixNotFound(NotFound):
    """No such prefix for this tenant."""

    code = "prefix_not_found"


class ModelNotFound(NotFound):
    """A name that is neither the base model's nor one of this tenant's prefixes."""

    code = "model_not_found"


class JobNotFound(NotFound):
    """No such job for this tenant."""

    code = "job_not_found"


class NoSuchFile(NotFound):
    """No such uploaded file for this tenant."""

    code = "file_not_found"


class Unauthorized(AntefixError):
    """No API key, or not a valid one."""

    code = "invalid_api_key"


class Forbidden(AntefixError):
    """A valid API key without the needed scope."""

    code = "insufficient_scope"


class QuotaExceeded(AntefixError):
    """The tenant may not have more of it; asking again does not help."""

    code = "quota_exceeded"


class RateLimited(AntefixError):
    """The tenant has asked for too much in this minute; there is room again in `retry_after` seconds."""

    code = "rate_limit_exceeded"
    retry_after = 60


class Conflict(AntefixError):
    """The object is not in a state that allows this."""

    code = "conflict"


class StillRunning(Conflict):
    """The same request, by its Idempotency-Key, is being answered; ask again in `retry_after` seconds."""

    code = "idempotency_key_in_use"
    retry_after = 1


class KeyReused(AntefixError):
    """An Idempotency-Key that came with another request before."""

    code = "idempotency_key_reused"


class PreconditionFailed(AntefixError):
    """The object is no longer what the caller thinks it is (`If-Match`)."""

    code = "precondition_failed"


class LeaseLost(AntefixError):
    """This worker no longer owns the job and must write nothing more."""

    code = "lease_lost"


class Overloaded(AntefixError):
    """The waiting queue is full; a place should be free in `retry_after` seconds."""

    code = "overloaded"
    retry_after = 1


class StoreUnavailable(AntefixError):
    """The store cannot be reached. `may_pass`: nothing is wrong but that its server does not answer now."""

    code = "store_unavailable"
    may_pass = False


class StoreCorrupt(AntefixError):
    """Stored bytes do not match their digest."""

    code = "store_corrupt"


class ModelUnsupported(AntefixError):
    """A model that cannot be served right; the message says why."""

    code = "model_unsupported"


class Loading(AntefixError):
    """This server is not ready yet; try again soon."""

    code = "loading"

    def __init__(
        self, message: str = "the server is loading its model; try again soon", *, param: str | None = None
    ) -> None:
        super().__init__(message, param=param)


class GenerationFailed(AntefixError):
    """The engine could not finish a request; trying again is safe."""

    code = "generation_failed"


class PrefixNumerics(GenerationFailed):
    """Finite keys and values behind which this model's logits are not finite; the same request fails again."""

    code = "prefix_numerics"

    def __init__(
        self,
        message: str = "the prefix or the prompt makes this model's logits overflow",
        *,
        param: str | None = None,
    ) -> None:
        super().__init__(message, param=param)


class OutOfMemory(GenerationFailed):
    """There is no memory for the request now, not even for it alone; another server, or this one later, may have it."""

    code = "out_of_memory"

    def __init__(
        self,
        message: str = "the server has no memory for this request now; try again later",
        *,
        param: str | None = None,
    ) -> None:
        super().__init__(message, param=param)


class ShuttingDown(GenerationFailed):
    """This server takes no more requests; another one, or a later one, does."""

    code = "shutting_down"

    def __init__(
        self,
        message: str = "the server is shutting down; try again on another one or later",
        *,
        param: str | None = None,
    ) -> None:
        super().__init__(message, param=param)
