"""Side effects of `import fewbits`: imported packages, registered operations, settings."""

import json
import subprocess
import sys


def python(code):
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done


def test_importing_fewbits_imports_neither_optional_packages_nor_torch_ao():
    code = """if True:
        import json, sys
        import torch, safetensors, safetensors.torch
        before = set(sys.modules)
        import fewbits
        print(json.dumps(sorted(set(sys.modules) - before)))
    """
    added = json.loads(python(code).stdout)
    optional = {
        "click",
        "rich",
        "jinja2",
        "dask",
        "distributed",
        "transformers",
        "jsonschema",
        "numpy",
        "compressed_tensors",
        "gguf",
        "hypothesis",
        "pytest",
    }
    assert "fewbits" in added
    assert {name.partition(".")[0] for name in added} & optional == set()
    # The compiler takes longer to import than fewbits; only code that compiles imports it.
    slow = ("torch.ao", "torch._dynamo", "torch._inductor", "torch.export", "torch.distributed", "sympy", "asyncio")
    assert [name for name in added if name.startswith(slow)] == []


def test_importing_fewbits_only_registers_its_operations():
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


def test_fewbits_imports_with_an_older_torch_that_has_no_grouped_products():
    code = """if True:
        import torch
        from torch._ops import _OpNamespace
        find = _OpNamespace.__getattr__
        def older(self, name):
            if name == "_grouped_mm":
                raise AttributeError(name)
            return find(self, name)
        _OpNamespace.__getattr__ = older
        vars(torch.ops.aten).pop("_grouped_mm", None)  # operations that were used before are kept here
        import fewbits
        fewbits.quantize(torch.nn.Linear(64, 64), "int8")
    """
    python(code)
