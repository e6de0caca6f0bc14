"""The benchmarks of checkpoints on disk, on checkpoints so small that no time means anything."""

import json

import pytest
from benchmarks import copying, disk, many_tensors
from benchmarks.report import Cell, Report

MB = 10**6

pytestmark = pytest.mark.usefixtures("threads_as_before")


# Many tensors.


def test_many_tensors_times_every_step_and_prints_the_cost_of_a_tensor(tmp_path, capsys):
    file = tmp_path / "many.json"
    asked = ["--tensors", "12", "--rounds", "2", "--threads", "1"]
    assert many_tensors.main([*asked, "--json", str(file)]) == 0
    cells = json.loads(file.read_text())["cells"]
    assert [cell["contender"] for cell in cells] == ["made", "resumed", "verified", "loaded"]
    assert all(len(cell["seconds"]) == 2 for cell in cells)
    assert "ms a tensor" in capsys.readouterr().out


# Copying.


def test_copying_times_fewbits_and_cp_and_leaves_nothing(tmp_path, synthetic_source, capsys):
    file = tmp_path / "copying.json"
    (tmp_path / "out").mkdir()
    asked = [str(synthetic_source), "--out", str(tmp_path / "out"), "--rounds", "2", "--threads", "1"]
    assert copying.main([*asked, "--scheme", "int8,int4", "--compare", "1,2", "--json", str(file)]) == 0
    found = json.loads(file.read_text())
    names = [cell["contender"] for cell in found["cells"]]
    assert names == [copying.COPY, *(copying.label(scheme, count) for scheme in ("int8", "int4") for count in (1, 2))]
    assert all(len(cell["seconds"]) == 2 for cell in found["cells"])
    assert len(found["promises"]) == 2 + disk.in_memory(tmp_path)
    assert list((tmp_path / "out").iterdir()) == []
    assert "copies, least" in capsys.readouterr().out


def test_copying_prints_each_promise_and_its_result():
    seconds = {"cp and sync": [1.0, 2.0, 1.0], "int8, 2 threads": [3.0, 4.0, 5.0], "int4, 2 threads": [7.0, 14.0, 7.0]}
    seconds["int4, 1 thread"] = [14.0, 28.0, 7.0]
    report = Report("copying", {}, {}, {})
    report.cells = [Cell({}, name, each, seconds["cp and sync"]) for name, each in seconds.items()]
    assert copying.ratios([3.0, 4.0, 5.0], [1.0, 2.0, 1.0]) == (2.0, 3.0, 5.0)
    lines = copying.checks(report, [1, 2], twice=True)
    assert [line.split(":")[0] for line in lines] == ["held", "NOT HELD", "held"]
    assert "found 3.00; aim 2, not reached" in lines[0]
    assert len(copying.checks(report, [1, 2], twice=False)) == 2
    assert "2.00" in copying.table(report)
