"""Encoding and batched scoring of options, against one forward pass per option."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from option_helpers import ROWS, bpe_tokenizer, exact_llama, sentencepiece_tokenizer

from peft_pretraining.finetune.options.encoding import SEPARATOR, OptionEncoder
from peft_pretraining.finetune.options.scoring import (
    classification_loss,
    collate_classification,
    collate_options,
    collate_right_options,
    option_scores,
    right_option_loss,
)
from peft_pretraining.finetune.options.tasks import TASKS
from peft_pretraining.flags import ConfigError
from peft_pretraining.models.loss import IGNORED


@pytest.fixture(scope="module", params=["bpe", "sentencepiece"])
def tokenizer(request):
    return {"bpe": bpe_tokenizer, "sentencepiece": sentencepiece_tokenizer}[request.param]()


@pytest.fixture(scope="module")
def bpe():
    return bpe_tokenizer()


@pytest.fixture(scope="module")
def model(bpe):
    return exact_llama(len(bpe), initializer_range=0.5)  # far from uniform predictions


def examples(*names):
    return [TASKS[name].example(row, number) for name in names for number, row in enumerate(ROWS[name])]


def log_likelihood(model, ids, count):
    """Mean log-likelihood of the last `count` tokens, by a forward pass of this one sequence without padding."""
    logits = model(input_ids=torch.tensor([list(ids)])).logits[0, :-1]
    every = F.log_softmax(logits, dim=-1)[range(len(ids) - 1), torch.tensor(ids[1:])]
    return every[-count:].mean()


@pytest.mark.parametrize("name", TASKS)
def test_option_tokens_spell_the_option(tokenizer, name):
    for example, encoded in zip(examples(name), OptionEncoder(tokenizer, 512)(examples(name)), strict=True):
        for choice, option in zip(example.choices, encoded.options, strict=True):
            scored = tokenizer.decode(option.ids[-option.count :]).replace("▁", "")
            assert scored.replace(" ", "") == choice.text.replace(" ", "")
            whole = tokenizer(choice.prompt + choice.text)["input_ids"]
            assert list(option.ids) == (whole[:-1] if whole[-1] == tokenizer.eos_token_id else whole)


def test_a_prompt_is_cut_from_the_left_by_the_same_for_all_options(bpe):
    (example,) = examples("Copa")[:1]
    whole = OptionEncoder(bpe, 512)([example])[0]
    limit = whole.length - 3
    cut = OptionEncoder(bpe, limit)([example])[0]
    longest = max(option.count for option in whole.options)
    for one, other in zip(whole.options, cut.options, strict=True):
        assert other.count == one.count
        assert other.ids == one.ids[3:]
    assert cut.length == limit
    with pytest.raises(ConfigError, match=f"row 1: an option of {longest} tokens leaves no room"):
        OptionEncoder(bpe, longest)([example])


def test_the_first_token_of_every_text_stays_when_a_prompt_is_cut():
    tokenizer = sentencepiece_tokenizer()
    cut = OptionEncoder(tokenizer, 8)(examples("SST2"))
    assert {option.ids[0] for example in cut for option in example.options} == {tokenizer.bos_token_id}
    assert {len(option.ids) for example in cut for option in example.options} <= {4, 5, 6, 7, 8}


def test_demonstrations_stand_before_the_prompt(bpe):
    shown, asked = examples("SST2")
    (encoded,) = OptionEncoder(bpe, 512)([asked], [shown, shown])
    text = f"a warm film It was great{SEPARATOR}a warm film It was great{SEPARATOR}dull and long It was great"
    assert bpe.decode(encoded.options[1].ids) == text
    (free,) = OptionEncoder(bpe, 512)([asked], [shown], icl_sfc=True)
    assert bpe.decode(free.content_free[1].ids) == f"a warm film It was great{SEPARATOR}It was great"


def test_batched_scores_equal_one_forward_pass_per_option(model, bpe):
    every = [example for name in TASKS for example in examples(name) if len(example.choices) == 2]
    encoded = OptionEncoder(bpe, 512)(every)
    with torch.no_grad():
        batch = collate_options(encoded)
        scores = option_scores(model, batch)
        single = torch.stack(
            [torch.stack([log_likelihood(model, o.ids, o.count) for o in one.options]) for one in encoded]
        )
    assert scores.dtype == torch.float64 and scores.shape == (len(every), 2)
    assert (scores - single).abs().max() < 1e-10
    assert single.std() > 0.1  # they do differ


def test_options_of_one_token_share_a_row(bpe):
    yes, no = (bpe(word)["input_ids"] for word in ("Yes", "No"))
    assert len(yes) == len(no) == 1
    batch = collate_options(OptionEncoder(bpe, 512)(examples("MultiRC")))
    assert batch["rows"].tolist() == [0, 0, 1, 1]
    assert batch["targets"].tolist() == [no, yes, no, yes]


def test_sfc_subtracts_the_same_tokens_after_the_content_free_prompt(model, bpe):
    encoded = OptionEncoder(bpe, 512)(examples("SST2", "BoolQ", "WinoGrande"), sfc=True)
    start = [bpe.eos_token_id]  # nothing stands before an empty prompt
    before = {"SST2": [bpe("It was")["input_ids"]] * 2, "BoolQ": [start] * 2}
    before["WinoGrande"] = [bpe("holes")["input_ids"], bpe("fields")["input_ids"]]
    with torch.no_grad():
        scores = option_scores(model, collate_options(encoded), calibrated=True)
        for index, name in ((0, "SST2"), (2, "BoolQ"), (4, "WinoGrande")):
            for option, free, score in zip(encoded[index].options, before[name], scores[index], strict=True):
                tokens = list(option.ids[-option.count :])
                expected = log_likelihood(model, option.ids, option.count)
                expected = expected - log_likelihood(model, [*free, *tokens], option.count)
                assert abs(score - expected) < 1e-10, name


def test_loss_of_the_right_options_tokens_only(model, bpe):
    encoded = OptionEncoder(bpe, 512)(examples("Copa"))
    batch = collate_right_options(encoded)
    right = [example.options[example.label] for example in encoded]
    kept = max(option.count for option in right)
    for targets, option in zip(batch["targets"].tolist(), right, strict=True):
        assert targets == [IGNORED] * (kept - option.count) + list(option.ids[-option.count :])
    loss, tokens = right_option_loss(model, batch)
    expected = [-log_likelihood(model, option.ids, option.count) * option.count for option in right]
    assert tokens == sum(option.count for option in right)
    assert loss.item() == pytest.approx(sum(expected).item(), abs=1e-10)
    # What Trainer weighs micro-batches by, whichever way it counts.
    assert (batch["labels"] != IGNORED).sum() == (batch["labels"][..., 1:] != IGNORED).sum() == tokens


def test_loss_of_the_whole_sequence(model, bpe):
    encoded = OptionEncoder(bpe, 512)(examples("SST2"))
    loss, tokens = right_option_loss(model, collate_right_options(encoded, only_option=False))
    right = [example.options[example.label].ids for example in encoded]
    expected = [-log_likelihood(model, ids, len(ids) - 1) * (len(ids) - 1) for ids in right]
    assert tokens == sum(len(ids) - 1 for ids in right)
    assert loss.item() == pytest.approx(sum(expected).item(), abs=1e-10)


def test_classification_loss_and_its_gradient_by_hand(model, bpe):
    encoded = OptionEncoder(bpe, 512)(examples("CB"))
    batch = collate_classification(encoded)
    loss, count = classification_loss(model, batch)
    expected = 0.0
    for example in encoded:
        means = torch.stack([log_likelihood(model, option.ids, option.count) for option in example.options])
        expected = expected - (means[example.label] - means.exp().sum().log())
    assert count == (batch["labels"] != IGNORED).sum() == len(encoded)
    assert loss.item() == pytest.approx(expected.item(), abs=1e-10)
    params = list(model.parameters())
    for one, other in zip(torch.autograd.grad(loss, params), torch.autograd.grad(expected, params), strict=True):
        assert torch.isfinite(one).all() and torch.allclose(one, other, rtol=1e-8, atol=1e-10)


def test_logits_are_computed_at_the_scored_positions_only(model, bpe):
    encoded = OptionEncoder(bpe, 512)(examples("MultiRC"))
    shapes = []
    hook = model.lm_head.register_forward_hook(lambda module, inputs, output: shapes.append(tuple(output.shape)))
    with torch.no_grad():
        option_scores(model, collate_options(encoded))
    hook.remove()
    assert shapes == [(2, 1, len(bpe))]


def test_order_of_options_does_not_change_their_scores(model, bpe):
    (example,) = examples("Copa")[:1]
    turned = replace(example, choices=example.choices[::-1], label=1)
    with torch.no_grad():
        one, other = option_scores(model, collate_options(OptionEncoder(bpe, 512)([example, turned])))
    assert torch.allclose(one, other.flip(0), atol=1e-12)


def test_labels_are_smoothed_as_torch_does(bpe, model):
    """Over the vocabulary, or over the options where they are the classes."""
    encoded = OptionEncoder(bpe, 512)(examples("SST2"))
    total, count = right_option_loss(model, collate_right_options(encoded), 0.2)
    right = [one.options[one.label] for one in encoded]
    losses = [
        F.cross_entropy(
            model(input_ids=torch.tensor([option.ids])).logits[0, :-1][-option.count :],
            torch.tensor(option.ids[-option.count :]),
            reduction="sum",
            label_smoothing=0.2,
        )
        for option in right
    ]
    torch.testing.assert_close(total, sum(losses))
    assert count == sum(option.count for option in right)
    assert not torch.allclose(total, right_option_loss(model, collate_right_options(encoded))[0])
    batch = collate_classification(encoded)
    expected = F.cross_entropy(option_scores(model, batch), batch["answers"], reduction="sum", label_smoothing=0.2)
    torch.testing.assert_close(classification_loss(model, batch, 0.2)[0], expected)
