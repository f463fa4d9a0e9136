"""Documents of one block are computed as if each stood alone: logits, gradients, and whole runs."""

from __future__ import annotations

import json

import helpers
import pytest
import torch
from conftest import write_blocks, write_model
from launching import launch
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface

from peft_pretraining.config import Config, ModelConfig, cli, recorded
from peft_pretraining.distributed import ProcessGroup
from peft_pretraining.flags import ConfigError
from peft_pretraining.methods import load_method
from peft_pretraining.models import compiled, loss
from peft_pretraining.models.compiled import compile_layers
from peft_pretraining.models.compute_dtype import compute_in
from peft_pretraining.models.document_mask import document_positions
from peft_pretraining.models.llama import build_model
from peft_pretraining.models.loss import IGNORED, model_inputs, token_loss_sum
from peft_pretraining.report.footprint.drive import Simulation
from peft_pretraining.training.build_data import BlockData, documents_apart, open_data
from peft_pretraining.training.build_model import distributed_model

CPU, END = torch.device("cpu"), 1
SHAPE = {"hidden_size": 16, "intermediate_size": 28, "num_hidden_layers": 2, "num_attention_heads": 4,
         "vocab_size": 33, "max_position_embeddings": 64}  # fmt: skip
GROUPED = {**SHAPE, "num_key_value_heads": 2, "head_dim": 8, "tie_word_embeddings": True, "rope_theta": 500_000.0}
LLAMA3 = {"rope_type": "llama3", "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 16}  # fmt: skip
SHAPES = {
    "plain": SHAPE,
    "llama3": {**GROUPED, "rope_scaling": LLAMA3},
    "linear": {**GROUPED, "rope_scaling": {"type": "linear", "factor": 2.0}},
    "dynamic": {**GROUPED, "rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 500_000.0}},
    "yarn": {**GROUPED, "rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}},
}
ROWS = [[5, 9, 2, END, 7, 7, 8, 3, 4, END, END, 12], [20, 21, 22, 23, 24, 25, 26, 27, 28, 29, 30, END]]
"""Three documents and the beginning of a fourth, one of them empty; and one that fills its row."""
DOCUMENTS = [[5, 9, 2, END], [7, 7, 8, 3, 4, END], [END], [12], ROWS[1]]


def llama(shape, **settings):
    model = build_model(ModelConfig(dtype="float64", **settings), shape, None, CPU, seed=1)
    compute_in(model, torch.float64)  # transformers' own norms are in float32
    return model


def packed(rows=ROWS):
    return documents_apart({"input_ids": torch.tensor(rows)}, END)


def logits_and_gradients(model, batches, cotangents):
    """Logits of all tokens in their order, and gradients of their product with `cotangents` (tokens, vocabulary)."""
    found = [model(**model_inputs(model, batch), use_cache=False).logits.flatten(0, 1) for batch in batches]
    logits = torch.cat(found)
    params = [param for param in model.parameters() if param.requires_grad]
    return logits.detach(), torch.autograd.grad((logits * cotangents).sum(), params, allow_unused=True)


def assert_alone_and_packed_agree(alone, together, atol=1e-10):
    tokens = sum(map(len, DOCUMENTS))
    cotangents = torch.randn(tokens, SHAPE["vocab_size"], dtype=torch.float64, generator=torch.manual_seed(0))
    expected = logits_and_gradients(alone, [{"input_ids": torch.tensor([each])} for each in DOCUMENTS], cotangents)
    found = logits_and_gradients(together, [packed()], cotangents)
    torch.testing.assert_close(found, expected, rtol=0, atol=atol)


def test_positions_begin_anew_behind_each_end():
    positions = document_positions(torch.tensor(ROWS), END)
    assert positions.tolist() == [[0, 1, 2, 3, 0, 1, 2, 3, 4, 5, 0, 0], list(range(12))]
    assert "position_ids" not in documents_apart({"input_ids": torch.tensor(ROWS)}, None)


@pytest.mark.parametrize("name", SHAPES)
def test_a_packed_block_is_its_documents_alone(name):
    model = llama(SHAPES[name])
    assert_alone_and_packed_agree(model, model)
    block, alone = (model(torch.tensor([each])).logits[0] for each in (ROWS[0], DOCUMENTS[1]))
    assert not torch.allclose(block[4:10], alone, atol=1e-6), "without the mask it is the same: nothing is tested"


@pytest.mark.parametrize("name", ["plain", "llama3"])
def test_a_mask_does_the_same_as_documents_one_by_one(name, monkeypatch):
    """As on other devices than the CPU."""
    model = llama(SHAPES[name])
    monkeypatch.setattr(loss, "compilation_of", lambda model: "as if it were compiled")
    assert model_inputs(model, packed())["attention_mask"].shape == (2, 1, 12, 12)
    assert_alone_and_packed_agree(model, model)


@pytest.mark.parametrize(
    ("settings", "atol"),
    [({"attn_implementation": "eager"}, 1e-6), ({"activation_checkpointing": True}, 1e-10)],  # eager's softmax: float32
)
def test_other_attention_and_recomputed_layers_know_documents_too(settings, atol):
    model = llama(SHAPES["llama3"], **settings)
    assert_alone_and_packed_agree(model, model, atol)


def _by_documents(
    module, query, key, value, mask, cu_seq_lens_q, cu_seq_lens_k, max_length_q, max_length_k, **settings
):
    """What flash attention's kernel for sequences of several lengths computes, (1, heads, tokens, d)."""
    assert mask is None and query.shape[0] == 1 and cu_seq_lens_q.dtype == torch.int32
    assert cu_seq_lens_q.tolist() == cu_seq_lens_k.tolist() == [0, 4, 10, 11, 12, 24] and max_length_q == max_length_k
    assert max_length_q == 12
    parts = zip(*(each.split(cu_seq_lens_q.diff().tolist(), dim=2) for each in (query, key, value)), strict=True)
    causal = {"is_causal": True, "enable_gqa": True, "scale": settings["scaling"]}
    out = torch.cat([scaled_dot_product_attention(*part, **causal) for part in parts], 2)
    return out.transpose(1, 2), None


def test_flash_attention_is_told_where_documents_end():
    AttentionInterface.register("flash_attention_by_documents", _by_documents)
    model = llama(SHAPES["llama3"])
    together = llama(SHAPES["llama3"])
    together.config._attn_implementation = "flash_attention_by_documents"
    assert_alone_and_packed_agree(model, together)
    torch.testing.assert_close(token_loss_sum(together, packed()), token_loss_sum(model, packed()))


@pytest.mark.parametrize("fused", [False, True])
def test_the_loss_is_that_of_all_tokens_the_first_of_a_document_included(fused):
    model = llama(SHAPES["plain"])
    model.fused_loss = fused
    whole = token_loss_sum(model, packed())
    parts = [token_loss_sum(model, {"input_ids": torch.tensor([each])}) for each in DOCUMENTS if len(each) > 1]
    ends = [
        (DOCUMENTS[0], 7),
        (DOCUMENTS[1], END),
        (DOCUMENTS[2], 12),
    ]  # an end, and what the next document begins with
    for ids, following in ends:
        labels = torch.full((1, len(ids) + 1), IGNORED)
        labels[0, -1] = following
        parts.append(token_loss_sum(model, {"input_ids": torch.tensor([[*ids, 0]]), "labels": labels}))
    torch.testing.assert_close(whole, sum(parts), rtol=0, atol=1e-10)


@pytest.mark.parametrize(("method", "settings"), [("galore", {"rank": 4}), ("lora", {"rank": 4, "lora_alpha": 8})])
def test_methods_see_the_gradients_of_documents_alone(method, settings, one_process):
    """As they are trained: with factors, and with gradients that are projected in the backward pass."""
    models = []
    for _ in range(2):
        config = Config.from_settings({"method": method, "dtype": "float64", **settings})
        models.append(distributed_model(config, SHAPES["llama3"], load_method(method)(config), one_process))
        for name, param in models[-1].named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(param, generator=torch.manual_seed(2))
    assert_alone_and_packed_agree(*models)


@pytest.fixture
def one_process():
    return ProcessGroup(0, 1, 0, 1, CPU)


def test_compiled_layers_are_compiled_once_for_all_blocks(monkeypatch):
    monkeypatch.setattr(compiled, "BACKEND", "aot_eager")
    monkeypatch.setattr(compiled, "_LATER", "fail_on_recompile")
    eager, model = (llama(SHAPES["llama3"]) for _ in range(2))
    compilation = compile_layers(model)
    for rows in (ROWS, [ROWS[0][::-1], ROWS[1]], [ROWS[1], [END] * 12]):
        losses = [token_loss_sum(each, packed(rows)) for each in (model, eager)]
        torch.testing.assert_close(*losses, rtol=1e-12, atol=1e-12)
        losses[0].backward()
    assert compilation.compilations == 1 and not compilation.failed


# Runs.


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("documents")
    data = write_blocks(folder / "data", train=32, validation=6, block=16, vocabulary=32, eos_token_id=END)
    model = write_model(folder / "llama.json", **{**SHAPES["llama3"], "rms_norm_eps": 1e-6})
    return {"model_config": model, "dataset_path": data, "folder": folder}


def command(inputs, save_dir, *more, **changes):
    settings = {
        **{"model_config": inputs["model_config"], "dataset_path": inputs["dataset_path"], "save_dir": save_dir},
        **{"batch_size": 2, "gradient_accumulation": 2, "num_training_steps": 6, "warmup_steps": 1, "lr": 0.01},
        **{"eval_every": 3, "save_every": 6, "workers": 0, "dtype": "float64", "document_mask": "True", **changes},
    }
    return [*(part for name, value in settings.items() for part in (f"--{name}", str(value))), *map(str, more)]


@pytest.mark.parametrize("method", ["galore", "lora"])
def test_a_run_stops_and_goes_on_with_its_mask(inputs, tmp_path, method):
    settings = {"method": method, "rank": 4}
    assert helpers.run(command(inputs, tmp_path / "whole", **settings)) == 0
    helpers.stop_after(4, command(inputs, tmp_path / "stopped", **settings))
    again = command(inputs, tmp_path / "stopped", "--autoresume", "True", **settings)
    at = again.index("--document_mask")
    assert helpers.run(again[:at] + again[at + 2 :]) == 0  # not named: the run keeps it
    helpers.assert_same_run(tmp_path / "stopped", tmp_path / "whole")
    assert "document_mask: true" in (tmp_path / "stopped" / "config.yaml").read_text()
    without = tmp_path / "without"
    assert helpers.run(command(inputs, without, **{**settings, "document_mask": "False"})) == 0
    assert helpers.updates(without) != helpers.updates(tmp_path / "whole")
    assert helpers.evaluations(without)[0] != helpers.evaluations(tmp_path / "whole")[0]


@pytest.mark.slow
def test_two_devices_are_one(inputs, tmp_path):
    """DDP and FSDP2, one sample each per micro-batch."""
    settings = {"gradient_accumulation": 1, "batch_size": 4, "method": "galore", "rank": 4}
    assert helpers.run(command(inputs, tmp_path / "one", **settings)) == 0
    layouts = {kind: command(inputs, tmp_path / kind, **{**settings, "batch_size": 2, "distributed_type": kind})
               for kind in ("ddp", "fsdp")}  # fmt: skip
    launch(tmp_path / "launched", 2, [{"argv": words} for words in layouts.values()])
    for kind in layouts:
        found, expected = (helpers.updates(tmp_path / name) for name in (kind, "one"))
        for one, other in zip(found, expected, strict=True):
            assert one == pytest.approx(other, rel=1e-9)
        assert helpers.evaluations(tmp_path / kind)[-1][1] == pytest.approx(
            helpers.evaluations(tmp_path / "one")[-1][1], rel=1e-9
        )


def test_a_run_does_not_go_on_with_another_mask(inputs, tmp_path, capsys):
    assert helpers.run(command(inputs, tmp_path, num_training_steps=1)) == 0
    changed = command(inputs, tmp_path, "--autoresume", "True", num_training_steps=2, document_mask="False")
    assert helpers.run(changed) == 2
    assert "it was begun with document_mask True instead of False" in capsys.readouterr().err
    old = Config.from_settings({"save_dir": str(tmp_path), "autoresume": True})
    assert recorded.keep(old, ()).data.document_mask
    assert not recorded.keep(old, {"document_mask"}).data.document_mask


def test_evaluations_keep_documents_apart(inputs, one_process):
    sets = {"eval_datasets": f"same={inputs['dataset_path']}"}
    launch = cli.load(command(inputs, inputs["folder"] / "none", batch_size=6, **sets), environ={})
    data = open_data(launch, one_process)
    assert isinstance(data, BlockData)
    own, same = data.evaluation_sets
    (batch,) = own.batches
    assert torch.equal(batch["position_ids"], document_positions(batch["input_ids"], END))
    (named,) = same.batches
    assert torch.equal(named["position_ids"], batch["position_ids"])
    training = next(data.training(0, {}))
    assert torch.equal(training["position_ids"], document_positions(training["input_ids"], END))
    assert (training["position_ids"][:, 1:] == 0).any(), "no block has two documents: nothing is tested"


def test_a_mixture_keeps_its_documents_apart(inputs, tmp_path, one_process):
    other = write_blocks(tmp_path / "other", train=8, validation=4, block=16, vocabulary=32, eos_token_id=END)
    mixed = {"dataset_path": f"{inputs['dataset_path']}:0.5,{other}:0.5"}
    data = open_data(cli.load(command(inputs, tmp_path / "run", **mixed), environ={}), one_process)
    for batch in (next(data.training(0, {})), *(next(iter(each.batches)) for each in data.evaluation_sets)):
        assert torch.equal(batch["position_ids"], document_positions(batch["input_ids"], END))
    assert [each.share for each in data.evaluation_sets] == [0.5, 0.5]


def test_what_cannot_be_kept_apart_is_refused(inputs, tmp_path):
    unknown = write_blocks(tmp_path / "unknown", train=4, validation=2, block=16, vocabulary=32)
    with pytest.raises(ConfigError) as error:
        cli.load(command(inputs, tmp_path / "run", dataset_path=unknown), environ={})
    assert error.value.problems == [
        f"--document_mask: --dataset_path {unknown} does not say what documents end with "
        "(args.json has no eos_token_id)"
    ]
    with pytest.raises(ConfigError, match=f"news={unknown}: it does not say what documents end with"):
        cli.load(command(inputs, tmp_path / "run", eval_datasets=f"news={unknown}"), environ={})
    longrope = {"rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [2.0] * 4}
    scaled = {**GROUPED, "rope_scaling": {**longrope, "original_max_position_embeddings": 16}}
    with pytest.raises(ConfigError, match="--document_mask: the rope_type longrope"):
        model = write_model(tmp_path / "long.json", **scaled)
        cli.load(command(inputs, tmp_path / "run", model_config=model), environ={})


def test_streamed_documents_are_apart_anyway(inputs, tmp_path):
    shard = {"text": "a few words"}
    for name in ("train", "validation"):
        (tmp_path / f"c4-{name}.00000-of-00001.json").write_text(json.dumps(shard) + "\n")
    words = command(inputs, tmp_path / "run", base_dir=tmp_path, max_length=16)
    at = words.index("--dataset_path")
    launch = cli.load([*words[:at], *words[at + 2 :]], environ={})
    assert [line for line in launch.warnings if "--document_mask" in line] == [
        "without effect with streamed documents, each of which has a sequence of its own: --document_mask"
    ]


def test_a_plan_counts_the_mask():
    peaks = []
    for mask in (False, True):
        config = Config.from_settings({"batch_size": 8, "total_batch_size": 8, "max_length": 64, "document_mask": mask})
        with Simulation(config, SHAPE) as simulation:
            peaks.append(simulation.update(1).peak)
    assert peaks[1] >= peaks[0] + 8 * 64 * 64
