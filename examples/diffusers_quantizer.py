"""Let `from_pretrained` of Diffusers quantize a model: an entry in its registries of quantizers."""

from dataclasses import dataclass, field
from enum import Enum
from typing import Any

import diffusers
import torch
from diffusers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING
from diffusers.quantizers.base import DiffusersQuantizer
from diffusers.quantizers.quantization_config import QuantizationConfigMixin

import fewbits


class Method(str, Enum):
    """Diffusers asks for the `value` of a method, and looks it up by the text."""

    FEWBITS = "fewbits"


@dataclass
class FewbitsConfig(QuantizationConfigMixin):
    """The scheme and the settings of `fewbits.quantize`."""

    scheme: str = "int8"
    settings: dict[str, Any] = field(default_factory=dict)
    quant_method: Method = Method.FEWBITS


class FewbitsQuantizer(DiffusersQuantizer):
    """Quantizes a model in place after Diffusers has loaded its float weights."""

    is_serializable = False  # Diffusers would write the codes without the spec: use the result's `save`
    is_trainable = True

    def _process_model_before_weight_loading(self, model: torch.nn.Module, **_: object) -> None:
        """Change nothing: the files hold float weights."""

    def _process_model_after_weight_loading(self, model: torch.nn.Module, **_: object) -> torch.nn.Module:
        config = self.quantization_config
        model.fewbits_result = fewbits.quantize(model, config.scheme, inplace=True, **config.settings)
        return model

    def _dequantize(self, model: torch.nn.Module) -> torch.nn.Module:
        return fewbits.dequantize(model)


AUTO_QUANTIZATION_CONFIG_MAPPING["fewbits"] = FewbitsConfig
AUTO_QUANTIZER_MAPPING["fewbits"] = FewbitsQuantizer

SIZES = {"sample_size": 8, "block_out_channels": (32, 64), "layers_per_block": 1, "norm_num_groups": 8}
BLOCKS = {"down_block_types": ("DownBlock2D", "AttnDownBlock2D"), "up_block_types": ("AttnUpBlock2D", "UpBlock2D")}
torch.manual_seed(0)
unet = diffusers.UNet2DModel(in_channels=3, out_channels=3, **SIZES, **BLOCKS).eval()
unet.save_pretrained("unet")

config = FewbitsConfig(scheme="int8", settings={"exclude": ["conv_out.weight"]})
loaded = diffusers.UNet2DModel.from_pretrained("unet", quantization_config=config).eval()
print(loaded.fewbits_result.ledger)
image, step = torch.randn(1, 3, 8, 8), torch.tensor([10])
with torch.no_grad():
    exact, rounded = unet(image, step).sample, loaded(image, step).sample
print(f"SQNR of the output: {fewbits.measure(exact, rounded).sqnr_db:.0f} dB")

# Saved with its spec; loaded into a model that Diffusers made from the configuration alone.
loaded.fewbits_result.save("unet.safetensors")
again = diffusers.UNet2DModel.from_config(diffusers.UNet2DModel.load_config("unet"))
again = fewbits.load("unet.safetensors", into=again).eval()
with torch.no_grad():
    if not torch.equal(again(image, step).sample, rounded):
        raise SystemExit("the loaded model computes something else")
