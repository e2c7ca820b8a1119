# SPDX-License-Identifier: Apache-2.0
"""A transformer block of your own, compressed to 2 bits per weight by `vqjax.compress_tree`.

Trains one block for a few seconds to tell handwritten digits apart, gathers the second moments of
its layers' inputs, compresses its four kernels with `vqjax.compress_tree`, and shows what that did
to the block's output beside rounding the same kernels to the nearest of four values.

Dimension key:  B images   T tokens   D width   H heads   N fan-in
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import sklearn.datasets

import vqjax
from vqjax.core import tree
from vqjax.core.scalar import scalar_baseline

WIDTH, HEADS, TOKENS, CLASSES, BITS = 64, 4, 16, 10, 2


def init(key):
    """A nested dict of arrays; kernels are [inputs, outputs]."""
    keys = iter(jax.random.split(key, 8))

    def dense(inputs, outputs):
        kernel = jax.random.normal(next(keys), (inputs, outputs)) / np.sqrt(inputs)
        return {"kernel": kernel, "bias": jnp.zeros(outputs)}

    return {
        "embed": {"table": dense(4, WIDTH), "place": jax.random.normal(next(keys), (16, WIDTH))},
        "block": {
            "qkv": dense(WIDTH, 3 * WIDTH),
            "out": dense(WIDTH, WIDTH),
            "up": dense(WIDTH, 4 * WIDTH),
            "down": dense(4 * WIDTH, WIDTH),
        },
        "head": dense(WIDTH, CLASSES),
    }


def block(params, x_BTD):
    """One pre-norm block; also returns what each layer reads, by its path in the tree."""
    seen = {}

    def dense(name, x):
        seen[f"block/{name}/kernel"] = x
        return x @ params[name]["kernel"] + params[name]["bias"]

    def norm(x):
        return (x - x.mean(-1, keepdims=True)) / jnp.sqrt(x.var(-1, keepdims=True) + 1e-5)

    qkv = dense("qkv", norm(x_BTD)).reshape(*x_BTD.shape[:2], 3, HEADS, WIDTH // HEADS)
    q, k, v = jnp.moveaxis(qkv, 2, 0)
    weights = jax.nn.softmax(jnp.einsum("bthd,bshd->bhts", q, k) / np.sqrt(WIDTH // HEADS))
    mixed_BTD = jnp.einsum("bhts,bshd->bthd", weights, v).reshape(x_BTD.shape)
    x_BTD = x_BTD + dense("out", mixed_BTD)
    x_BTD = x_BTD + dense("down", jax.nn.gelu(dense("up", norm(x_BTD))))
    return x_BTD, seen


def embed(params, images):
    """[B, 8, 8] images as 16 tokens of 2x2 pixels."""
    tokens = images.reshape(-1, 4, 2, 4, 2).swapaxes(2, 3).reshape(-1, TOKENS, 4)
    table = params["embed"]["table"]
    return tokens @ table["kernel"] + table["bias"] + params["embed"]["place"]


def logits(params, images):
    """[B, 10]."""
    x_BTD, _ = block(params["block"], embed(params, images))
    return x_BTD.mean(1) @ params["head"]["kernel"] + params["head"]["bias"]


def train(images, labels, steps):
    """A few seconds of Adam."""
    optimizer = optax.adam(2e-3)
    params = init(jax.random.key(0))
    state, rng = optimizer.init(params), np.random.default_rng(0)

    @jax.jit
    def step(params, state, images, labels):
        def loss(params):
            found = logits(params, images)
            return optax.softmax_cross_entropy_with_integer_labels(found, labels).mean()

        updates, state = optimizer.update(jax.grad(loss)(params), state)
        return optax.apply_updates(params, updates), state

    for _ in range(steps):
        chosen = rng.integers(0, len(images), 64)
        params, state = step(params, state, images[chosen], labels[chosen])
    return params


def moments(params, images):
    """S [N, N], the mean of x x^T over all tokens, for every kernel of the block."""
    _, seen = block(params["block"], embed(params, images))
    rows = {path: np.asarray(x).reshape(-1, x.shape[-1]) for path, x in seen.items()}
    return {path: x.T @ x / len(x) for path, x in rows.items()}


def main(steps: int = 400) -> dict[str, dict[str, float]]:
    """Prints and returns error of the block's output and accuracy, both on unseen digits."""
    pixels, labels = sklearn.datasets.load_digits(return_X_y=True)
    images = pixels.reshape(-1, 8, 8).astype(np.float32) / 16
    params = train(images[:1200], labels[:1200], steps)

    plan = vqjax.uniform_plan(params, bits=BITS, select="^block/.*kernel$")
    seen = moments(params, images[:1200])
    small, stats = vqjax.compress_tree(params, seen, plan)
    flat = tree.flatten(params)
    rounded = flat | {path: scalar_baseline(flat[path], None, BITS).kernel for path in plan}

    unseen, exact = images[1200:], logits(params, images[1200:])
    outputs = jax.jit(lambda p, x: block(p["block"], embed(p, x))[0])
    wanted = outputs(params, unseen) - embed(params, unseen)
    results = {}
    for name, model in (
        ("full precision", params),
        ("compress_tree", vqjax.densify(small)),
        ("round to nearest", tree.unflatten(rounded)),
    ):
        error = outputs(model, unseen) - outputs(params, unseen)
        found = exact if name == "full precision" else logits(model, unseen)
        results[name] = {
            "error": float(jnp.sum(error**2) / jnp.sum(wanted**2)),
            "accuracy": float(np.mean(np.argmax(found, -1) == labels[1200:])),
        }
        print(f"{name:17} output error {results[name]['error']:.4f}  "
              f"accuracy {results[name]['accuracy']:.3f}")  # fmt: skip
    for path, one in stats.items():
        print(f"{path:18} {one.bits_per_weight:.3f} bits  output error {one.rel_output_mse:.4f}")
    return results


if __name__ == "__main__":
    main()
