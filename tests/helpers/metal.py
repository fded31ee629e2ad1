"""A Mac's GPU, as far as mlx-lm's models can tell: its kernels are chosen, and have no gradient.

On a Mac it is the real one, with real kernels, whose launches are counted. Elsewhere each kernel is
replaced by plain operations that compute the same, in a function which, like MLX's
``CustomKernel``, has no gradient. Any other kernel is None on a CPU, or fails when it is launched.
"""

from contextlib import contextmanager
from importlib import import_module
from importlib.util import find_spec
from types import SimpleNamespace

import mlx.core as mx
import mlx_lm.generate  # noqa: F401 (it makes a stream on the default device)
from mlx_lm.models import gated_delta, rwkv7

from tlora_mlx.models import fused


def delta_rule(*, inputs, output_dtypes, **_):
    q, k, v, g, beta, state, _tokens, *mask = inputs
    y, state = gated_delta.gated_delta_ops(q, k, v, g, beta, state, *mask)
    if mask:
        y = mx.where(mask[0][..., None, None], y, 0)
    return [y.astype(output_dtypes[0]), state.astype(output_dtypes[1])]


def wkv7(*, inputs, output_dtypes, **_):
    *sequences, state, tokens = inputs
    ys = []
    for t in range(tokens):
        y, state = rwkv7._wkv7_step_ops(*(x[:, t] for x in sequences), state)
        ys.append(y.squeeze(-1))
    return [y.astype(t) for y, t in zip((mx.stack(ys, axis=1), state), output_dtypes, strict=True)]


def sinkhorn(*, inputs, template, **_):
    comb, eps = inputs
    for step in range(2 * dict(template)["ITERS"] - 1):
        comb = comb / (comb.sum(axis=-1 if step % 2 else -2, keepdims=True) + eps)
    return [comb]


def attention_residual(*, inputs, **_):
    from mlx_lm.models import kimi_k3

    raw, inv_rms, partial_sum, weight, eps, _tokens = inputs
    return [kimi_k3._attn_res_combine(raw, inv_rms, partial_sum, weight, eps)]


def queries_and_keys(*, inputs, template, **_):
    qkvg, scale, eps, *rope = inputs
    heads, sizes = dict(template), {"n_heads": "HQ", "n_kv_heads": "HK", "head_dim": "D"}
    options = {name: heads[size] for name, size in sizes.items()}
    options |= {"query_scale": scale.item(), "eps": eps.item()}
    if not rope:
        return fused.qk_norm(qkvg, **options)
    offset, _tokens, base = rope
    return fused.qk_norm_rope(qkvg, **options, rope_base=2 ** base.item(), offset=offset.item())


def routing(*, inputs, template, **_):
    logits, bias, *scalars = inputs
    names = "multiplier", "score_eps", "route_scale"
    options = {name: x.item() for name, x in zip(names, scalars, strict=True)}
    return fused.expert_routing(logits, bias, top_k=dict(template)["K"], **options)


def combine(*, inputs, **_):
    experts, weights, weight, eps = inputs
    return [fused.post_expert_norm_combine(experts, weights, norm_weight=weight, eps=eps.item())]


def norm_add(*, inputs, template, **_):
    branch, stream, alpha, beta, post_weight, post_eps, *norm = inputs
    found = fused.norm_add_norm(
        branch,
        stream,
        alpha=alpha,
        beta=beta,
        post_weight=post_weight if dict(template)["POST_SCALE"] else None,
        post_eps=post_eps.item(),
        next_norm=SimpleNamespace(weight=norm[0], eps=norm[1].item()) if norm else None,
    )
    return found if norm else found[:1]


def pre_norm(*, inputs, template, **_):
    stream, weight, eps = inputs
    norm = SimpleNamespace(weight=weight, eps=eps.item())
    return [fused.pre_norm(stream, norm, dtype=dict(template)["T"])]


def norm_gate(*, inputs, **_):
    x, gate, eps = inputs
    return [fused.rms_norm_sigmoid_gate(x, gate, eps=eps.item())]


KERNELS = {
    "mlx_lm.models.gated_delta": {
        "_gated_delta_kernel": delta_rule,
        "_gated_delta_kernel_masked": delta_rule,
        "_gated_delta_kernel_vec": delta_rule,
        "_gated_delta_kernel_vec_masked": delta_rule,
        "_gated_delta_kernel_packed": delta_rule,
    },
    "mlx_lm.models.rwkv7": {"_wkv7_kernel": wkv7},
    "mlx_lm.models.kimi_k3": {"_attn_res_kernel": attention_residual},
    "mlx_lm.models.deepseek_v41": {"_sinkhorn_kernel": sinkhorn},
    "mlx_lm.kernels.qk_norm": {"_qk_norm_kernel": queries_and_keys},
    "mlx_lm.kernels.qk_norm_rope": {"_qk_norm_rope_kernel": queries_and_keys},
    "mlx_lm.kernels.expert_routing": {"_routing_kernel": routing},
    "mlx_lm.kernels.post_expert_norm_combine": {"_expert_combine_kernel": combine},
    "mlx_lm.kernels.rms_norm_sigmoid_gate": {"_norm_gate_kernel": norm_gate},
    "mlx_lm.kernels.norm_add_norm": {
        "_norm_add_norm_kernel": norm_add,
        "_norm_add_kernel": norm_add,
        "_pre_norm_kernel": pre_norm,
    },
}


def on_a_mac():
    return mx.metal.is_available() and mx.default_device() == mx.gpu


@contextmanager
def on_the_cpu():
    device = mx.default_device()
    mx.set_default_device(mx.cpu)
    try:
        yield
    finally:
        mx.set_default_device(device)


class Real:
    """A kernel, and its launches."""

    def __init__(self, kernel):
        self.kernel, self.launches = kernel, 0

    def __call__(self, **launch):
        self.launches += 1
        return self.kernel(**launch)


class StandIn:
    """Computes what ``function`` computes, without a gradient; counts its launches."""

    def __init__(self, function):
        self.function, self.launches = function, 0

    def __call__(self, *, inputs, output_shapes, output_dtypes, **launch):
        self.launches += 1
        arrays = [x for x in inputs if isinstance(x, mx.array)]

        @mx.custom_function
        def run(*arrays):
            found = iter(arrays)
            given = [next(found) if isinstance(x, mx.array) else x for x in inputs]
            outputs = self.function(inputs=given, output_dtypes=output_dtypes, **launch)
            assert [y.shape for y in outputs] == [tuple(shape) for shape in output_shapes]
            assert [y.dtype for y in outputs] == list(output_dtypes)
            return tuple(outputs)

        @run.vjp
        def _(*_):
            raise RuntimeError("[Primitive::vjp] Not implemented for CustomKernel.")

        return list(run(*arrays))


class Metal:
    """A Mac, or what stands in for one until ``monkeypatch`` undoes it."""

    def __init__(self, monkeypatch):
        self.kernels = []
        for path, kernels in KERNELS.items():
            if find_spec(path):  # an older mlx-lm has not all of them
                module = import_module(path)
                for name, function in kernels.items():
                    kernel = Real(vars(module).get(name)) if on_a_mac() else StandIn(function)
                    self.kernels.append(kernel)
                    monkeypatch.setattr(module, name, kernel, raising=False)
        if not on_a_mac():
            monkeypatch.setattr(mx.metal, "is_available", lambda: True)
            monkeypatch.setattr(mx, "default_device", lambda: mx.gpu)

    def launches(self):
        return sum(kernel.launches for kernel in self.kernels)
