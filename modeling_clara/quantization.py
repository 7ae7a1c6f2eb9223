"""int8 weights on a CPU with torch alone: a third of the memory, and answers are written about twice as fast.

Decoding reads every weight for each token, so what counts is bytes. The generator is added to the weights before they
are rounded, so that it costs nothing, and every other role subtracts it again beside its own adapter: no second copy.
"""

import ctypes
import sys

import torch
from peft.tuners.lora import Linear as LoraLinear
from torch import nn
from torch.nn import functional as F

from .configuration_clara import ROLES
from .files_clara import live_tensors

KERNEL = torch.bfloat16  # of the products; the kernel for float32 is four times slower. All else is float32
FEW_ROWS = 16  # up to so many the kernel that reads int8 is faster than a product with the weights in bfloat16
KERNEL_STEP = 16  # inputs that the kernel reads at a time, beyond the end of a row of another width
ROWS_AT_ONCE = 8192  # of a weight that are held in float32 or bfloat16 at a time: a vocabulary has many


def int8_product(states: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """(..., out) of states (..., in), weight (out, in) int8 and scale (out,) bfloat16, in the dtype of the states."""
    rows = states.reshape(-1, states.shape[-1]).to(KERNEL)
    has_kernel = len(rows) <= FEW_ROWS and rows.shape[1] % KERNEL_STEP == 0 and states.device.type == "cpu"
    if has_kernel and not (rows.requires_grad and torch.is_grad_enabled()):
        output = torch._weight_int8pack_mm(rows.contiguous(), weight, scale)
    else:
        parts = [F.linear(rows, part.to(KERNEL)) for part in weight.split(ROWS_AT_ONCE)]
        output = (parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)) * scale
    return output.to(states.dtype).view(*states.shape[:-1], -1)


class Int8Linear(nn.Module):
    """A linear layer with frozen weight (out, in) int8 and scale (out,) bfloat16."""

    def __init__(self, weight: nn.Parameter, scale: nn.Parameter, bias: nn.Parameter | None = None):
        super().__init__()
        self.weight, self.scale, self.bias = weight, scale, bias

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        """(..., in) to (..., out)."""
        output = int8_product(states, self.weight, self.scale)
        return output if self.bias is None else output + self.bias


class Int8Embedding(nn.Module):
    """Token embeddings with weight (vocabulary, hidden) int8 and scale (vocabulary,) bfloat16."""

    def __init__(self, weight: nn.Parameter, scale: nn.Parameter):
        super().__init__()
        self.weight, self.scale = weight, scale

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """(...) int64 to (..., hidden) float32."""
        return self.weight[ids].float() * self.scale[ids, None].float()


class Int8Lora(LoraLinear):
    """A LoRA layer over an `Int8Linear` that has the generator added already."""

    def forward(self, states: torch.Tensor, *args, **kwargs) -> torch.Tensor:
        """(..., in) to (..., out)."""
        output = self.base_layer(states)
        if self._active_adapter == ["generator"]:
            return output
        for role, sign in [*((role, 1) for role in self._active_adapter), ("generator", -1)]:
            lora_a, lora_b = (part[role].weight.to(states.dtype) for part in (self.lora_A, self.lora_B))
            added = F.linear(F.linear(states, lora_a), lora_b)
            output = torch.add(output, added, alpha=sign * self.scaling[role])
        return output


@torch.no_grad()
def to_int8(weight: torch.Tensor) -> tuple[nn.Parameter, nn.Parameter]:
    """(out, in) rounded to int8 with a scale (out,) for each row, both frozen.

    A scale is rounded to bfloat16 before the weights are divided by it, so that its rounding costs nothing.
    """
    rows, scale = torch.empty(weight.shape, dtype=torch.int8), torch.empty(len(weight), dtype=KERNEL)
    for start in range(0, len(weight), ROWS_AT_ONCE):
        part = slice(start, start + ROWS_AT_ONCE)
        values = weight[part].float()
        scale[part] = (values.abs().amax(1) / 127).clamp(min=1e-12).to(KERNEL)
        rows[part] = (values / scale[part].float()[:, None]).round().clamp(-127, 127).to(torch.int8)
    return nn.Parameter(rows, requires_grad=False), nn.Parameter(scale, requires_grad=False)


def quantize_model(model):
    """Turn a `CLaRaForRAG`, loaded on a CPU in any float dtype, into one with int8 weights, in place, and return it.

    Rounded are the linear layers that have adapters, the token embeddings and the LM head (but for those of a kind of
    their own). All calls work, but it trains no more: the weights have the generator in them. The fingerprint and what
    `save_pretrained` writes stay exact. A ValueError if the weights are quantised or merged already, or on a GPU.
    """
    with model.lock, torch.no_grad():
        bases = [layer.get_base_layer() for layer in model.roles.layers]
        kinds = {(type(base), base.weight.dtype, base.weight.device.type) for base in bases}
        is_plain = all(kind is nn.Linear and device == "cpu" for kind, _, device in kinds)
        if model.roles.merged_weights or not is_plain:
            found = sorted(f"{kind.__name__} {dtype} on {device}" for kind, dtype, device in kinds)
            raise ValueError(
                f"the backbone must have unmerged Linear layers on cpu for int8 weights, got {found}. Load it "
                "without `quantization_config`, outside bulk contexts; on a GPU bitsandbytes quantises."
            )
        _share_adapters(model)
        for layer, base in zip(model.roles.layers, bases, strict=True):
            lora_a, lora_b = (part["generator"].weight.float() for part in (layer.lora_A, layer.lora_B))
            weight = torch.addmm(base.weight.float(), lora_b, lora_a, alpha=layer.scaling["generator"])
            layer.base_layer = Int8Linear(*to_int8(weight), base.bias)
            base.weight = None  # a backbone that is no mapped file is given back layer by layer
            layer.__class__ = Int8Lora
            _trim_heap()
        _quantize_vocabulary(model.backbone)
        kept = {parameter.data_ptr() for name, parameter in model.named_parameters() if ".lora_" in name}
        kept |= {m.scale.data_ptr() for m in model.modules() if isinstance(m, (Int8Linear, Int8Embedding))}
        for parameter in model.parameters():  # what is left of a file that is mapped into memory would keep all of it
            if parameter.is_floating_point() and parameter.data_ptr() not in kept:
                parameter.data = parameter.data.to(torch.float32, copy=True)
        for name, stored in (model._stored or {"rows": {}})["rows"].items():  # exact where they had been rounded
            getattr(model, name).data = stored.to(torch.float32, copy=True)
        _trim_heap()
    return model


def _trim_heap() -> None:
    """Give memory that was freed back to the system, where the C library can (glibc)."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)


def _quantize_vocabulary(backbone) -> None:
    """Round embeddings and LM head, once if they are one tensor."""
    embeddings, head = backbone.get_input_embeddings(), backbone.get_output_embeddings()
    is_tied = head.weight is embeddings.weight
    if type(head) is not nn.Linear or (is_tied and type(embeddings) is not nn.Embedding):
        return
    parts = to_int8(head.weight)
    backbone.set_output_embeddings(Int8Linear(*parts, head.bias))
    if type(embeddings) is nn.Embedding:
        backbone.set_input_embeddings(Int8Embedding(*(parts if is_tied else to_int8(embeddings.weight))))


def _share_adapters(model) -> None:
    """Let the adapters be the tensors that the model keeps of its files, in their dtype, where these are the same."""
    parameters = {parameter.data_ptr(): parameter for parameter in model.parameters()}
    for part in ROLES if model._stored else ():
        stored = model._stored[part]
        for name, live in live_tensors(model, part).items():
            if name in stored and torch.equal(stored[name].to(live.dtype), live):
                parameters[live.data_ptr()].data = stored[name]
