"""What takes the place of a projection, or hooks it, has its effect or is refused by name."""

import copy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune

import htm_pytorch
from htm_pytorch import ChunkedMemory, HTMAttention, HTMBlock, kernels
from htm_pytorch.nn.affine import affine_of
from htm_pytorch.ops import Impl, reference
from tests.helpers import assert_near, normal, on_cpu

PROJECTIONS = ("to_summary_queries", "to_summary_keys", "attn.to_q", "attn.to_kv", "attn.to_out")
MOVED = ("to_summary_keys", "attn.to_kv")
"""Those that are applied on the side of the queries."""
IMPLS = [i for i in on_cpu(Impl) if kernels.IS_AVAILABLE or i not in ("native", "projected")]


@pytest.fixture(autouse=True)
def few_threads(one_thread: None) -> None:
    pass


def build(**changes: Any) -> Any:
    sizes: dict[str, Any] = {"dim": 6, "heads": 2, "topk_mems": 2, "mem_chunk_size": 4}
    sizes |= {"dim_head": 3, "inner_bias": True}
    return HTMAttention(**(sizes | changes)).double()


def replace(layer: Any, name: str, module: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(layer.get_submodule(parent), child, module)


class Adapter(nn.Module):
    """A Linear with a low-rank way beside it, and what may stand in that way."""

    def __init__(self, base: nn.Module, between: nn.Module | None = None, bias: bool = False):
        super().__init__()
        assert isinstance(base, nn.Linear)
        self.base_layer = base
        self.down = nn.Linear(base.in_features, 4, bias=False).double()
        self.up = nn.Linear(4, base.out_features, bias=bias).double()
        self.between = nn.Identity() if between is None else between

    @property
    def weight(self) -> Tensor:
        return self.base_layer.weight

    @property
    def bias(self) -> Tensor | None:
        return self.base_layer.bias

    def forward(self, x: Tensor) -> Tensor:
        return self.base_layer(x) + self.up(self.between(self.down(x)))

    def merged(self) -> nn.Linear:
        linear: Any = copy.deepcopy(self.base_layer)
        with torch.no_grad():
            linear.weight += self.up.weight @ self.down.weight
            if self.up.bias is not None:
                linear.bias += self.up.bias
        return linear


def _doubled(module: nn.Module, given: Any, out: Any) -> Any:
    return 2.0 * out


class Twice(nn.Linear):
    """A kind of Linear that computes something else."""

    def forward(self, input: Tensor) -> Tensor:
        return 2.0 * super().forward(input)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("name", PROJECTIONS)
def test_an_adapter_does_what_it_does_when_merged(name: str, impl: Any) -> None:
    layer = build(impl=impl)
    queries, memories, cotangent = normal(2, 5, 6), normal(2, 18, 6), normal(2, 5, 6)
    before = layer(queries, memories)
    merged = copy.deepcopy(layer)
    adapter = Adapter(layer.get_submodule(name), bias=True)
    replace(layer, name, adapter)
    replace(merged, name, adapter.merged())
    out = layer(queries, memories)
    # Of sums of 6 products in float64, of order one.
    assert_near(out, merged(queries, memories), 1e-13)
    assert (out - before).abs().max() > 1e-3
    out.backward(cotangent)
    merged(queries, memories).backward(cotangent)
    expected = merged.get_submodule(name).weight.grad
    assert isinstance(expected, Tensor)
    assert adapter.base_layer.weight.grad is not None
    assert_near(adapter.base_layer.weight.grad, expected, 1e-12)
    assert adapter.up.weight.grad is not None
    assert_near(adapter.up.weight.grad, expected @ adapter.down.weight.mT, 1e-12)


@pytest.mark.parametrize("name", PROJECTIONS)
def test_a_subclass_that_computes_something_else(name: str) -> None:
    layer = build()
    queries, memories = normal(2, 5, 6), normal(2, 18, 6)
    base = layer.get_submodule(name)
    assert isinstance(base, nn.Linear)
    twice = Twice(base.in_features, base.out_features).double()
    twice.load_state_dict(base.state_dict())
    expected = copy.deepcopy(layer)
    for parameter in expected.get_submodule(name).parameters():
        parameter.data *= 2.0
    replace(layer, name, twice)
    assert_near(layer(queries, memories), expected(queries, memories), 1e-13)


@pytest.mark.parametrize("between", [nn.Tanh(), nn.ReLU(), nn.Dropout(0.5)], ids=repr)
@pytest.mark.parametrize("name", MOVED)
def test_what_is_no_affine_map_is_refused(name: str, between: nn.Module) -> None:
    layer = build()
    replace(layer, name, Adapter(layer.get_submodule(name), between))
    with pytest.raises(ValueError, match=f"^{name}: expected a module that is linear .* Adapter"):
        layer(normal(2, 5, 6), normal(2, 18, 6))


FIRST = (nn.ReLU(), nn.GELU(), nn.Tanh(), nn.Softmax(-1), nn.LayerNorm(6), nn.Hardtanh(-9.0, 9.0))


@pytest.mark.parametrize("first", FIRST, ids=repr)
@pytest.mark.parametrize("name", MOVED)
def test_what_no_unit_vector_shows_is_refused(name: str, first: nn.Module) -> None:
    """Of zero and unit vectors all of these make what an affine map would make."""
    layer = build()
    replace(layer, name, nn.Sequential(first, layer.get_submodule(name)).double())
    with pytest.raises(ValueError, match=f"^{name}: expected a module that is linear"):
        layer(normal(2, 5, 6), normal(2, 18, 6))
    hooked = build()
    hooked.get_submodule(name).register_forward_pre_hook(lambda _, given: (first(given[0]),))
    with pytest.raises(ValueError, match=f"^{name}: expected a module that is linear"):
        hooked(normal(2, 5, 6), normal(2, 18, 6))


PRECISIONS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


@pytest.mark.parametrize("dtype", PRECISIONS, ids=str)
@pytest.mark.parametrize("width", [1, 2, 64, 1024])
def test_an_affine_map_is_one_in_any_precision(width: int, dtype: torch.dtype) -> None:
    inner = 4 * width
    layers = [nn.Linear(width, inner), nn.Linear(inner, inner), nn.Linear(inner, 24)]
    for deep in (layers[:1], layers):
        module = nn.Sequential(*deep).to(dtype)
        features = deep[-1].out_features
        found = affine_of("name", module, (width, features), torch.zeros(1, dtype=dtype))
        assert found.weight.shape == (features, width)


@pytest.mark.parametrize("dtype", PRECISIONS, ids=str)
@pytest.mark.parametrize("width", [8, 64, 1024])
@pytest.mark.parametrize("between", [nn.ReLU(), nn.Tanh(), nn.Dropout(0.5)], ids=repr)
def test_another_map_is_none_in_any_precision(
    width: int, dtype: torch.dtype, between: nn.Module
) -> None:
    module = nn.Sequential(nn.Linear(width, width), between, nn.Linear(width, 64)).to(dtype)
    with pytest.raises(ValueError, match="^name: expected a module that is linear"):
        affine_of("name", module, (width, 64), torch.zeros(1, dtype=dtype))


@pytest.mark.parametrize("name", MOVED)
def test_dropout_that_is_off_is_an_affine_map(name: str) -> None:
    layer = build()
    adapter = Adapter(layer.get_submodule(name), nn.Dropout(0.5))
    replace(layer, name, adapter)
    merged = copy.deepcopy(layer)
    replace(merged, name, adapter.merged())
    queries, memories = normal(2, 5, 6), normal(2, 18, 6)
    assert_near(layer.eval()(queries, memories), merged(queries, memories), 1e-13)


@pytest.mark.parametrize("name", MOVED)
def test_what_projects_to_another_width_is_refused(name: str) -> None:
    layer = build()
    replace(layer, name, nn.Sequential(nn.Linear(6, 5)).double())
    with pytest.raises(ValueError, match=rf"^{name}: expected a module that takes \[B, D = 6\] to"):
        layer(normal(2, 5, 6), normal(2, 18, 6))


@pytest.mark.parametrize("name", (*PROJECTIONS[:4], "to_recency"))
def test_a_linear_of_another_width_is_refused_by_name(name: str) -> None:
    layer = build(recency=True)
    old = layer.get_submodule(name)
    replace(layer, name, nn.Linear(old.in_features, old.out_features + 2).double())
    memory = normal(1, 8, 6)
    told = rf"^{name}: expected .*{old.out_features}.*, got .*{old.out_features + 2}"
    for call in (layer, layer.recall):
        with pytest.raises(ValueError, match=told):
            call(normal(1, 3, 6), memory)


@pytest.mark.filterwarnings("ignore:Full backward hook is firing:UserWarning")
@pytest.mark.parametrize("name", PROJECTIONS)
def test_hooks_are_called_and_have_their_effect(name: str) -> None:
    layer = build()
    queries, memories = normal(2, 5, 6), normal(2, 18, 6)
    plain = layer(queries, memories)
    calls: list[str] = []
    module = layer.get_submodule(name)
    handle = module.register_forward_hook(lambda *_: calls.append("forward"))
    module.register_full_backward_hook(lambda *_: calls.append("backward"))
    out = layer(queries, memories)
    assert_near(out, plain, 1e-13)
    out.sum().backward()
    assert calls == ["forward", "backward"]
    handle.remove()
    module.register_forward_hook(_doubled)
    expected = build()
    expected.load_state_dict(layer.state_dict())
    for parameter in expected.get_submodule(name).parameters():
        parameter.data *= 2.0
    assert_near(layer(queries, memories), expected(queries, memories), 1e-13)


@pytest.mark.parametrize("how", ["prune", "weight_norm", "spectral_norm"])
@pytest.mark.parametrize("name", PROJECTIONS)
@pytest.mark.filterwarnings("ignore:`torch.nn.utils.*` is deprecated:FutureWarning")
def test_hooks_that_make_the_weight_anew(name: str, how: str) -> None:
    layer = build()
    queries, memories = normal(2, 5, 6), normal(2, 18, 6)
    module = layer.get_submodule(name)
    if how == "prune":
        prune.l1_unstructured(module, "weight", amount=0.5)
    else:
        getattr(nn.utils, how)(module)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        out = layer(queries, memories)
        # What a Linear of the weight that this call has used would give.
        frozen = build()
        for other in PROJECTIONS:
            here, there = layer.get_submodule(other), frozen.get_submodule(other)
            there.weight.data.copy_(here.weight.detach())
            there.bias.data.copy_(here.bias.detach())
        assert_near(out, frozen(queries, memories), 1e-12)
        out.square().sum().backward()
        original = dict(module.named_parameters())
        key = {"prune": "weight_orig", "weight_norm": "weight_v", "spectral_norm": "weight_orig"}
        gradient = original[key[how]].grad
        assert gradient is not None
        assert gradient.any()
        optimizer.step()


@pytest.mark.parametrize("name", PROJECTIONS)
def test_parametrizations(name: str) -> None:
    class Doubled(nn.Module):
        def forward(self, weight: Tensor) -> Tensor:
            return 2.0 * weight

    layer, expected = build(), build()
    expected.load_state_dict(layer.state_dict())
    expected.get_submodule(name).weight.data *= 2.0
    parametrize.register_parametrization(layer.get_submodule(name), "weight", Doubled())
    queries, memories = normal(2, 5, 6), normal(2, 18, 6)
    for _ in range(2):
        layer.zero_grad()
        out = layer(queries, memories)
        assert torch.equal(out, expected(queries, memories))
        out.sum().backward()
    parametrizations.weight_norm(expected.get_submodule(name))
    assert_near(expected(queries, memories), layer(queries, memories), 1e-13)


@pytest.mark.filterwarnings("ignore:torch.ao.quantization is deprecated:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor:UserWarning")
@pytest.mark.skipif(
    torch.backends.quantized.engine == "none", reason="this build of torch cannot quantise"
)
def test_dynamic_quantisation() -> None:
    # One chunk, so that no rounding chooses another.
    layer = build().float().eval()
    queries, memories = torch.randn(2, 5, 6), torch.randn(2, 4, 6)
    small = torch.ao.quantization.quantize_dynamic(layer, {nn.Linear}, dtype=torch.qint8)
    assert not isinstance(small.to_summary_keys, nn.Linear)
    plain = layer(queries, memories)
    # Weights, queries and outputs, each rounded to 8 bits of its largest entry.
    assert_near(small(queries, memories), plain, 8 * 2.0**-8)


@pytest.mark.compile
@pytest.mark.parametrize("name", PROJECTIONS)
def test_replaced_and_hooked_under_the_compiler(name: str) -> None:
    queries, memories = normal(2, 5, 6), normal(2, 18, 6)
    for replaced in (False, True):
        torch.compiler.reset()
        layer = build()
        if replaced:
            replace(layer, name, Adapter(layer.get_submodule(name)))
        else:
            layer.get_submodule(name).register_forward_hook(_doubled)
        compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
        assert_near(compiled(queries, memories), layer(queries, memories), 1e-13)


@pytest.mark.compile
def test_a_plain_linear_is_plain_to_the_compiler() -> None:
    torch.compiler.reset()
    called: list[str] = []

    def backend(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        called.extend(str(node.target) for node in graph.graph.nodes)
        return graph.forward

    layer = build()
    torch.compile(layer, fullgraph=True, backend=backend)(normal(2, 5, 6), normal(2, 18, 6))
    assert any("linear" in name for name in called)
    assert not any("eye" in name for name in called)


def test_a_forward_of_the_module_s_own() -> None:
    layer = build()
    queries, memories = normal(2, 5, 6), normal(2, 18, 6)
    before = layer(queries, memories)
    linear = layer.attn.to_kv
    linear.forward = lambda x: 2.0 * nn.functional.linear(x, linear.weight, linear.bias)
    assert (layer(queries, memories) - before).abs().max() > 1e-3


SHARDED_BY_LAYERS = """
import copy, os, sys, warnings
import torch
from torch import distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from htm_pytorch import HTMBlock
from htm_pytorch.nn.affine import affine_of

warnings.simplefilter("ignore")
torch.set_num_threads(1)
torch.manual_seed(0)
plain = HTMBlock(6, 2, 2, 4, 3, inner_bias=True).double()
queries, memories = torch.randn(2, 5, 6).double(), torch.randn(2, 18, 6).double()
expected = plain(queries, memories)
expected.square().sum().backward()
distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
mesh = init_device_mesh("cpu", (1,))
for how in ("whole", "linears", "linears-and-attention"):
    model = copy.deepcopy(plain)
    model.zero_grad()
    if how != "whole":
        for module in list(model.modules()):
            if isinstance(module, nn.Linear):
                fully_shard(module, mesh=mesh)
    if how == "linears-and-attention":
        fully_shard(model.attn, mesh=mesh)
    fully_shard(model, mesh=mesh)
    for _ in range(2):
        model.zero_grad()
        out = model(queries, memories)
        torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-12)
        out.square().sum().backward()
    for (name, got), wanted in zip(model.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(got.grad.full_tensor(), wanted.grad, rtol=1e-12, atol=1e-12)
print("equal", flush=True)
os._exit(0)
"""


def test_sharded_parameters_of_each_linear() -> None:
    if not torch.distributed.is_available() or not torch.distributed.is_gloo_available():
        pytest.skip("this build of torch has no gloo")
    root = str(Path(htm_pytorch.__file__).parents[1])
    done = subprocess.run(
        [sys.executable, "-c", SHARDED_BY_LAYERS],
        cwd=root,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.stdout == "equal\n", done.stderr


@pytest.mark.parametrize("value", [float("inf"), float("nan"), 1e300])
@pytest.mark.parametrize("impl", IMPLS)
def test_a_bias_without_effect_has_none(impl: Any, value: float) -> None:
    layer = build(impl=impl)
    queries, memories, cotangent = normal(2, 5, 6), normal(2, 18, 6), normal(2, 5, 6)
    expected = layer(queries, memories)
    expected.backward(cotangent)
    gradients: Any = {name: parameter.grad for name, parameter in layer.named_parameters()}
    other = copy.deepcopy(layer)
    other.zero_grad()
    with torch.no_grad():
        other.to_summary_keys.bias.fill_(value)
        other.attn.to_kv.bias[:6] = value
    out = other(queries, memories)
    assert torch.equal(out, expected)
    out.backward(cotangent)
    for name, parameter in other.named_parameters():
        assert parameter.grad is not None, name
        assert torch.equal(parameter.grad, gradients[name]), name


@pytest.mark.parametrize("impl", IMPLS)
def test_queries_that_see_nothing_get_zeros_whatever_the_biases(impl: Any) -> None:
    layer = build(impl=impl)
    with torch.no_grad():
        layer.attn.to_out.bias.fill_(float("inf"))
    chunk_mask = torch.zeros(2, 5, 5, dtype=torch.bool)
    chunk_mask[0, 1] = True
    out = layer(normal(2, 5, 6), normal(2, 18, 6), None, chunk_mask)
    assert out[0, 1].isinf().all()
    out[0, 1] = 0.0
    assert not out.any()


@pytest.mark.parametrize("impl", IMPLS)
def test_a_memory_made_in_inference_mode_can_be_learned_from(impl: Any) -> None:
    layer = build(impl=impl)
    queries, steps, mask = normal(2, 5, 6), normal(2, 18, 6), torch.rand(2, 18) < 0.8

    def memories() -> tuple[Any, ...]:
        return (
            steps.clone(),
            ChunkedMemory.from_steps(steps, 4, mask),
            ChunkedMemory.empty(2, 8, 4, 6, dtype=torch.float64).append(steps),
        )

    with torch.inference_mode():
        made = memories()
    for memory, plain in zip(made, memories(), strict=True):
        gradients = []
        for given in (memory, plain):
            layer.zero_grad()
            layer(queries, given).square().sum().backward()
            gradients.append([parameter.grad for parameter in layer.parameters()])
        for got, wanted in zip(*gradients, strict=True):
            assert got is not None
            assert torch.equal(got, wanted)


def test_a_block_hands_adapters_on() -> None:
    block = HTMBlock(6, 2, 2, 4, 3).double()
    queries, memories = normal(2, 5, 6), normal(2, 18, 6)
    before = block(queries, memories)
    replace(block, "attn.attn.to_kv", Adapter(block.attn.attn.to_kv))
    assert (block(queries, memories) - before).abs().max() > 1e-3


def test_the_plain_layer_in_the_paper_s_order_agrees() -> None:
    layer = build(add_pos_enc=False)
    adapter = Adapter(layer.attn.to_kv)
    queries, memories = normal(2, 5, 6), normal(2, 16, 6)
    weights = dict(layer.named_parameters()) | {"attn.to_kv.weight": adapter.merged().weight}
    replace(layer, "attn.to_kv", adapter)
    memory = ChunkedMemory.from_steps(memories, 4)
    expected = reference.htm_attention(queries, memory, weights, heads=2, k=2)
    assert_near(layer(queries, memories), expected, 1e-12)
