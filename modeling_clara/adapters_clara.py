"""The three LoRA roles of one backbone: which one is active, which ones train, and how checkpointing remembers it.

Use `RoleSwitch` instead of PEFT's `set_adapter`, which also flips `requires_grad`.
"""

import contextlib
import functools
import logging
import threading
import warnings
from collections.abc import Iterable, Iterator

import torch
from peft import LoraConfig
from peft.tuners.lora import LoraLayer
from torch import nn
from torch.autograd.function import once_differentiable

from .configuration_clara import ROLES, CLaRaConfig

logger = logging.getLogger(__name__)


class CallLock:
    """A re-entrant lock that copies and pickles as a fresh one, so that models stay copyable.

    It is fair: a thread that takes it again and again, as one that compresses a corpus does, lets others in between.
    """

    def __init__(self):
        self._lock, self._turn = threading.Lock(), threading.Lock()
        self._owner, self._depth = None, 0

    def __enter__(self):
        if self._owner != threading.get_ident():
            with self._turn:  # who waits for the lock holds it, and whoever comes later stands behind
                self._lock.acquire()
            self._owner = threading.get_ident()
        self._depth += 1

    def __exit__(self, *exception):
        self._depth -= 1
        if not self._depth:
            self._owner = None
            self._lock.release()

    def __reduce__(self):
        return CallLock, ()


@contextlib.contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Context: no module is in training mode; on leaving, those that were are again."""
    training = [module for module in model.modules() if module.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True


def check_role(role: str) -> str:
    """Return `role`, or raise a ValueError that names the roles there are."""
    if role not in ROLES:
        raise ValueError(f"`role` must be one of {list(ROLES)}, got {role!r}. Use one of these names.")
    return role


def add_roles(backbone: nn.Module, config: CLaRaConfig) -> None:
    """Inject the adapters of all roles; target modules that `config.lora` leaves open are all below the LM head."""
    modules = backbone.base_model.named_modules()
    linear = {name.rpartition(".")[2] for name, module in modules if isinstance(module, nn.Linear)}
    for role in ROLES:
        settings = config.lora[role]
        settings["target_modules"] = sorted(settings["target_modules"] or linear)
        if not settings["target_modules"]:
            source = config.backbone_name_or_path
            raise ValueError(f"the backbone `{source}` must have linear layers for LoRA, found none. Choose another.")
        lora = LoraConfig(
            r=settings["rank"],
            lora_alpha=settings["alpha"],
            lora_dropout=settings["dropout"],
            target_modules=list(settings["target_modules"]),
            task_type="CAUSAL_LM",
        )
        lora.base_model_name_or_path, lora.revision = config.backbone_name_or_path, config.backbone_revision
        with warnings.catch_warnings():  # PEFT warns of several adapters on one model, which is the point here
            warnings.filterwarnings("ignore", message="Already found a `peft_config`")
            backbone.add_adapter(lora, role)


class _FusedLora(torch.autograd.Function):
    """x W^T + scaling x A^T B^T for a frozen W."""

    @staticmethod
    def forward(ctx, states, weight, lora_a, lora_b, scaling):
        shape, states = states.shape, states.reshape(-1, states.shape[-1])
        lora_a, lora_b = lora_a.to(states.dtype), lora_b.to(states.dtype)
        low = states @ lora_a.T  # (tokens, rank)
        output = (states @ weight.T).addmm_(low, lora_b.T, alpha=scaling)
        ctx.save_for_backward(states, weight, lora_a, lora_b, low)
        ctx.scaling, ctx.shape = scaling, shape
        return output.view(*shape[:-1], -1)

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):
        states, weight, lora_a, lora_b, low = ctx.saved_tensors
        gradient = gradient.reshape(-1, gradient.shape[-1])
        low_gradient = gradient @ lora_b
        of_a = (low_gradient.T @ states).float() * ctx.scaling if ctx.needs_input_grad[2] else None
        of_b = (gradient.T @ low).float() * ctx.scaling if ctx.needs_input_grad[3] else None
        of_states = None
        if ctx.needs_input_grad[0]:
            of_states = (gradient @ weight).addmm_(low_gradient, lora_a, alpha=ctx.scaling).view(ctx.shape)
        return of_states, None, of_a, of_b, None


def _fused_forward(layer: LoraLayer, role: str, states: torch.Tensor) -> torch.Tensor:
    weight = layer.get_base_layer().weight
    lora_a, lora_b = layer.lora_A[role].weight, layer.lora_B[role].weight
    return _FusedLora.apply(states.to(weight.dtype), weight, lora_a, lora_b, layer.scaling[role])


def _can_fuse(layer: LoraLayer, role: str | None) -> bool:
    """Whether a layer is plain: no bias, no dropout, no gradient of its own weight, nothing to cast it to."""
    base = layer.get_base_layer()
    has_dropout = layer.training and role and not isinstance(layer.lora_dropout[role], nn.Identity)
    dtype = torch.get_autocast_dtype(base.weight.device.type)
    is_cast = torch.is_autocast_enabled(base.weight.device.type) and dtype != base.weight.dtype
    return bool(
        role
        and torch.is_grad_enabled()
        and type(base) is nn.Linear
        and base.bias is None
        and not base.weight.requires_grad
        and layer.lora_A[role].weight.dtype == torch.float32
        and not has_dropout
        and not is_cast
    )


class RoleSwitch:
    """Switches the LoRA layers of a backbone, into which `add_roles` has put the adapters, between the roles.

    PEFT's `set_adapter` also flips `requires_grad`, and a parameter whose flag is off when the backward pass reaches
    it loses its gradient silently. The switch only sets the name of the active adapter; `set_trainable` alone decides
    what trains.
    """

    def __init__(self, backbone: nn.Module):
        self.layers = [module for module in backbone.modules() if isinstance(module, LoraLayer)]
        self.active: str | None = None
        self.merged_weights: dict[str, list[torch.Tensor]] = {}  # role -> weight of each layer with the role added
        self._own_weights: list[torch.Tensor] = []  # the backbone's own, kept while anything is merged
        self.set_trainable(())
        self._activate(None)

    def set_trainable(self, roles: Iterable[str]) -> None:
        """Let the adapters of `roles` train and freeze those of the others."""
        trainable = {check_role(role) for role in roles}
        for layer in self.layers:
            for role in ROLES:
                for parameter in (layer.lora_A[role].weight, layer.lora_B[role].weight):
                    parameter.requires_grad_(role in trainable)

    def _activate(self, role: str | None) -> None:
        is_merged = role in self.merged_weights and not torch.is_grad_enabled()
        for layer in self.layers:
            layer._active_adapter = [role] if role and not is_merged else []
        weights = self.merged_weights[role] if is_merged else self._own_weights
        with torch.inference_mode(False), torch.no_grad():
            for layer, weight in zip(self.layers if weights else (), weights, strict=True):
                layer.get_base_layer().weight.data = weight
        self.active = role

    @contextlib.contextmanager
    def use(self, role: str | None) -> Iterator[None]:
        """Context: run the backbone in a role, or plain for None, and restore the role before it."""
        if role is not None:
            check_role(role)
        before = self.active
        self._activate(role)
        try:
            yield
        finally:
            self._activate(before)

    @contextlib.contextmanager
    def fused(self) -> Iterator[None]:
        """Context: layers add the LoRA product in place, if that gives the same; for training on a CPU.

        PEFT's own forward casts, scales and adds whole activations, a tenth of a training step. Here the product has
        the dtype of the frozen weights, in PEFT that of the adapter (float32).
        """
        layers = [layer for layer in self.layers if _can_fuse(layer, self.active)]
        for layer in layers:
            layer.forward = functools.partial(_fused_forward, layer, self.active)
        try:
            yield
        finally:
            for layer in layers:
                del layer.forward

    def checkpoint_context(self) -> tuple[contextlib.AbstractContextManager, contextlib.AbstractContextManager]:
        """The `context_fn` for `torch.utils.checkpoint` that recomputes a layer in the role of its forward pass.

        Without it the recomputation runs in whatever role is active during the backward pass: wrong gradients, no
        exception. The recomputation does not restore the role layer by layer: the backward pass goes through
        generator, reasoner and compressor once, and `forward` activates its role anyway.
        """
        role = self.active

        @contextlib.contextmanager
        def recompute():
            if self.active != role:
                self._activate(role)
            yield

        return contextlib.nullcontext(), recompute()

    @contextlib.contextmanager
    def merged(self, roles: Iterable[str], lock: CallLock) -> Iterator[None]:
        """Context: passes without gradient use, for each of `roles`, the backbone's weights with its product added.

        The backbone's own tensors are kept and come back in every other role and afterwards, bit for bit (PEFT's
        `unmerge` subtracts and so returns rounded ones). Costs one copy of the adapted weights per role. A quantised
        backbone stays as it is, with a warning. A RuntimeError inside another such context.
        """
        with lock, torch.inference_mode(False), torch.no_grad():
            if self._own_weights:
                raise RuntimeError(
                    f"{sorted(self.merged_weights)} are merged already. Leave that `bulk_compression()` or "
                    "`bulk_answering()` before opening another."
                )
            weights = [layer.get_base_layer().weight for layer in self.layers]
            if all(type(weight) is nn.Parameter and weight.dtype.is_floating_point for weight in weights):
                own = [weight.data for weight in weights]
                pairs = list(zip(self.layers, own, strict=True))
                self.merged_weights = {
                    role: [weight + layer.get_delta_weight(role).to(weight.dtype) for layer, weight in pairs]
                    for role in roles
                }
                self._own_weights = own
            else:
                logger.warning(
                    "the backbone is quantised, so %s are not merged and run at their usual speed. Load it without "
                    "`quantization_config` to run them faster.",
                    list(roles),
                )
        try:
            yield
        finally:
            with lock:
                self.merged_weights = {}
                self._activate(self.active)
                self._own_weights = []
