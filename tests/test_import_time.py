"""What `import fewbits` costs beyond torch and safetensors, and what it leaves alone."""

import json
import subprocess
import sys

BUDGET_SECONDS = 0.3
RUNS = 3


def python(code, *options):
    done = subprocess.run([sys.executable, *options, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done


def import_seconds():
    """The cumulative time of the entry `fewbits`; what was imported before it does not count."""
    lines = python(
        "import torch, safetensors, safetensors.torch; import fewbits", "-X", "importtime"
    ).stderr.splitlines()
    fields = [line.removeprefix("import time:").split("|") for line in lines if line.startswith("import time:")]
    return next(int(cumulative) / 1e6 for _, cumulative, name in fields if name == " fewbits")


def test_importing_fewbits_adds_little_to_torch():
    assert any(import_seconds() < BUDGET_SECONDS for _ in range(RUNS))


def test_importing_fewbits_brings_in_no_optional_package_and_none_of_torch_ao():
    code = """if True:
        import json, sys
        import torch, safetensors, safetensors.torch
        before = set(sys.modules)
        import fewbits
        print(json.dumps(sorted(set(sys.modules) - before)))
    """
    added = json.loads(python(code).stdout)
    optional = {"click", "rich", "transformers", "jsonschema", "numpy", "compressed_tensors", "hypothesis", "pytest"}
    assert "fewbits" in added
    assert {name.partition(".")[0] for name in added} & optional == set()
    assert [name for name in added if name.startswith("torch.ao")] == []


def test_importing_fewbits_registers_nothing_but_its_operations_and_changes_no_setting():
    code = """if True:
        import logging, warnings, torch, safetensors.torch, structlog
        def settings():
            schemas = sorted(map(str, torch._C._jit_get_all_schemas()))
            return [
                [schema for schema in schemas if not schema.startswith("fewbits::")],
                torch.get_num_threads(), torch.get_default_dtype(),
                list(warnings.filters), list(logging.getLogger().handlers), structlog.is_configured(),
            ]
        before = settings()
        import fewbits
        assert settings() == before
    """
    python(code)
