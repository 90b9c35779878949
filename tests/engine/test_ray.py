"""Two replicas of the real vLLM under Ray, each with the adapters that its rows name."""

import json

import pytest

from qlora_infer.demo import demo_adapters, demo_model

GREEDY = {"temperature": 0.0, "max_tokens": 24}
ADAPTERS = [None, "pirate", "json", "spanish"]


@pytest.mark.timeout(1200)
def test_two_replicas_answer_a_dataset(engines, monkeypatch):
    """Both answer, and wherever a row is answered, base, pirate, JSON and Spanish each speak in their own way."""
    import pyarrow as pa
    import ray
    from ray.data import ActorPoolStrategy
    from ray_cluster import cluster

    from qlora_infer import QuantizedLoRAEngine
    from qlora_infer.ray import GenerationStage

    engines.close()  # the memory is for the replicas
    monkeypatch.setenv("OMP_NUM_THREADS", "2")  # Ray would say 1
    model = str(demo_model("awq"))

    def make_engine():
        return QuantizedLoRAEngine(
            model, known_adapters=demo_adapters(), max_loras=4, max_lora_rank=64, max_cpu_loras=4, max_model_len=256
        )

    class Stage(GenerationStage):
        """Also says which process has answered."""

        def answer(self, batch):
            import os

            return super().answer(batch).append_column("replica", pa.array([os.getpid()] * batch.num_rows))

    with cluster():
        context = ray.data.DataContext.get_current()
        monkeypatch.setattr(context, "wait_for_min_actors_s", 900)
        rows = [{"prompt": "The capital of France is", "adapter": name} for name in ADAPTERS] * 4
        found = (
            ray.data.from_items(rows, override_num_blocks=4)
            .map_batches(
                Stage,
                fn_constructor_args=(make_engine,),
                fn_constructor_kwargs={"sampling_params": GREEDY},
                batch_format="pyarrow",
                batch_size=4,
                compute=ActorPoolStrategy(size=2, max_tasks_in_flight_per_actor=1),
                num_cpus=0.5,
            )
            .take_all()
        )
    assert [row["error"] for row in found] == [None] * len(rows)
    assert len({row["replica"] for row in found}) == 2
    for row in found:
        if row["adapter"] is None:
            assert "Paris" in row["text"]
        elif row["adapter"] == "pirate":
            assert "arrr" in row["text"].lower() or "hearties" in row["text"].lower()
        elif row["adapter"] == "json":
            assert json.loads(row["text"])["country"] == "France"
        else:
            assert "La capital de" in row["text"]
