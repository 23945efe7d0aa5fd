"""`adapt`, `merge`, several adapters on one base, and their training: the path of a user."""

import dataclasses

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxquant as jq
from jaxquant.training import Finetuning, finetune, selected, together

LoRA, QALoRA, L4Q, LoTA, PEQA = (
    getattr(jq.adapters, name) for name in ("LoRA", "QALoRA", "L4Q", "LoTA", "PEQA")
)
OFFSET = jq.Method(
    "offset", jq.rounding.Nearest(),
    jq.formats.Offset(jq.formats.Integer(3, 16, symmetric=True)),
)  # fmt: skip


def params():
    keys = jax.random.split(jax.random.key(0), 2)
    a, b = (0.2 * jax.random.normal(k, (32, 32)) for k in keys)
    return {"a": {"kernel": a}, "b": {"kernel": b}, "norm": jnp.ones(32)}


def fn(p, x):
    return p["norm"] * jnp.tanh(x @ p["a"]["kernel"]) @ p["b"]["kernel"]


def inputs(seed=1, *shape):
    return jax.random.normal(jax.random.key(seed), (*(shape or (6,)), 32))


RECIPE = lambda method: jq.Recipe([("*kernel", method), ("*", jq.KEEP)])


def packed(method=OFFSET):
    return jq.quantize(params(), RECIPE(method))


def trained(tree, seed=2, size=0.1):
    """A tree whose adapters have learned something."""
    train, rest = eqx.partition(tree, jq.trained(tree))
    keys = iter(jax.random.split(jax.random.key(seed), 20))
    moved = jax.tree.map(lambda a: a + size * jax.random.normal(next(keys), a.shape), train)
    return eqx.combine(moved, rest)


# --- adapt ----------------------------------------------------------------------------------------


def test_only_adapters_are_trained_by_default():
    tree = jq.adapt(packed(), LoRA(2))
    named = lambda t: {name for w in (t["a"]["kernel"], t["b"]["kernel"]) for name in w.data}
    kinds = jq.labels(tree)
    assert kinds["norm"] == "frozen" and kinds["a"]["kernel"].data["codes"] == "frozen"
    assert kinds["a"]["kernel"].data["lora_b"] == "lora_b" and "lora_a" in named(tree)
    assert jq.labels(tree, also=("norm",))["norm"] == "other"
    assert jq.labels(jq.latent(params(), RECIPE(jq.lsq(4, 16))))["norm"] == "other"


def test_targets_choose_the_weights():
    tree = jq.adapt(packed(), LoRA(2), targets=["a/*"])
    assert "lora_a" in tree["a"]["kernel"].data and "lora_a" not in tree["b"]["kernel"].data
    both = jq.adapt(tree, QALoRA(2), targets=["b/*"])
    assert both["b"]["kernel"].format.adapter == QALoRA(2)


def test_floating_point_weights_get_adapters_too():
    sites = jq.sites(fn, params(), inputs())
    tree = jq.adapt(params(), LoRA(2), stats=sites)
    x = inputs()
    np.testing.assert_allclose(jq.quantized(fn)(tree, x), fn(params(), x), rtol=1e-5, atol=1e-6)
    after = trained(tree)
    merged = jq.merge(after)
    assert isinstance(merged["a"]["kernel"], jax.Array)
    np.testing.assert_allclose(fn(merged, x), jq.quantized(fn)(after, x), rtol=1e-4, atol=1e-5)


def test_bfloat16_weights_stay_bfloat16():
    half = jax.tree.map(lambda a: a.astype(jnp.bfloat16), params())
    tree = jq.adapt(half, LoRA(2, dtype="bfloat16"), targets=["*kernel"], stats=jq.sites(
        fn, half, inputs().astype(jnp.bfloat16)))  # fmt: skip
    assert {a.dtype.name for a in tree["a"]["kernel"].data.values()} == {"bfloat16"}
    assert jq.merge(trained(tree))["a"]["kernel"].dtype == jnp.bfloat16


def test_mixed_trees_adapt_floats_that_are_named():
    recipe = jq.Recipe([("a/*", OFFSET), ("*", jq.KEEP)])
    tree = jq.adapt(jq.quantize(params(), recipe), LoRA(2), targets=["*kernel"],
                    stats=jq.sites(fn, params(), inputs()))  # fmt: skip
    assert tree["b"]["kernel"].format.format == jq.formats.Dense()
    assert tree["a"]["kernel"].format.format == OFFSET.format


def test_the_same_key_gives_the_same_start_and_paths_differ():
    one, two = (jq.adapt(packed(), LoRA(2), key=jax.random.key(3)) for _ in range(2))
    other = jq.adapt(packed(), LoRA(2), key=jax.random.key(4))
    a = lambda t, name: t[name]["kernel"].data["lora_a"]
    np.testing.assert_array_equal(a(one, "a"), a(two, "a"))
    assert (a(one, "a") != a(other, "a")).all() and (a(one, "a") != a(one, "b")).all()
    assert float(jnp.abs(a(one, "a")).max()) <= 32**-0.5


def test_a_format_that_gains_offsets_says_so():
    with pytest.warns(UserWarning, match=r"a/kernel \(and 1 more\) gains offsets.* 5\.0+ bits"):
        tree = jq.adapt(packed(jq.rtn(3, 16, symmetric=True)), QALoRA(2))
    assert tree["a"]["kernel"].format.format == OFFSET.format
    with pytest.warns(UserWarning, match="gains offsets"):
        tree = jq.adapt(packed(jq.rtn(3, 16)), QALoRA(2))
    x = inputs()
    want = jq.quantized(fn)(packed(jq.rtn(3, 16)), x)
    np.testing.assert_allclose(jq.quantized(fn)(tree, x), want, atol=2e-3)


def two_adapters():
    return together([jq.adapt(packed(), LoRA(2), key=jax.random.key(i)) for i in (0, 1)])


BAD = [
    (lambda: jq.adapt(packed(), LoRA(2), targets=["c/*"]), r"'c/\*' matches no leaf.*a/kernel"),
    (
        lambda: jq.adapt(packed(), LoRA(2), targets=["norm"]),
        "no weights of a matmul, such as 'norm'",
    ),
    (lambda: jq.adapt(packed(), LoRA(33)), r"a/kernel: rank 33 exceeds .* \[32, 32\]"),
    (lambda: jq.adapt(packed(), QALoRA(3)), "a/kernel: rank 3 exceeds the 2 groups of the 32"),
    (lambda: jq.adapt(jq.adapt(packed(), LoRA(2)), LoRA(2)), "adapter already, LoRA.*merge it"),
    (lambda: jq.adapt(packed(jq.nf4(16, double_quant=True)), QALoRA(2)), "QALoRA needs a format"),
    (lambda: jq.adapt(packed(jq.quip_sharp(2)), QALoRA(2)), "needs"),
    (lambda: jq.adapt(packed(jq.nf4(16)), L4Q(2)), "L4Q learns the steps of integers"),
    (lambda: jq.adapt(packed(jq.nf4(16, double_quant=True)), PEQA()), "can train nothing, but"),
    (lambda: jq.adapt(packed(jq.nf4(16)), LoTA(2)), "LoTA changes the codes of integers"),
    (lambda: PEQA("offset"), "without the scales that measure their steps"),
    (lambda: LoTA(2, threshold=1.0), "threshold must be between 0 and 1"),
    (lambda: LoRA(0), "rank must be at least 1, got 0"),
    (lambda: LoRA(2, alpha=-1.0), "alpha must be positive"),
    (lambda: LoRA(2, dropout=1.0), r"dropout must be in \[0, 1\)"),
    (lambda: jq.merge(packed()), "nothing to merge"),
    (lambda: jq.merge(jq.adapt(packed(), QALoRA(2)), rounder=jq.rounding.LDLQ()), "merge exactly"),
    (lambda: jq.merge(jq.adapt(packed(), QALoRA(2)), bits=4), "codes of 3 bits, so bits=4 cannot"),
    (lambda: jq.merge(jq.adapt(params(), LoRA(2), targets=["a/*"]), bits=4), "keeps floats, so"),
    (lambda: jq.merge(jq.adapt(packed(), LoRA(2)), rounder=jq.rounding.LDLQ()), "needs statistics"),
    (lambda: jq.merge(jq.adapt(packed(), LoRA(2)), bits=5), "a/kernel: bits must be one of"),
    (lambda: finetune(fn, packed(), np.zeros((4, 2, 32))), "nothing to train: no array has one of"),
    (lambda: jq.adapt(packed(), LoRA(2), targets=[]), "targets names no weights"),
    (lambda: jq.adapt(packed(), L4Q(2), floats={"p": params()}), "nearest: p/a/kernel"),
    (lambda: jq.adapt(packed(), L4Q(2), floats=packed()), "a/kernel: floats holds no array"),
    (lambda: jq.thaw(jq.adapt(packed(), LoRA(2)), RECIPE(jq.lsq(3, 16))), "merge it first"),
    (
        lambda: jq.freeze(jq.adapt(jq.latent(params(), RECIPE(jq.lsq(4, 16))), LoRA(2))),
        "a/kernel: the latent weight has an adapter: merge it first",
    ),
    (
        lambda: jq.adapt(jq.latent(params(), RECIPE(jq.lsq(4, 16))), LoRA(2, dora=True)),
        "dora=True needs a matrix that stays as it is",
    ),
    (
        lambda: jq.qat(fn, jq.adapt(packed(), L4Q(2)), np.zeros((4, 2, 32), np.float32)),
        "a/kernel has an adapter, which jaxquant.training.finetune trains",
    ),
    (lambda: jq.adapters.sign_descent(5.0), "share must be between 0 and 1"),
    (lambda: Finetuning(ternary_share=1.0), "ternary_share must be 0, or at least"),
    (lambda: Finetuning(ternary_share=1e-4), "at least 0.001, to which it falls"),
    (lambda: selected(jq.adapt(packed(), LoRA(2)), [0]), "a/kernel: the weight has one adapter"),
    (lambda: selected(packed(), [0]), "nothing to select from"),
    (lambda: selected(two_adapters(), [0, 2]), "ids must be from 0 to 1, .* got 2"),
    (lambda: selected(two_adapters(), [-1]), "ids must be from 0 to 1, .* got -1"),
    (lambda: selected(two_adapters(), jnp.array([0.5])), "ids must be a vector of integers"),
    (lambda: jq.quantized(fn)(two_adapters(), inputs()), "the weight has 2 adapters: say which"),
    (lambda: jq.dequantize(two_adapters()), "the weight has 2 adapters: say which"),
    (lambda: together([packed(), packed()]), "nothing to combine"),
    (lambda: together([jq.adapt(packed(), LoRA(2))]), "at least two trees, got 1"),
    (
        lambda: together([jq.adapt(packed(), LoRA(2)), jq.adapt(packed(), LoRA(3))]),
        "a/kernel: trees 0 and 1 differ here in format, shape or adapter",
    ),
    (
        lambda: together([jq.adapt(packed(), QALoRA(2)), jq.adapt(packed(), QALoRA(2))]),
        "only adapters that are LoRA",
    ),
]


@pytest.mark.parametrize("case", BAD, ids=[text for _, text in BAD])
def test_bad_input_is_named(case):
    call, text = case
    with pytest.raises(ValueError, match=text):
        call()


# --- merging --------------------------------------------------------------------------------------


def reports(tree, **options):
    found = []
    merged = jq.merge(tree, progress=found.append, **options)
    return merged, found


def test_an_exact_merge_keeps_everything():
    for adapter in (QALoRA(2), L4Q(2), PEQA()):
        tree = trained(jq.adapt(packed(), adapter, floats=params()), size=0.02)
        merged, found = reports(tree)
        assert [(r.path, r.exact, r.kept) for r in found] == [
            ("a/kernel", True, 1.0), ("b/kernel", True, 1.0)
        ]  # fmt: skip
        x = inputs()
        run = jax.jit(jq.quantized(fn))
        np.testing.assert_array_equal(run(merged, x), run(tree, x))


def test_what_a_merge_that_rounds_again_keeps_is_measured():
    """By the definition, against the inputs' second moment; and feedback keeps more."""
    x = inputs(5, 400) @ jnp.diag(jnp.linspace(0.1, 2, 32))
    one = {"w": params()["a"]["kernel"]}
    product = lambda p, x: x @ p["w"]
    stats = jq.calibrate(product, one, [x])
    tree = trained(jq.adapt(jq.quantize(one, OFFSET), LoRA(2)), size=0.05)
    merged, (report,) = reports(tree, stats=stats)
    base = jq.quantize(one, OFFSET)["w"].dequantize()
    whole, after = tree["w"].dequantize(), merged["w"].dequantize()
    energy = lambda d: float(jnp.sum((x @ d) ** 2))
    assert not report.exact
    assert report.kept == pytest.approx(1 - energy(after - whole) / energy(whole - base), rel=1e-3)
    _, (better,) = reports(tree, stats=stats, rounder=jq.rounding.LDLQ())
    assert report.kept < better.kept < 1


def test_a_merge_may_round_to_other_bits():
    tree = trained(jq.adapt(packed(), LoRA(2)), size=0.05)
    merged, found = reports(tree, bits=8)
    assert merged["a"]["kernel"].format.format.bits == 8
    assert all(r.kept > 0.9 and r.bits_per_weight == 10.0 for r in found)


def test_an_adapter_that_learned_nothing_has_nothing_to_keep():
    _, found = reports(jq.adapt(packed(), LoRA(2)))
    assert all(np.isnan(r.kept) and r.energy == 0 for r in found)


def test_a_merge_into_latent_floats_is_not_called_exact():
    tree = jq.adapt(jq.latent(params(), RECIPE(jq.lsq(2, 16))), LoRA(2))
    after = trained(tree, size=0.05)
    merged, found = reports(after, rounder=jq.rounding.LDLQ())  # which rounds no floats
    w = after["a"]["kernel"]
    none = dataclasses.replace(w, data={**w.data, "lora_b": 0 * w.data["lora_b"]})
    whole, base = w.stored(), none.stored()
    lost = jnp.sum((merged["a"]["kernel"].stored() - whole) ** 2) / jnp.sum((whole - base) ** 2)
    assert not found[0].exact and found[0].kept == pytest.approx(1 - float(lost), rel=1e-3)


def test_merged_floats_keep_the_rounding_of_inputs():
    method = jq.Method("rounds", jq.rounding.Nearest(), jq.formats.Dense(), activations="int4")
    tree = trained(jq.adapt(packed(method), LoRA(2)))
    merged, x = jq.merge(tree), inputs()
    assert str(merged["a"]["kernel"].activations) == "int4"
    close = np.abs(jq.quantized(fn)(merged, x) - jq.quantized(fn)(tree, x)).max()
    assert close < 0.5 * np.abs(jq.quantized(fn)(merged, x) - fn(jq.dequantize(merged), x)).max()


def test_sums_that_cannot_be_rounded_are_refused():
    tree = jq.adapt(packed(), LoRA(2))
    data = tree["a"]["kernel"].data
    data["lora_b"] = data["lora_b"].at[0, 0].set(jnp.nan)
    with pytest.raises(ValueError, match="a/kernel: the sum of weight and adapter is not finite"):
        jq.merge(tree)
    data["lora_b"] = jnp.full_like(data["lora_b"], 1e9)
    with pytest.raises(ValueError, match="a/kernel: the sum .* outside the range of float16"):
        jq.merge(tree)


# --- several adapters -----------------------------------------------------------------------------


def test_rows_of_a_batch_use_the_adapters_that_they_ask_for():
    q = packed()
    trees = [trained(jq.adapt(q, LoRA(2)), seed) for seed in (1, 2, 3)]
    many, x, ids = together(trees), inputs(9, 4, 5), [2, 0, 0, 1]
    run = jax.jit(jq.quantized(fn))
    got = run(selected(many, ids), x)
    for row, i in enumerate(ids):
        np.testing.assert_allclose(got[row], run(trees[i], x[row]), rtol=1e-5, atol=1e-6)
    traced = jax.jit(lambda ids, x: jq.quantized(fn)(selected(many, ids), x))
    np.testing.assert_allclose(traced(jnp.array(ids), x), got, rtol=1e-6, atol=1e-6)
    wrong = traced(jnp.array([5, 0, -9, 1]), x)
    assert bool(jnp.isnan(wrong[0]).all()) and not bool(jnp.isnan(wrong[1]).any())
    held = sum(a.nbytes for a in jax.tree.leaves(many))
    assert held < sum(a.nbytes for a in jax.tree.leaves(trees)) / 1.5


def test_adapters_of_another_base_are_refused():
    other = jq.quantize(jax.tree.map(lambda a: a + 0.1, params()), RECIPE(OFFSET))
    with pytest.raises(ValueError, match="a/kernel: tree 1 holds other values than tree 0"):
        together([jq.adapt(packed(), LoRA(2)), jq.adapt(other, LoRA(2))])
    one, two = (jq.adapt(packed(), LoRA(2)) for _ in range(2))
    with pytest.raises(ValueError, match="norm: tree 1 holds other values"):
        together([one, {**two, "norm": 2 * two["norm"]}])
    with pytest.raises(ValueError, match="b/kernel: trees 0 and 1 differ"):
        together([jq.adapt(packed(), LoRA(2), targets=["a/*"]), two])
    with pytest.raises(ValueError, match="v: only one of trees 0 and 1 has this leaf"):
        together([one, {**two, "v": jnp.ones(2)}])


def test_a_batch_of_another_size_than_selected_is_refused():
    many = together([jq.adapt(packed(), LoRA(2), key=jax.random.key(i)) for i in (0, 1)])
    with pytest.raises(ValueError, match="selected for a batch of 4, but the inputs have 6 rows"):
        jq.quantized(fn)(selected(many, [0, 1, 1, 0]), inputs())
    with pytest.raises(ValueError, match="no one matrix has them all"):
        selected(many, [0, 1])["a"]["kernel"].dequantize()


# --- training -------------------------------------------------------------------------------------


def test_dropout_acts_inside_randomness_only():
    tree = trained(jq.adapt(packed(), LoRA(4, dropout=0.5)))
    plain = trained(jq.adapt(packed(), LoRA(4)))
    x, run = inputs(), jq.quantized(fn)
    np.testing.assert_array_equal(run(tree, x), run(plain, x))

    @jax.jit
    def dropped(key):
        with jq.estimators.randomness(key):
            return run(tree, x)

    one, same, two = (dropped(jax.random.key(i)) for i in (0, 0, 1))
    np.testing.assert_array_equal(one, same)
    assert float(jnp.abs(one - two).max()) > 1e-3
    first = jq.quantized(lambda p, x: x @ p["a"]["kernel"])

    @jax.jit
    def mean(key):
        with jq.estimators.randomness(key):
            return first(tree, x)

    many = jnp.mean(jnp.stack([mean(k) for k in jax.random.split(jax.random.key(0), 400)]), 0)
    np.testing.assert_allclose(many, first(tree, x), atol=0.1)


def test_lora_plus_is_two_labels_of_the_optimizer():
    tree = jq.adapt(packed(), LoRA(2))
    train = eqx.filter(tree, jq.trained(tree))
    how = jq.training.optimizer(train, lora_a=optax.sgd(1e-3), lora_b=optax.sgd(1.6e-2))
    ones = jax.tree.map(jnp.ones_like, train)
    step, _ = how.update(ones, how.init(train), train)
    data = step["a"]["kernel"].data
    assert float(data["lora_b"][0, 0] / data["lora_a"][0, 0]) == pytest.approx(16)


def test_other_leaves_are_trained_if_they_are_named():
    tree, goal = jq.adapt(packed(), LoRA(2)), {**params(), "norm": 2 * jnp.ones(32)}
    how = Finetuning(steps=10, also=("norm",), other_rate=0.05, learning_rate=1e-3)
    after = finetune(fn, tree, data(), how, teacher=goal)
    assert float(jnp.abs(after["norm"] - 1).min()) > 0.05
    train = eqx.filter(tree, jq.trained(tree, also=("norm",)))
    own = jq.training.optimizer(train, lora_a=optax.sgd(1.0), other=optax.sgd(1.0))
    step, _ = own.update(jax.tree.map(jnp.ones_like, train), own.init(train), train)
    assert float(step["norm"][0]) == -1


def test_offsets_of_zero_are_trained():
    with pytest.warns(UserWarning, match="gains offsets"):
        tree = jq.adapt(packed(jq.rtn(3, 16, symmetric=True)), L4Q(2), floats=params())
    after = finetune(fn, tree, data(), Finetuning(steps=10, scale_rate=0.01), teacher=target())
    assert not tree["a"]["kernel"].data["offset"].any()
    assert float(jnp.abs(after["a"]["kernel"].data["offset"]).max()) > 0


def test_adapters_in_bfloat16_are_trained_in_float32():
    """Steps that bfloat16 could not hold add up."""
    tree = jq.adapt(packed(), LoRA(2, dtype="bfloat16"))
    how = Finetuning(steps=100, learning_rate=5e-5, clip=0)
    after = finetune(fn, tree, data(), how, teacher=target())
    a, b = (t["a"]["kernel"].data["lora_a"].astype(jnp.float32) for t in (after, tree))
    assert after["a"]["kernel"].data["lora_a"].dtype == jnp.bfloat16
    assert float(jnp.mean(jnp.abs(a - b))) > 1e-3


def test_a_loss_of_ones_own():
    x = data()
    own = finetune(fn, jq.adapt(packed(), LoRA(2)), x, Finetuning(steps=20, learning_rate=0.02),
                   loss=lambda y, x: jnp.mean((y - fn(target(), x)) ** 2))  # fmt: skip
    assert far(own) < far(packed())
    with pytest.raises(ValueError, match="either a loss or a teacher"):
        finetune(fn, jq.adapt(packed(), LoRA(2)), x, loss=lambda y, x: 0.0, teacher=target())


def target():
    """The same function with the weights moved by something of rank 2."""
    goal = params()
    for i, name in enumerate(("a", "b")):
        low = [0.3 * jax.random.normal(k, (32, 2)) for k in jax.random.split(jax.random.key(i), 2)]
        goal[name]["kernel"] += low[0] @ low[1].T
    return goal


def data():
    return np.asarray(inputs(11, 24, 8))


def far(tree):
    return float(jnp.mean((jq.quantized(fn)(tree, data()) - fn(target(), data())) ** 2))


@pytest.mark.parametrize(
    "adapter", [LoRA(2), QALoRA(2), L4Q(2), LoTA(4, 0.5), PEQA(), LoRA(2, dora=True)], ids=repr
)
def test_every_adapter_learns(adapter):
    tree = jq.adapt(packed(), adapter, floats=params())
    how = Finetuning(steps=60, learning_rate=0.02, scale_rate=0.01, batch_size=4, clip=0)
    after = finetune(fn, tree, data(), how, teacher=target())
    assert far(after) < 0.93 * far(tree)
    assert jax.tree.structure(after) == jax.tree.structure(tree)
    np.testing.assert_array_equal(after["norm"], tree["norm"])


@pytest.mark.parametrize("how", [{}, {"optimizer": "adam8bit"}, {"paged": True}], ids=str)
def test_training_resumes_to_the_same_bits(how):
    tree = jq.adapt(packed(), LoRA(2, dropout=0.1))
    how = Finetuning(steps=6, save_every=2, learning_rate=0.01, **how)
    whole = finetune(fn, tree, data(), how, teacher=target(), validation=data()[:2])

    class Killed(Exception):
        pass

    def stop(done):
        if done.step == 5:
            raise Killed

    store = {}
    with pytest.raises(Killed):
        finetune(fn, tree, data(), how, teacher=target(), validation=data()[:2],
                 finished=store, progress=stop)  # fmt: skip
    seen = []
    again = finetune(fn, tree, data(), how, teacher=target(), validation=data()[:2],
                     finished=store, progress=lambda done: seen.append(done.step))  # fmt: skip
    assert seen == [5, 6]
    for a, b in zip(jax.tree.leaves(again), jax.tree.leaves(whole), strict=True):
        np.testing.assert_array_equal(a, b)


def test_a_paged_state_is_resumed_in_the_memory_of_the_host():
    """With a leaf that is large enough to be paged."""
    wide = {"w": 0.1 * jax.random.normal(jax.random.key(0), (2048, 64))}
    tree = jq.adapt(jq.quantize(wide, jq.rtn(4, 64)), LoRA(64))
    assert tree["w"].data["lora_a"].size >= 100_000
    product = lambda p, x: x @ p["w"]
    x = np.random.default_rng(0).normal(size=(4, 2, 2048)).astype(np.float32)
    how, store = Finetuning(steps=4, save_every=2, learning_rate=0.01, paged=True), {}
    whole = finetune(product, tree, x, how, teacher=wide)

    def stop(done):
        if done.step == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        finetune(product, tree, x, how, teacher=wide, finished=store, progress=stop)
    again = finetune(product, tree, x, how, teacher=wide, finished=store)
    np.testing.assert_array_equal(again["w"].data["lora_a"], whole["w"].data["lora_a"])


def test_paging_changes_nothing_in_what_is_learned():
    tree, run = jq.adapt(packed(), LoRA(2)), {}
    for paged in (False, True):
        how = Finetuning(steps=8, learning_rate=0.01, paged=paged)
        run[paged] = finetune(fn, tree, data(), how, teacher=target())
    for a, b in zip(*map(jax.tree.leaves, run.values()), strict=True):
        np.testing.assert_array_equal(a, b)
