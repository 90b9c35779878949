"""Evaluate the base model and each adapter of a running ``qlora-infer serve`` with lm-evaluation-harness.

pip install 'lm-eval[api]' transformers
export OPENAI_API_KEY=a-client-s-secret
python examples/evaluation/evaluate.py http://127.0.0.1:8000 --tokenizer MODEL --tasks capitals arc_easy
"""

import argparse
from pathlib import Path

import lm_eval
import openai
from lm_eval.tasks import TaskManager


def evaluate(url: str, tokenizer: str, tasks: list[str]) -> dict[str, dict[str, float]]:
    """Return the accuracy in each task of each model that the server lists."""
    names = [model.id for model in openai.OpenAI(base_url=f"{url}/v1").models.list()]
    own_tasks = TaskManager(include_path=str(Path(__file__).parent))
    scores = {}
    for name in names:
        # The scores are made of log-probabilities of the prompt; the tokenizer finds where the answer begins in it.
        model_args = {"model": name, "base_url": f"{url}/v1/completions", "tokenizer": tokenizer, "num_concurrent": 8}
        results = lm_eval.simple_evaluate(
            "local-completions",
            model_args={**model_args, "tokenizer_backend": "huggingface"},
            tasks=tasks,
            task_manager=own_tasks,
            bootstrap_iters=0,
        )["results"]
        scores[name] = {task: results[task]["acc,none"] for task in tasks}
    return scores


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("url", help="the server's address, without /v1")
    parser.add_argument("--tokenizer", required=True, help="the base model: a folder, or a Hub id")
    parser.add_argument("--tasks", nargs="+", default=["capitals"])
    arguments = parser.parse_args()
    for name, of_tasks in evaluate(arguments.url, arguments.tokenizer, arguments.tasks).items():
        print(name, *(f"{task} {accuracy:.2f}" for task, accuracy in of_tasks.items()), sep="\t")
