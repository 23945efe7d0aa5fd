"""Training examples: which tokens are predicted, the loss of those alone, and broken files."""

import dataclasses
import json

import jax.numpy as jnp
import numpy as np
import pytest

import jaxquant as jq
from jaxquant_models import load
from jaxquant_models.readers.chat_template import ChatTemplate
from jaxquant_models.readers.tokenizer import Tokenizer
from jaxquant_models.runs.examples import completion_loss, example_sequences, read_examples
from tests.support.command import fails
from tests.support.tiny_llama import BASE, byte_tokenizer_json, random_tensors, write_folder

TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}</>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
CHAT = {
    "messages": [
        {"role": "user", "content": "Hi?"},
        {"role": "assistant", "content": "Hello."},
        {"role": "user", "content": "Bye?"},
        {"role": "assistant", "content": "Goodbye."},
    ]
}
PAIR = {"prompt": "two and two is ", "completion": "four"}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    folder = tmp_path_factory.mktemp("examples") / "model"
    write_folder(folder, BASE, random_tensors(BASE))
    (folder / "tokenizer.json").write_text(byte_tokenizer_json())
    return folder


@pytest.fixture(scope="module")
def model(tiny):
    return chatting(load(tiny), TEMPLATE)


def chatting(model, template):
    tokenizer = Tokenizer.from_json(model.tokenizer.to_json(), chat=ChatTemplate(template))
    return dataclasses.replace(model, tokenizer=tokenizer)


def written(path, *lines):
    path.write_text(
        "\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines)
    )
    return path


def predicted_text(model, row):
    tokens, mask = row
    return model.tokenizer.decode(tokens[mask == 1])


def test_only_answers_are_predicted(model, tmp_path):
    examples = read_examples(written(tmp_path / "a.jsonl", CHAT, "", PAIR))
    rows = example_sequences(model, examples, 120)
    assert rows.shape == (2, 2, 120) and rows.dtype == np.int32
    assert predicted_text(model, rows[0]) == "Hello.</>Goodbye.</>"
    end = model.tokenizer.decode([next(iter(model.config.eos_ids))])
    assert predicted_text(model, rows[1]) == f"four{end}"
    whole = model.tokenizer.decode(rows[0][0]).replace(end, "")
    assert whole == "<user>Hi?</><assistant>Hello.</><user>Bye?</><assistant>Goodbye.</>"


def test_the_loss_is_the_mean_over_predicted_tokens(model, tmp_path):
    rows = example_sequences(model, read_examples(written(tmp_path / "a.jsonl", CHAT, PAIR)), 80)
    logits = np.random.default_rng(0).normal(size=(2, 80, 261)).astype(np.float32)
    total, count = 0.0, 0
    for (tokens, mask), of in zip(rows, logits, strict=True):
        for t in range(79):
            if mask[t + 1]:
                total += np.log(np.exp(of[t]).sum()) - of[t][tokens[t + 1]]
                count += 1
    found = completion_loss(jnp.asarray(logits), jnp.asarray(rows))
    assert float(found) == pytest.approx(total / count, rel=1e-5)
    changed = logits.copy()
    changed[:, -1] += 5  # after the last token nothing is predicted
    changed[0, 0] *= 2  # nor inside of the question
    assert float(completion_loss(jnp.asarray(changed), jnp.asarray(rows))) == pytest.approx(
        float(found), rel=1e-6
    )


def test_padding_does_not_reach_the_predictions(model, tmp_path):
    examples = read_examples(written(tmp_path / "a.jsonl", PAIR))
    short, long = (example_sequences(model, examples, n) for n in (32, 64))
    losses = [
        float(completion_loss(model.apply_fn(model.params, jnp.asarray(x[:, 0])), jnp.asarray(x)))
        for x in (short, long)
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_examples_that_are_too_long_are_left_out(model, tmp_path):
    far = {"prompt": "x" * 100, "completion": "y"}
    examples = read_examples(written(tmp_path / "a.jsonl", far, PAIR))
    with pytest.warns(UserWarning, match="1 of 2 examples were left out"):
        assert len(example_sequences(model, examples, 32)) == 1
    with pytest.raises(ValueError, match="no completion begins within the first 32 tokens"):
        example_sequences(model, examples[:1], 32)


def test_a_template_that_rewrites_answers_is_refused(model, tmp_path):
    last = "{% for m in messages %}{{ m.content if loop.last else m.role }};{% endfor %}"
    examples = read_examples(written(tmp_path / "a.jsonl", CHAT))
    with pytest.raises(ValueError, match="writes a message differently once others follow"):
        example_sequences(chatting(model, last), examples, 64)


BROKEN = [
    ('{"prompt": 3, "completion": "x"}', "line 2: prompt must be a valid string, got 3"),
    ('{"prompt": "x"', "line 2 is not JSON"),
    ("[1]", "line 2"),
    ('{"text": "x"}', 'line 2: it must have "messages", or "prompt" and "completion"'),
    ('{"messages": [{"role": "user", "content": "x"}]}', "one whose role is"),
    ('{"messages": [{"role": "user"}]}', "line 2 lacks 'messages.0.content'"),
    ('{"prompt": "x", "completion": ""}', "line 2: completion must not be empty"),
    ('{"prompt": "x", "completion": "y", "messages": []}', 'either "messages" or "prompt"'),
]


@pytest.mark.parametrize(("line", "message"), BROKEN, ids=[m for _, m in BROKEN])
def test_a_broken_line_is_named_by_its_number(tmp_path, line, message):
    with pytest.raises(ValueError, match="a.jsonl, line 2") as caught:
        read_examples(written(tmp_path / "a.jsonl", PAIR, line))
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_files_that_hold_nothing(tmp_path):
    with pytest.raises(ValueError, match="holds no examples"):
        read_examples(written(tmp_path / "a.jsonl", "", ""))
    with pytest.raises(ValueError, match="cannot read"):
        read_examples(tmp_path / "none.jsonl")


def test_the_command_learns_completions(tiny, run, tmp_path):
    pairs = [{"prompt": f"{i} is ", "completion": "odd" if i % 2 else "even"} for i in range(24)]
    file = written(tmp_path / "a.jsonl", *pairs)
    command = ("finetune", tiny, "--method", "qlora", "--bits", 4, "--group-size", 8, "--rank", 4,
               "--context", 16, "--batch", 8, "--steps", 30, "--set", "learning_rate=0.02",
               "--data", file, "--out", tmp_path / "o")  # fmt: skip
    status, _, err = run(*command)
    assert status == 0, err
    model, start = load(tmp_path / "o"), load(tiny)
    x = jnp.asarray(example_sequences(model, read_examples(file), 16))
    loss = lambda m: float(completion_loss(jq.quantized(m.apply_fn)(m.params, x[:, 0]), x))
    assert loss(model) < 0.6 * loss(start)
    again = (*command, "--overwrite")
    fails(run(*again, "--text", file), 2, "leave out --text and --generated")
    fails(run(*again, "--teacher", tiny), 2, "leave out --teacher")
    other = ("finetune", tiny, "--method", "qat", "--data", file, "--steps", 2)
    fails(run(*other, "--out", tmp_path / "p"), 2, "--data is for adapters")
    written(tmp_path / "a.jsonl", PAIR, "{")
    fails(run(*again), 2, "a.jsonl, line 2 is not JSON")
