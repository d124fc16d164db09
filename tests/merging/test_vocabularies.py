"""Models with different vocabularies and tokenizers: refused by default, or merged token by token or row by row."""

import json
import subprocess
import sys

import pytest
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from hf_modular.checkpoints import Checkpoint
from hf_modular.merging import merge

SMALL = {"hidden_size": 8, "intermediate_size": 12, "num_attention_heads": 2, "num_hidden_layers": 1}
WORDS = ["<unk>", *"abcdefg", "ab", "cd"]
MERGES = [("a", "b"), ("c", "d")]
EMBED, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def bpe(words, merges):
    tokenizer = Tokenizer(models.BPE({word: i for i, word in enumerate(words)}, merges, unk_token="<unk>"))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(False), decoders.ByteLevel()
    return tokenizer


def word_piece(words):
    tokenizer = Tokenizer(models.WordPiece({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.Whitespace(), decoders.WordPiece()
    return tokenizer


def unigram(words):
    tokenizer = Tokenizer(models.Unigram([(word, -9.0 / len(word)) for word in words], 0))
    tokenizer.decoder = decoders.Metaspace()
    return tokenizer


def special(tokenizer, *tokens):
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in tokens])
    return tokenizer


def saved(folder, tokenizer, rows, seed, *, tied=False, **settings):
    """A model with a tokenizer."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=rows, num_key_value_heads=1, tie_word_embeddings=tied, bos_token_id=0, eos_token_id=1, **SMALL
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    if tokenizer is not None:
        PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", **settings).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module", params=[False, True], ids=["untied", "tied"])
def three(request, tmp_path_factory):
    """A base; a model with two special tokens more; a model with other numbers, other tokens, and rows to spare."""
    folder = tmp_path_factory.mktemp("models")
    more = special(bpe(WORDS, MERGES), "<|im_start|>", "<|im_end|>")
    others = special(bpe([*reversed(WORDS), "efg", "ef"], [*MERGES, ("e", "f"), ("ef", "g")]), "<|im_end|>")
    return (
        saved(folder / "base", bpe(WORDS, MERGES), len(WORDS), 0, tied=request.param),
        saved(folder / "more", more, len(WORDS) + 2, 1, tied=request.param, eos_token="<|im_end|>"),
        saved(folder / "other", others, 16, 2, tied=request.param),
    )


def read(folder):
    with Checkpoint(folder) as checkpoint:
        return {name: checkpoint.read(name) for name in checkpoint.tensors}


def recipe(base, *models, **more):
    settings = {"normalize": False, "weight": 0.5}
    if "parameters" in more:
        settings = more.pop("parameters")
    entries = [{"model": model} for model in (base, *models)]
    return {"merge_method": "linear", "base_model": base, "models": entries, "parameters": settings} | more


def refusal(recipe, folder):
    with pytest.raises(ValueError, match="merge cannot begin") as error:
        merge(recipe, folder / "out")
    assert not (folder / "out").exists()
    return str(error.value)


def rows(folder, name=EMBED):
    """The rows of a model's embeddings by their tokens."""
    vocabulary = AutoTokenizer.from_pretrained(folder).get_vocab()
    tensor = read(folder)[name]
    return {token: tensor[row] for token, row in vocabulary.items()}


def checked(folder, size):
    """The names of the embeddings of a result that loads."""
    assert json.loads((folder / "config.json").read_text())["vocab_size"] == size
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert model.model.embed_tokens.weight.shape[0] == size
    tied = model.config.tie_word_embeddings
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied
    return [EMBED] if tied else [EMBED, HEAD]


# --- by tokens -------------------------------------------------------------------------------------------------------


def test_a_union(three, tmp_path):
    report = merge(recipe(*three, tokenizer_source="union"), tmp_path / "out")
    tokens = {*WORDS, "<|im_start|>", "<|im_end|>", "ef", "efg"}
    out = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert set(out.get_vocab()) == tokens
    assert [out.get_vocab()[word] for word in WORDS] == [*range(len(WORDS))]
    for name in checked(tmp_path / "out", len(tokens)):
        base, more, other = (rows(path, name) for path in three)
        found = rows(tmp_path / "out", name)
        for token in WORDS:
            torch.testing.assert_close(found[token], (base[token] + more[token] + other[token]) / 2)
        for token, owners in {"<|im_start|>": [more], "<|im_end|>": [more, other], "ef": [other]}.items():
            mean = sum(owner[token] for owner in owners) / len(owners)
            given = sum(owner.get(token, mean) for owner in (base, more, other)) / 2
            torch.testing.assert_close(found[token], given)
    assert not [note for note in report.notes if "token" in note]
    again = merge(tmp_path / "out/merge_recipe.yaml", tmp_path / "again", workers=3)
    assert again.outputs == report.outputs


def test_the_tokenizer_of_a_union_works(three, tmp_path):
    merge(recipe(*three, tokenizer_source="union"), tmp_path / "out")
    out, base, more = (AutoTokenizer.from_pretrained(path) for path in (tmp_path / "out", *three[:2]))
    for text in ("abcd", "gab", "<unk>a"):
        assert out(text)["input_ids"] == base(text)["input_ids"]
    text = "<|im_start|>ab<|im_end|>"
    assert out.convert_ids_to_tokens(out(text)["input_ids"]) == more.convert_ids_to_tokens(more(text)["input_ids"])
    assert out.tokenize("efgef") == ["efg", "ef"]
    assert out.decode(out("<|im_end|>ab")["input_ids"], skip_special_tokens=True) == "ab"


def test_the_base_and_new_tokens(three, tmp_path):
    """A token that the base lacks is dropped; the rows of a model with other numbers are put in order."""
    merge(recipe(*three, tokenizer_source="base"), tmp_path / "out")
    for name in checked(tmp_path / "out", len(WORDS)):
        base, more, other = (rows(path, name) for path in three)
        for token, row in rows(tmp_path / "out", name).items():
            torch.testing.assert_close(row, (base[token] + more[token] + other[token]) / 2)


def test_another_models_tokenizer(three, tmp_path):
    base, more, _ = three
    merge(recipe(base, more, tokenizer_source=more), tmp_path / "out")
    for name in checked(tmp_path / "out", len(WORDS) + 2):
        torch.testing.assert_close(rows(tmp_path / "out", name)["<|im_end|>"], rows(more, name)["<|im_end|>"])
    files = ("tokenizer.json", "tokenizer_config.json")
    assert all((tmp_path / "out" / file).read_bytes() == (tmp_path / more / file).read_bytes() for file in files)


def test_a_task_vector_of_a_new_token_is_zero(three, tmp_path):
    base, more, _ = three
    task = recipe(base, more, tokenizer_source="union", parameters={"weight": 0.25})
    merge(task | {"merge_method": "task_arithmetic"}, tmp_path / "out")
    for name in checked(tmp_path / "out", len(WORDS) + 2):
        found, own = rows(tmp_path / "out", name), rows(more, name)
        torch.testing.assert_close(found["<|im_end|>"], own["<|im_end|>"])
        torch.testing.assert_close(found["ab"], (0.75 * rows(base, name)["ab"] + 0.25 * own["ab"]))


def test_special_tokens_have_the_tokenizers_numbers(three, tmp_path):
    base, more, _ = three
    path = tmp_path / "more"
    path.mkdir()
    for file in (tmp_path / more).iterdir():
        (path / file.name).write_bytes(file.read_bytes())
    for file in ("config.json", "generation_config.json"):
        (path / file).write_text(json.dumps(json.loads((path / file).read_text()) | {"eos_token_id": 11}))
    merge(recipe(base, str(path), tokenizer_source=str(path)), tmp_path / "out")
    for file in ("config.json", "generation_config.json"):
        assert json.loads((tmp_path / "out" / file).read_text())["eos_token_id"] == 11
    with pytest.warns(UserWarning, match="the result has `eos_token_id` 1, not 11"):
        merge(recipe(base, str(path), tokenizer_source="union"), tmp_path / "union")
    assert json.loads((tmp_path / "union/generation_config.json").read_text())["eos_token_id"] == 1


def test_chosen_embeddings_and_padding(three, tmp_path):
    _, more, other = three
    tokens = {
        "<|im_end|>": {"source": other},
        "<|im_start|>": {"source": {"kind": "zero"}},
        "ab": {"source": {"kind": "model_token", "model": more, "token": "cd"}, "force": True},
        "<new>": {"source": {"kind": "model_token", "model": other, "token_id": 15}},
        "<empty>": {},
    }
    choice = {"source": "base", "tokens": tokens, "pad_to_multiple_of": 8}
    with pytest.warns(UserWarning, match=r"no model has an embedding of the token '<empty>': it is zeros"):
        merge(recipe(*three, tokenizer=choice, parameters={"weight": 1}), tmp_path / "out")
    out = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert out.tokenize("<new>ab") == ["<new>", "ab"]
    for name in checked(tmp_path / "out", 16):
        found, one, two = (rows(path, name) for path in (tmp_path / "out", more, other))
        torch.testing.assert_close(found["<|im_end|>"], (one["<|im_end|>"] + 2 * two["<|im_end|>"]) / 3)
        torch.testing.assert_close(found["<|im_start|>"], one["<|im_start|>"] / 3)
        torch.testing.assert_close(found["ab"], one["cd"])
        torch.testing.assert_close(found["<new>"], read(other)[name if name in read(other) else EMBED][15])
        assert torch.equal(found["<empty>"], torch.zeros(8))
    embed = read(tmp_path / "out")[EMBED]
    assert not torch.equal(embed[15], torch.zeros(8))


@pytest.mark.parametrize(("make", "text"), [(word_piece, "ab cd zz"), (unigram, "cdzzab")])
def test_other_kinds_of_tokenizers(make, text, tmp_path):
    words = ["<unk>", "a", "b", "c", "d", "ab", "cd"]
    base = saved(tmp_path / "base", special(make(words), "<s>"), 8, 0)
    more = saved(tmp_path / "more", special(make([*words, "zz"]), "<t>"), 9, 1)
    merge(recipe(base, more, tokenizer_source="union"), tmp_path / "out")
    checked(tmp_path / "out", 10)
    out = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert len(out) == 10
    assert sorted(out.tokenize(text)) == ["ab", "cd", "zz"]
    torch.testing.assert_close(rows(tmp_path / "out")["zz"], rows(more)["zz"])
    torch.testing.assert_close(rows(tmp_path / "out")["<s>"], rows(base)["<s>"])


def test_spare_rows_stay(tmp_path):
    """Of rows that belong to no token, as many stay as the tokenizer's model has."""
    base, one = (saved(tmp_path / str(i), bpe(WORDS, MERGES), 16, i) for i in range(2))
    two = saved(tmp_path / "two", special(bpe(WORDS, MERGES), "<s>"), 16, 2)
    merge(recipe(base, one, two, tokenizer_source="union"), tmp_path / "out")
    checked(tmp_path / "out", 16)
    out, own = read(tmp_path / "out")[EMBED], [read(path)[EMBED] for path in (base, one, two)]
    torch.testing.assert_close(out[12], sum(own)[12] / 2)
    torch.testing.assert_close(out[10], 3 * own[2][10] / 2)


# --- by numbers ------------------------------------------------------------------------------------------------------


def test_other_sizes_are_refused_with_the_ways_out(three, tmp_path):
    message = refusal(recipe(*three[:2]), tmp_path)
    assert f"the vocabularies must have one size, but {three[0]} has 10, {three[1]} has 12" in message
    assert "`tokenizer_source: base`, `union` or a model" in message
    assert "(`truncate` or `pad`)" in message
    assert message.count("\n") == 1


@pytest.mark.parametrize(("policy", "size"), [("truncate", 10), ("pad", 12)])
def test_row_by_row(three, tmp_path, policy, size):
    base, more, _ = three
    merge(recipe(base, more, vocab=policy), tmp_path / "out")
    for name in checked(tmp_path / "out", size):
        out, one, two = (read(path)[name] for path in (tmp_path / "out", base, more))
        torch.testing.assert_close(out[:10], (one + two[:10]) / 2)
        torch.testing.assert_close(out[10:], two[10:size])


def test_truncating_below_the_tokenizer(three, tmp_path):
    base, more, _ = three
    message = refusal(recipe(more, base, vocab="truncate"), tmp_path)
    assert f"the tokenizer of {more} has tokens up to 11, but `vocab: truncate` leaves 10 rows" in message


def test_other_numbers_in_as_many_rows(tmp_path):
    base = saved(tmp_path / "base", bpe(WORDS, MERGES), 10, 0)
    other = saved(tmp_path / "other", bpe([*reversed(WORDS)], MERGES), 10, 1)
    message = refusal(recipe(base, other), tmp_path)
    assert f"the tokenizers of {base} and {other} must give a token the same number, but 10 of 10 common" in message
    merge(recipe(base, other, tokenizer_source="base"), tmp_path / "out")
    torch.testing.assert_close(rows(tmp_path / "out")["ab"], (rows(base)["ab"] + rows(other)["ab"]) / 2)


def test_other_tokens_in_the_same_rows(tmp_path):
    base = saved(tmp_path / "base", special(bpe(WORDS, MERGES), "<reserved>"), 11, 0)
    other = saved(tmp_path / "other", special(bpe(WORDS, MERGES), "<|im_start|>"), 11, 1)
    with pytest.warns(UserWarning, match="differ in 2 tokens, such as '<reserved>': embeddings were merged by number"):
        merge(recipe(base, other), tmp_path / "out")


def test_tokenizers_that_cannot_be_read(tmp_path):
    paths = [saved(tmp_path / str(i), None, 10, i) for i in range(2)]
    for i, path in enumerate(paths):
        (tmp_path / path / "tokenizer.model").write_bytes(bytes([i]))
    with pytest.warns(UserWarning, match="whether a token has one number in all models is unknown"):
        merge(recipe(*paths), tmp_path / "out")
    assert "into tokenizer.json" in refusal(recipe(*paths, tokenizer_source="union"), tmp_path / "union")


def test_a_model_without_a_tokenizer(tmp_path):
    base = saved(tmp_path / "base", bpe(WORDS, MERGES), 10, 0)
    other = saved(tmp_path / "other", None, 12, 1)
    with pytest.warns(UserWarning, match="has no tokenizer; it was taken to be that of"):
        merge(recipe(base, other, tokenizer_source="base"), tmp_path / "out")
    torch.testing.assert_close(read(tmp_path / "out")[EMBED], (read(base)[EMBED] + read(other)[EMBED][:10]) / 2)


# --- what is refused -------------------------------------------------------------------------------------------------

BAD = {
    "too many rows": (
        {"tokenizer": {"pad_to_multiple_of": 1 << 40}},
        "the embeddings may have up to 2,097,152 rows, but would have 1,099,511,627,776",
    ),
    "another kind": ({"tokenizer_source": "union"}, "are of different kinds, BPE of bytes and WordPiece"),
    "no such row": (
        {"tokenizer": {"tokens": {"<x>": {"source": {"kind": "model_token", "model": "OTHER", "token_id": 99}}}}},
        "the embedding of the token '<x>' must come from a row of",
    ),
    "no such token": (
        {"tokenizer": {"source": "base", "tokens": {"<x>": {"source": "OTHER"}}}},
        "but it has none for '<x>' among its 10",
    ),
    "forced from nowhere": (
        {"tokenizer": {"source": "base", "tokens": {"ab": {"force": True}}}},
        "the embedding of the token 'ab' is forced, so it must have a `source`",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_what_cannot_be_is_refused(tmp_path, case):
    more, message = BAD[case]
    base = saved(tmp_path / "base", bpe(WORDS, MERGES), 10, 0)
    make = word_piece if case == "another kind" else lambda words: bpe(words, MERGES)
    other = saved(tmp_path / "other", make([*WORDS[:-1], "zz" if case == "another kind" else "cd"]), 10, 1)
    more = json.loads(json.dumps(more).replace("OTHER", other))
    assert message in refusal(recipe(base, other, **more), tmp_path)


def test_no_tokenizer_at_all(tmp_path):
    paths = [saved(tmp_path / str(i), None, 10, i) for i in range(2)]
    assert "must have a tokenizer to be the result's" in refusal(recipe(*paths, tokenizer_source="union"), tmp_path)
    merge(recipe(*paths, tokenizer_source="base"), tmp_path / "out")


def test_a_broken_tokenizer(three, tmp_path):
    base, *_ = three
    copy = saved(tmp_path / "copy", bpe(WORDS, MERGES), 10, 4)
    for content in ("{}", "{", '{"model": {"vocab": {"a": -1}}}', '{"model": {"vocab": 7}}', '{"added_tokens": 3}'):
        (tmp_path / "copy/tokenizer.json").write_text(content)
        message = refusal(recipe(base, copy, tokenizer_source="union"), tmp_path)
        assert "tokenizer.json must hold" in message


# --- chat templates --------------------------------------------------------------------------------------------------

CHAT = [{"role": "user", "content": "Hi"}]


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        ("chatml", "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"),
        ("alpaca", "### Instruction:\nHi\n\n### Response:\n"),
        ("{% for m in messages %}{{ m.content }}!{% endfor %}", "Hi!"),
        ("auto", "two"),
        ("MODEL", "one"),
    ],
)
def test_chat_templates(tmp_path, template, expected):
    paths = [saved(tmp_path / str(i), bpe(WORDS, MERGES), 10, i) for i in range(4)]
    for path, text in zip(paths, (None, "one", "two", "two"), strict=True):
        if text:
            tokenizer = AutoTokenizer.from_pretrained(path)
            tokenizer.chat_template = text
            tokenizer.save_pretrained(path)
    merge(recipe(*paths, chat_template=template.replace("MODEL", paths[1])), tmp_path / "out")
    out = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert out.apply_chat_template(CHAT, tokenize=False, add_generation_prompt=True) == expected


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        (
            "llama3",
            "<s><|start_header_id|>system<|end_header_id|>\n\nS<|eot_id|><|start_header_id|>user<|end_header_id|>\n\n"
            "Hi<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n",
        ),
        ("mistral", "<s>[INST] S\n\nHi [/INST]"),
    ],
)
def test_templates_with_a_first_token(tmp_path, template, expected):
    paths = [saved(tmp_path / str(i), special(bpe(WORDS, MERGES), "<s>"), 11, i, bos_token="<s>") for i in range(2)]
    merge(recipe(*paths, chat_template=template), tmp_path / "out")
    out = AutoTokenizer.from_pretrained(tmp_path / "out")
    chat = [{"role": "system", "content": "S"}, *CHAT]
    assert out.apply_chat_template(chat, tokenize=False, add_generation_prompt=True) == expected


def test_a_model_without_a_template(three, tmp_path):
    base, more, _ = three
    message = refusal(recipe(base, more, tokenizer_source="union", chat_template=more), tmp_path)
    assert f"`chat_template` names {more}, which has no chat template" in message


def test_models_that_match_are_merged_without_transformers(tmp_path):
    """To import it takes longer than many merges."""
    paths = [saved(tmp_path / str(i), bpe(WORDS, MERGES), 10, i) for i in range(2)]
    (tmp_path / "recipe.json").write_text(json.dumps(recipe(*paths, tokenizer_source="base")))
    script = (
        "import json, sys; from hf_modular.merging import merge; "
        "merge(json.load(open(sys.argv[1])), sys.argv[2], progress=False); "
        "sys.exit('transformers' in sys.modules or 'tokenizers' in sys.modules)"
    )
    command = [sys.executable, "-W", "ignore", "-c", script, tmp_path / "recipe.json", tmp_path / "out"]
    subprocess.run(command, check=True)
