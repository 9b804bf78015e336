"""huggingface_hub's client, which has chat completions."""

import json
import sys

from huggingface_hub import InferenceClient
from huggingface_hub.errors import HfHubHTTPError

ask = json.loads(sys.argv[1])
client = InferenceClient(base_url=f"{ask['url']}/v1", api_key="none")


def chat(model, stream):
    found = client.chat_completion(
        ask["messages"], model=model, max_tokens=ask["max_tokens"], temperature=0, stream=stream
    )
    if stream:
        return "".join(chunk.choices[0].delta.content or "" for chunk in found)
    return found.choices[0].message.content


answers, errors = {}, []
for model in ask["models"]:
    answers[model] = {"chat": chat(model, False), "streamed chat": chat(model, True)}
for stream in (False, True):
    try:
        chat(ask["wrong"], stream)
    except HfHubHTTPError as error:
        errors.append({"kind": type(error).__name__, "message": str(error), "status": error.response.status_code})
print(json.dumps({"answers": answers, "errors": errors}))
