"""Wrong types for the arguments of public functions: one clear line each."""

import inspect
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jaxtyping import PyTree

import jaxquant as jq
from jaxquant.core.arguments import check_arguments
from tests.support.arrays import draw
from tests.support.public import NAMES

W, X = draw(64, 32), draw(5, 64, seed=1)
PARAMS, METHOD = {"w": W}, jq.rtn(4)
FN = lambda p, x: x @ p["w"]
LOSS = lambda y, _: jnp.sum(y)

WRONG = {
    "array for stats": (lambda: jq.quantize(PARAMS, METHOD, W), r"stats: expected the result of"),
    "dict of grams": (lambda: jq.quantize(PARAMS, METHOD, {"w": W}), "a mapping of Site or None"),
    "recipe of None": (lambda: jq.Recipe(None), "a recipe must be a sequence of rules .*got None"),
    "recipe of a dict": (lambda: jq.Recipe({"*": METHOD}), "a recipe must be a sequence of rules"),
    "rule of None": (lambda: jq.Recipe([None]), "a rule must be .path glob, method or KEEP"),
    "a number as key": (
        lambda: jq.quantize(PARAMS, jq.quarot(4, 32), key=0),
        r"key: expected a key .such as jax.random.key.0., no number. or None, got 0 .int.",
    ),
    "a number as key of one": (lambda: jq.quantize_array(W, METHOD, key=0), "expected a key"),
    "floats as key": (lambda: jq.quantize_array(W, METHOD, key=jnp.ones(3)), "expected a key"),
    "list for a matrix": (lambda: jq.quantize_array([[1.0]], METHOD), "w: expected an array, got"),
    "list for a Gram": (lambda: jq.quantize_array(W, jq.gptq(4), [[1.0]]), "gram: expected an ar"),
    "list for inputs": (
        lambda: jq.quantize_array(W, METHOD, inputs=[[1.0]]),
        "inputs: expected",
    ),
    "gradient": (
        lambda: jax.grad(lambda p: jnp.sum(jq.quantize(p, METHOD)["w"].dequantize()))(PARAMS),
        "quantizing has no gradient",
    ),
    "gradient, jitted": (
        lambda: jax.jit(jax.grad(lambda w: jnp.sum(jq.quantize_array(w, METHOD).stored())))(W),
        "quantizing has no gradient",
    ),
    "negative sample": (
        lambda: jq.calibrate(FN, PARAMS, [X], sample=-1),
        "sample must be a number of",
    ),
    "fraction of a sample": (
        lambda: jq.calibrate(FN, PARAMS, [X], sample=1.5),
        "sample: expected an integer, got 1.5",
    ),
    "glob of nothing": (
        lambda: jq.calibrate(FN, PARAMS, [X], loss=LOSS, output=["zzz"]),
        "output: 'zzz' matches no weight that the function multiplies by; these are w",
    ),
    "a text for globs": (
        lambda: jq.calibrate(FN, PARAMS, [X], loss=LOSS, output="w"),
        "output: expected a sequence of str, got 'w'",
    ),
    "no batches": (lambda: jq.calibrate(FN, PARAMS, 3), "batches: expected an iterable, got 3"),
    "no function": (lambda: jq.calibrate(None, PARAMS, [X]), "fn: expected a function, got None"),
    "no loss": (lambda: jq.calibrate(FN, PARAMS, [X], loss=3), "loss: expected a function or None"),
    "loss of a vector": (
        lambda: jq.calibrate(FN, PARAMS, [X], loss=lambda y, _: y),
        r"loss must return a floating scalar, got an array float32\[5, 32\]",
    ),
    "integers": (
        lambda: jq.quantize({"w": jnp.ones((4, 4), int)}, METHOD),
        r"nothing to quantize: .* but the tree holds w: int32\[4, 4\]",
    ),
    "lists": (lambda: jq.quantize({"w": [[1.0]]}, METHOD), "nothing to quantize.*w/0/0: 1.0"),
    "nothing": (lambda: jq.quantize(None, METHOD), "nothing to quantize.*holds no leaves"),
    "quantized before": (
        lambda: jq.quantize(jq.quantize(PARAMS, METHOD), METHOD),
        "nothing to quantize: .*w: QTensor.*already quantized: pass jaxquant.dequantize",
    ),
    "no sites": (
        lambda: jq.recipes.resolve(METHOD, PARAMS, 3),
        "found: expected a mapping of Site",
    ),
    "no platform": (
        lambda: jq.explain(FN, PARAMS, X, platform="gpu"),
        r"must be a platform \(cpu, tpu, cuda, rocm\) or a chip \(v5e, .*h100, .*got 'gpu'",
    ),
    "no kernels": (lambda: jq.quantized(FN, kernels=3), "kernels: expected a string, got 3"),
    "no stats": (
        lambda: jq.ptq.shares(PARAMS, 3),
        "stats: expected the result of calibrate, got 3",
    ),
    "no methods": (
        lambda: jq.ptq.allocate(PARAMS, 3, 4.0, None),
        "methods: expected a sequence of",
    ),
    "no summary": (
        lambda: jq.calibration.observe(FN, PARAMS, X, summary=3),
        "summary: expected a Summary",
    ),
    "no name": (lambda: jq.ptq.unstack({"a": W}, 3), "name: expected a string, got 3"),
    "no values of a run": (
        lambda: jq.distributed.shared_store("work", 3).__enter__(),
        "shared_store: run: expected a mapping, got 3 .int.$",
    ),
    "no progress": (
        lambda: jq.quantize(PARAMS, METHOD, progress=3),
        "progress: expected a function or None, got 3",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_types(case):
    call, match = WRONG[case]
    with pytest.raises(ValueError, match=match) as error:
        call()
    assert "\n" not in str(error.value)


def test_every_public_function_with_its_annotations():
    """An object for each argument: always a ValueError that names it."""
    found = 0
    for name, fn in NAMES.items():
        name = name.rpartition(".")[2]
        if not inspect.isfunction(fn) or "check_arguments(" not in inspect.getsource(fn):
            continue
        for parameter in inspect.signature(fn).parameters.values():
            if parameter.annotation in (Any, PyTree) or "VAR" in parameter.kind.name:
                continue
            with pytest.raises(ValueError, match=f"{name}: {parameter.name}: expected"):
                check_arguments(fn, {parameter.name: object()})
            found += 1
    assert found > 140


def test_what_serves_is_taken():
    """Duck types: NumPy scalars and arrays, tuples, generators, raw keys."""
    stats = jq.calibrate(FN, PARAMS, (x for x in [X]), sample=jnp.int32(2))
    q = jq.quantize(PARAMS, jq.gptq(4), stats, key=jax.random.PRNGKey(0))
    assert isinstance(q["w"], jq.QTensor)
