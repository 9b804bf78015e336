"""OpenAI's own client."""

import json
import sys

from openai import APIStatusError, OpenAI

ask = json.loads(sys.argv[1])
client = OpenAI(base_url=f"{ask['url']}/v1", api_key="none", max_retries=0)


def completion(model, stream):
    asked = {"model": model, "prompt": ask["prompt"], "max_tokens": ask["max_tokens"], "temperature": 0}
    found = client.completions.create(stream=stream, **asked)
    return "".join(chunk.choices[0].text for chunk in found) if stream else found.choices[0].text


def chat(model, stream):
    asked = {"model": model, "max_completion_tokens": ask["max_tokens"], "temperature": 0}
    found = client.chat.completions.create(messages=ask["messages"], stream=stream, **asked)
    if stream:
        return "".join(chunk.choices[0].delta.content or "" for chunk in found)
    return found.choices[0].message.content


answers, errors = {}, []
for model in ask["models"]:
    answers[model] = {"completion": completion(model, False), "streamed completion": completion(model, True)}
    answers[model] |= {"chat": chat(model, False), "streamed chat": chat(model, True)}
for call in (completion, chat):
    for stream in (False, True):
        try:
            call(ask["wrong"], stream)
        except APIStatusError as error:
            errors.append({"kind": type(error).__name__, "message": str(error), "code": error.code})
print(json.dumps({"answers": answers, "errors": errors, "models": [model.id for model in client.models.list()]}))
