"""Chat templates and conversations: what is rendered, what the cache keeps, and what fails."""

import dataclasses
import io
import json
import time

import jax
import pytest

import jaxquant as jq
from jaxquant.formats.kv_cache import KVFormat
from jaxquant_models import load
from jaxquant_models.readers import chat_template
from jaxquant_models.readers.chat_template import ChatTemplate
from jaxquant_models.readers.checkpoint import save_model
from jaxquant_models.readers.gguf_metadata import chat_template_from_gguf
from jaxquant_models.runs.chat import Conversation, chat_ids, chat_model
from jaxquant_models.runs.generate import Session, generate
from tests.support.tiny_llama import BASE, byte_tokenizer_json, random_tensors, write_folder

# "<|a|>" ends a turn; the configuration names "</s>" (257) alone.
TEMPLATE = """{%- for message in messages %}
    {{- bos_token if loop.first }}
    {%- if message.role not in ["system", "user", "assistant"] %}
        {{- raise_exception("unknown role " + message.role) }}
    {%- endif %}
    {{- "[" + message.role + "]" + message.content + "<|a|>" + "\\n" }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- "[assistant]" }}
{%- endif %}
"""
USER, ANSWER = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes"}
OPTIONS = {"chat_template": TEMPLATE, "bos_token": {"content": "<s>"}, "eos_token": "</s>"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    out = tmp_path_factory.mktemp("chat") / "model"
    write_folder(out, BASE | {"max_position_embeddings": 1024}, random_tensors(BASE))
    (out / "tokenizer.json").write_text(byte_tokenizer_json())
    (out / "tokenizer_config.json").write_text(json.dumps(OPTIONS))
    return out


@pytest.fixture(scope="module")
def model(folder):
    return load(folder)


def named(source):
    return ChatTemplate(source).render([USER, ANSWER])


# --- templates


def test_a_template_is_rendered_as_by_transformers():
    template = ChatTemplate(TEMPLATE, {"bos_token": "<s>"})
    assert template.render([USER]) == "<s>[user]Hi<|a|>\n[assistant]"
    assert template.render([USER, ANSWER], answer=False) == (
        "<s>[user]Hi<|a|>\n[assistant]Yes<|a|>\n"
    )
    assert template.after_answer() == "<|a|>\n"
    # Whole lines of blocks leave nothing (trim_blocks, lstrip_blocks).
    lines = ("{% for m in messages %}", "  {% if m.role == 'user' %}", "u", "  {% endif %}")
    assert named("\n".join((*lines, "{% endfor %}"))) == "u\n"
    assert named("{{ messages[0].content | tojson }}{{ {'a': '<é>'} | tojson }}") == (
        '"Hi"{"a": "<é>"}'
    )
    assert named("{% for m in messages %}{% break %}{% endfor %}{{ unknown }}.") == "."
    assert named("{% generation %}{{ messages[1].content }}{% endgeneration %}!") == "Yes!"
    assert named("{{ strftime_now('%Y') }}") == time.strftime("%Y")


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("{% if %}", "Expected an expression"),
        ("{{ raise_exception('only\nuser') }}", "only user"),
        ("{{ messages[0].content.nothing.more }}", "has no attribute 'nothing'"),
        ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "unsafe"),
        ("{{ messages.append(1) }}", "unsafe"),
        ("{{ cycler.__init__.__globals__.os.popen('id').read() }}", "unsafe"),
        ("{% include '/etc/passwd' %}", "no loader"),
        ("{{ 'a' * 10**9 }}", "powers"),
        ("{{ 'a' * 1000000000 }}", "repeats a text to more than"),
        ("{{ 1000000000 * [1] }}", "repeats a text to more than"),
        ("{% for i in range(99999) %}{{ 'a' * 9999 }}{% endfor %}", "writes more than"),
        ("{{ range(999999) }}", "Range too big"),
        ("{{ 1 / 0 }}", "division by zero"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "recursion"),
    ],
)
def test_a_broken_or_malicious_template_fails_in_one_line(source, message):
    with pytest.raises(ValueError, match="^the chat template fails: ") as error:
        named(source)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_a_template_that_does_not_end(monkeypatch):
    monkeypatch.setattr(chat_template, "SECONDS", 0.2)
    loop = "{% for i in range(9000) %}"
    with pytest.raises(ValueError, match="takes more than 0.2 s"):
        named(loop * 2 + "{% endfor %}" * 2)


def test_where_templates_come_from(folder, tmp_path):
    read = lambda: load(write_folder(tmp_path / "m", BASE, random_tensors(BASE))).tokenizer.chat
    assert read() is None
    options = tmp_path / "m" / "tokenizer_config.json"
    both = [{"name": "tools", "template": "t"}, {"name": "default", "template": "d"}]
    options.write_text(json.dumps({"chat_template": both, "bos_token": None}))
    assert read() == ChatTemplate("d", {})
    (tmp_path / "m" / "chat_template.jinja").write_text("own")
    assert read() == ChatTemplate("own", {})
    options.write_text(json.dumps({"chat_template": 3}))
    with pytest.raises(ValueError, match="^tokenizer_config.json: chat_template"):
        read()
    assert load(folder).tokenizer.chat == ChatTemplate(
        TEMPLATE, {"bos_token": "<s>", "eos_token": "</s>"}
    )


def test_the_template_of_a_gguf_file():
    words = {"model": "gpt2", "tokens": ["a", "<s>"], "merges": ["a a"], "bos_token_id": 1}
    fields = {f"tokenizer.ggml.{name}": value for name, value in words.items()}
    assert chat_template_from_gguf(fields) is None
    got = chat_template_from_gguf(fields | {"tokenizer.chat_template": "t"})
    assert got == ChatTemplate("t", {"bos_token": "<s>"})
    with pytest.raises(ValueError, match="must be a string, got 3"):
        chat_template_from_gguf(fields | {"tokenizer.chat_template": 3})


def test_a_checkpoint_keeps_the_template(model, folder, tmp_path):
    save_model(tmp_path / "c", model, None)
    assert load(tmp_path / "c").tokenizer.chat == model.tokenizer.chat
    without = dataclasses.replace(model, tokenizer=type(model.tokenizer).from_json(
        byte_tokenizer_json()))  # fmt: skip
    save_model(tmp_path / "d", without, None)
    assert load(tmp_path / "d").tokenizer.chat is None


# --- conversations


def test_the_token_after_an_answer_is_a_stop_token(model):
    assert model.config.eos_ids == (257,)
    assert chat_model(model).config.eos_ids == (257, 258)
    assert chat_ids(model, [USER])[0] == 256  # the template writes <s>, and only the template
    assert chat_ids(model, [USER]).count(256) == 1


@pytest.mark.parametrize("kv", [None, KVFormat(4, window=16, group=16, channels=8)])
def test_a_conversation_computes_only_what_is_new(model, kv):
    talk = Conversation(model, "Be brief.", max_tokens=12, kv=kv)
    for text in ("one", "two", "three"):
        before = talk.session.prefill.tokens
        said = "".join(talk.ask(text))
        assert said == talk.messages[-1]["content"]
    ids = chat_ids(model, talk.messages[:-1])
    assert [m["role"] for m in talk.messages] == ["system", *["user", "assistant"] * 3]
    if kv is None:  # rounding depends on where the calls are cut
        config = chat_model(model).config
        new = generate(model.apply_cached, model.params, config, ids, 12)
        assert talk.messages[-1]["content"] == model.tokenizer.decode(new)
        assert talk.session.prefill.tokens - before < len(ids) / 2


def test_a_session_is_the_same_as_beginning_anew(model):
    """Longer texts, other texts, shorter ones, and more than the cache has room for."""
    run = lambda ids: generate(model.apply_cached, model.params, model.config, ids, 10)
    session = Session(model.apply_cached, model.params, model.config, size=64, keeps=True)
    stream = lambda ids: [t for part in session.stream(ids, 10, stride=4) for t in part]
    ids = list(range(20))
    for next_ids in (ids, ids, ids[:7], [*ids[:7], 9, 9, 9], list(range(100, 250)), [3]):
        assert stream(next_ids) == run(next_ids)
    grown = ids
    for _ in range(6):
        taken = session.prefill.tokens
        new = stream(grown)
        assert new == run(grown)
        grown = [*grown, *new, 5, 6]
    assert session.prefill.tokens - taken == 3  # the last of 10 tokens was never processed
    assert jax.tree.leaves(session._cache)[0].shape[3] > 64


def test_unstacked_layers_and_packed_weights_keep_their_cache(model):
    recipe = jq.Recipe([("layers/*kernel", jq.rtn(group_size=8)), ("*", jq.KEEP)])
    params = jq.ptq.unstack(jq.quantize(model.params, recipe, model.sites()), "layers")
    apply_cached = jq.quantized(model.apply_cached)
    session = Session(apply_cached, params, model.config, keeps=True)
    stream = lambda ids: [t for part in session.stream(ids, 9, stride=4) for t in part]
    first = stream([1, 2, 3])
    again = stream([1, 2, 3, *first, 8])
    assert again == generate(apply_cached, params, model.config, [1, 2, 3, *first, 8], 9)


def test_a_full_conversation_says_so(model):
    short = dataclasses.replace(model, config=dataclasses.replace(model.config, max_position=40))
    talk = Conversation(short, max_tokens=500)
    assert len("".join(talk.ask("a"))) > 0
    with pytest.raises(ValueError, match="but the model only 40 positions; start a new one"):
        list(talk.ask("b" * 40))


# --- the commands


def said_by(run, monkeypatch, text, *args):
    monkeypatch.setattr("sys.stdin", io.StringIO(text))
    return run("chat", *args)


def test_chat_reads_lines_and_answers_each(folder, model, run, monkeypatch):
    options = (folder, "--max-tokens", 5, "--json")
    status, out, err = said_by(run, monkeypatch, "one\n\n  two  \n", *options)
    answers = [json.loads(text) for text in out.splitlines()]
    assert (status, [a["prompt"] for a in answers]) == (0, ["one", "two"])
    talk = Conversation(load(folder), max_tokens=5)
    assert [a["text"] for a in answers] == ["".join(talk.ask(t)) for t in ("one", "two")]
    assert answers[0]["tokens"] <= 5 and answers[0]["compile_seconds"] > 0
    status, out, err = said_by(run, monkeypatch, "one", folder, "--max-tokens", 5)
    assert (status, out) == (0, answers[0]["text"] + "\n")
    assert "tokens/s" in err and "peak memory" in err
    assert said_by(run, monkeypatch, "", folder) == (0, "", "")
    system = said_by(run, monkeypatch, "one", *options, "--system", "Be brief.")[1]
    assert json.loads(system)["text"] != answers[0]["text"]


def test_generate_chat_wraps_the_prompt(folder, model, run):
    status, out, err = run("generate", folder, "--prompt", "Hi", "--chat", "--max-tokens", 6)
    config = chat_model(model).config
    want = generate(model.apply_cached, model.params, config, chat_ids(model, [USER]), 6)
    assert (status, out) == (0, model.tokenizer.decode(want) + "\n")
    assert "prefill" in err and "try --chat" not in err


def test_a_text_that_ends_at_once_gets_a_hint(folder, run, monkeypatch, tmp_path):
    first = load(folder)
    (ends,) = generate(first.apply_cached, first.params, first.config, [1], 1)
    config = json.loads((folder / "config.json").read_text()) | {"eos_token_id": ends}
    made = write_folder(tmp_path / "m", config, random_tensors(BASE))
    (made / "tokenizer_config.json").write_text(json.dumps(OPTIONS))
    letter = first.tokenizer.decode([1])
    status, out, err = run("generate", made, "--prompt", letter)
    assert (status, out) == (0, letter + "\n")
    assert f"{made} ended the text at once; it is trained to chat: try --chat" in err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "has no chat template, so it can only continue texts"),
        ({"chat_template": "{% if %}"}, "the chat template fails: Expected an expression"),
        ({"chat_template": "{{ x.__class__ }}{{ ''.__class__.__base__ }}"}, "unsafe"),
    ],
)
def test_models_that_cannot_chat(options, message, run, monkeypatch, tmp_path):
    made = write_folder(tmp_path / "m", BASE, random_tensors(BASE))
    (made / "tokenizer_config.json").write_text(json.dumps(options))
    for result in (
        said_by(run, monkeypatch, "Hi", made),
        run("generate", made, "--prompt", "Hi", "--chat"),
    ):
        status, out, err = result
        assert (status, out) == (1, "")
        assert message in err and err.startswith("error: ") and err.count("\n") == 1


@pytest.mark.model
@pytest.mark.slow
def test_the_demo_model_answers(run, monkeypatch):
    questions = "What is the capital of France?\nAnd of Italy?\n"
    status, out, _ = said_by(run, monkeypatch, questions, "smollm2-135m", "--max-tokens", 30)
    assert status == 0
    assert ["Paris" in out.splitlines()[0], "Rome" in out] == [True, True]
