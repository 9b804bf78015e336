"""LangChain's models for OpenAI's routes."""

import json
import sys

from langchain_openai import ChatOpenAI, OpenAI
from openai import APIStatusError

ask = json.loads(sys.argv[1])
messages = [(message["role"], message["content"]) for message in ask["messages"]]


def made(kind, model):
    server = {"base_url": f"{ask['url']}/v1", "api_key": "none", "max_retries": 0}
    return kind(model=model, temperature=0, max_tokens=ask["max_tokens"], **server)


def completion(model, stream):
    llm = made(OpenAI, model)
    return "".join(llm.stream(ask["prompt"])) if stream else llm.invoke(ask["prompt"])


def chat(model, stream):
    llm = made(ChatOpenAI, model)
    return "".join(piece.content for piece in llm.stream(messages)) if stream else llm.invoke(messages).content


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
usage = made(ChatOpenAI, ask["models"][1]).invoke(messages).usage_metadata
batch = made(OpenAI, ask["models"][1]).batch([ask["prompt"], ask["prompt"]])
print(json.dumps({"answers": answers, "errors": errors, "usage": usage, "batch": batch}))
