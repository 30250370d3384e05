"""A sample of the model families that `benchmarks/families.py` tries: they trace on an A100 and on a T4, as its committed table says."""

import json

import pytest

from tests import simulated

pytest.importorskip("transformers", reason="transformers is not installed")

CODE = f"""
sys.path.insert(0, "{simulated.ROOT / "benchmarks"}")
import families
fake.enable()
wanted = json.loads(sys.argv[1])
tell({{name: families.traced(build) for name, build in families.families() if name in wanted}})
"""
SAMPLE = ["causal_lm mixtral", "masked_lm bert", "seq_to_seq_causal_lm bart", "image_classification vit", "semantic_segmentation segformer"]


def test_a_sample_of_the_families_traces():
    wanted = [f"transformers {name}" for name in SAMPLE]
    committed = json.loads((simulated.ROOT / "benchmarks/results/families.json").read_text())["families"]
    assert set(wanted) <= set(committed)
    assert simulated.in_a_process(CODE, json.dumps(wanted)) == dict.fromkeys(wanted, "")
