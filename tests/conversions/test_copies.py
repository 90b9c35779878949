"""The copies of converted adapters: deleted for room, and made again as they were."""

import shutil

import pytest
from mlx_adapters import factors, write_mlx
from test_broken_conversions import write_adalora, write_loha, write_split, write_tinker

from qlora_infer.adapters.store import AdapterStore
from qlora_infer.errors import CorruptAdapterError
from qlora_infer.sources.folder import FolderSource
from qlora_infer.testing import TINY_MODEL, fake_engine

FORMS = {
    "MLX": write_mlx,
    "AdaLoRA": write_adalora,
    "LoHa": write_loha,
    "Tinker": write_tinker,
    "PEFT, in 3 files": write_split,
}


@pytest.mark.parametrize("form", FORMS)
def test_a_copy_that_is_made_again_has_the_digest_of_the_first(form, tmp_path):
    """The same files are the same content each time, also after a pass through another folder and clock."""
    digests = set()
    for number in range(2):
        source = FORMS[form](tmp_path / f"source-{number}")
        store = AdapterStore(tmp_path / "copies")
        snapshot, _, _ = store.make("pirate", number, FolderSource(source), allow_pickle=False)
        store.close()
        assert snapshot.format == form
        digests.add(snapshot.digest)
    assert len(digests) == 1


def test_a_converted_adapter_makes_room_and_comes_back(tmp_path):
    """With room for one copy, two of MLX's adapters answer in turn; one whose source has changed meanwhile does not."""
    folders = [write_mlx(tmp_path / name, factors(TINY_MODEL, seed=seed)) for seed, name in enumerate("ab")]
    size = sum(path.stat().st_size for path in folders[0].iterdir())
    with fake_engine(max_disk_bytes=size + size // 2, max_loras=1, max_cpu_loras=1) as engine:
        first = engine.load_adapter("a", folders[0])
        engine.load_adapter("b", folders[1])
        for name in "abab":
            assert engine.generate("x", adapter=name)[0].text == f"{name} says: x"
        assert engine.adapters["a"] == first
        shutil.rmtree(folders[0])
        write_mlx(folders[0], factors(TINY_MODEL, seed=9))
        engine.generate("x", adapter="b")
        with pytest.raises(CorruptAdapterError, match="holds another content now"):
            engine.generate("x", adapter="a")
