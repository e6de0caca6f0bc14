"""Results of `fewbits quantize DIR` load into their transformers class, whatever transformers renames or merges.

The models and the way through files are those of the stress program, which takes all types.
"""

from pathlib import Path

import pytest

transformers = pytest.importorskip("transformers")
transformers_types = pytest.importorskip("stress.transformers_types")

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning", "ignore::DeprecationWarning")

#: Types whose files have other names than their modules. The first ones differ most: renamed layers, merged experts,
#: split and permuted projections, models inside of models.
TYPES = (Path(__file__).parents[1] / "data" / "transformers_types.txt").read_text().split()
QUICK, ALL = TYPES[:10], TYPES[10:]


@pytest.mark.parametrize("kind", [*QUICK, *(pytest.param(kind, marks=pytest.mark.slow) for kind in ALL)])
def test_a_result_from_disk_loads_into_its_class_with_the_values_that_transformers_gives(kind, tmp_path):
    assert transformers_types.through_files(kind, tmp_path) == "loads under other names"
