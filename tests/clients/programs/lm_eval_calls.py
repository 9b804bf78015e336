"""lm-evaluation-harness, called from Python; the tasks are in the folder where it is started."""

import json
import sys

import lm_eval
import requests
from lm_eval.tasks import TaskManager

ask = json.loads(sys.argv[1])
tasks = TaskManager(include_path=".", include_defaults=False)


def evaluate(model, names, **more):
    """Each document's first request and what came of it, by the name of the task."""
    server = {"model": model, "base_url": f"{ask['url']}/v1/completions", "max_retries": 1, **more}
    server["custom_prefix_token_id"] = ask["bos"]
    found = lm_eval.simple_evaluate(
        "local-completions", server, tasks=names, task_manager=tasks, batch_size=3, bootstrap_iters=0
    )
    samples = {name: sorted(found["samples"][name], key=lambda sample: sample["doc_id"]) for name in names}
    return {name: [sample["resps"][0][0] for sample in samples[name]] for name in names}


answers, errors = {}, []
for model in ask["models"]:
    answers[model] = evaluate(model, ["scored", "rolling", "written"], num_concurrent=1)
answers["at once"] = evaluate(ask["models"][1], ["scored"], num_concurrent=4)
try:
    evaluate(ask["wrong"], ["scored"])
except requests.HTTPError as error:
    errors.append({"kind": type(error).__name__, "message": error.response.json()["error"]["message"]})
print(json.dumps({"answers": answers, "errors": errors}))
