"""LiteLLM, which knows its providers by the first part of the model's name."""

import json
import sys

import litellm
from openai import APIStatusError

ask = json.loads(sys.argv[1])
server = {"api_base": f"{ask['url']}/v1", "api_key": "none", "max_retries": 0, "temperature": 0}
server["max_tokens"] = ask["max_tokens"]


def completion(model, stream):
    name = f"text-completion-openai/{model}"
    found = litellm.text_completion(model=name, prompt=ask["prompt"], stream=stream, **server)
    return "".join(chunk.choices[0].text or "" for chunk in found) if stream else found.choices[0].text


def chat(model, stream):
    found = litellm.completion(model=f"openai/{model}", messages=ask["messages"], stream=stream, **server)
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
            errors.append({"kind": type(error).__name__, "message": str(error)})
print(json.dumps({"answers": answers, "errors": errors}))
