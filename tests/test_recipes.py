"""Model JSONs, recipes, and the commands that `scripts/pretrain.sh` makes of them. See also test_slurm_script.py."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import write_blocks

PROJECT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(PROJECT / "scripts"))

import launch  # noqa: E402
import recipe  # noqa: E402

from peft_pretraining import methods  # noqa: E402
from peft_pretraining.config import ScheduleConfig, cli, legacy, schedule_problems  # noqa: E402  # noqa: E402
from peft_pretraining.flags import ConfigError, parse_command_line, parse_yaml  # noqa: E402
from peft_pretraining.models import model_config  # noqa: E402  # noqa: E402

SIZES = ("60m", "130m", "250m", "350m", "1b", "7b")
_RECIPES = sorted(path.stem for path in (PROJECT / "configs" / "recipes").glob("*.yaml"))
METHOD_NAMES = tuple(name for name in _RECIPES if name != "common")

SHAPES = {  # hidden, intermediate, heads, layers, vocabulary, positions, millions of parameters
    "9m": (128, 352, 4, 4, 32000, 1024, 9.0),
    "20m": (256, 688, 4, 4, 32100, 1024, 19.6),
    "35m": (384, 1024, 8, 6, 32100, 1024, 35.3),
    "40m": (416, 1024, 8, 8, 32100, 1024, 42.5),
    "60m": (512, 1376, 8, 8, 32000, 1024, 58.1),
    "71m": (512, 1368, 8, 12, 32100, 1024, 70.7),
    "100m": (640, 1708, 10, 12, 32100, 1024, 100.1),
    "130m": (768, 2048, 12, 12, 32100, 1024, 134.3),
    "250m": (768, 2560, 16, 24, 32100, 1024, 247.5),
    "350m": (1024, 2736, 16, 24, 32100, 1024, 368.2),
    "1b": (2048, 5461, 32, 24, 32100, 1024, 1339.5),
    "3b": (2560, 6848, 32, 32, 32100, 1024, 2686.3),
    "7b": (4096, 11008, 32, 32, 32100, 2048, 6739.2),
}


@pytest.mark.parametrize("name", SHAPES)
def test_model_json(name):
    hidden, intermediate, heads, layers, vocabulary, positions, millions = SHAPES[name]
    problems = []
    path = PROJECT / "configs" / f"llama_{name}.json"
    settings = model_config.read_model_json(str(path), "--model_config", problems)
    assert problems == []  # among others: heads divide the hidden size, no misspelt key
    assert settings == {
        **{"hidden_size": hidden, "intermediate_size": intermediate, "num_attention_heads": heads},
        **{"num_hidden_layers": layers, "vocab_size": vocabulary, "max_position_embeddings": positions},
        **{"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu", "rms_norm_eps": 1e-6},
        **{"initializer_range": 0.02, "tie_word_embeddings": False, "use_cache": True},
        **{"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": None},
    }
    assert model_config.parameter_count(settings) / 1e6 == pytest.approx(millions, abs=0.051)


def test_transformers_builds_every_model():
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    for name, (*_, millions) in SHAPES.items():
        config = LlamaConfig.from_json_file(PROJECT / "configs" / f"llama_{name}.json")
        with torch.device("meta"):
            model = LlamaForCausalLM(config)
        assert sum(weight.numel() for weight in model.parameters()) / 1e6 == pytest.approx(millions, abs=0.051), name
        assert model.get_input_embeddings().padding_idx is None  # -1 would freeze the vocabulary's last row


# Copied from the papers' settings: steps, warm-up, rank by size; what differs from it, by method and size.
SCHEDULE = {
    "60m": {"num_training_steps": 10_000, "warmup_steps": 1000, "rank": 128},
    "130m": {"num_training_steps": 20_000, "warmup_steps": 2000, "rank": 256},
    "350m": {"num_training_steps": 60_000, "warmup_steps": 6000, "rank": 256},
    "1b": {"num_training_steps": 100_000, "warmup_steps": 10_000, "rank": 512},
    "7b": {"num_training_steps": 150_000, "warmup_steps": 15_000, "rank": 1024},
}
COMMON = {"max_length": 256, "total_batch_size": 512, "scheduler": "cosine", "min_lr_ratio": 0.1}
GALORE = {"lr": 0.01, "scale": 0.25, "update_proj_gap": 200, "clip_grad_norm": 0}
GALORE_7B = {"lr": 0.005, "scale": 0.25, "update_proj_gap": 500, "clip_grad_norm": 1}
SWITCHLORA = {"switch_lora_interval": 40, "switch_lora_descent_rate": 0.1, "adam_warm_step": 5}
FOUR = ("60m", "130m", "350m", "1b")


def by_size(method, *sizes, **settings):
    """Cases with a setting's values at 60M, 130M, 350M, 1B, or at the sizes given."""
    columns = {name: value if isinstance(value, tuple) else (value,) * 4 for name, value in settings.items()}
    return [
        (method, size, {name: values[place] for name, values in columns.items()})
        for place, size in enumerate(sizes or FOUR)
    ]


STEPS = {size: SCHEDULE[size]["num_training_steps"] for size in FOUR}
PUBLISHED = [  # (method, size, settings)
    *by_size("full_rank", lr=(1e-3, 1e-3, 1e-3, 7e-4), weight_decay=0),
    *by_size("muon", lr=(0.01, 0.01, 0.004, 0.001), adam_lr=(1e-3, 1e-3, 1e-3, 6e-4), weight_decay=0.1),
    *by_size("muon", muon_scale="spectral", clip_grad_norm=1, num_training_steps=(10_000, 20_000, 60_000, 90_000)),
    *by_size("apollo", lr=0.01, rank=(128, 192, 256, 512), scale=1, update_proj_gap=200, clip_grad_norm=0),
    *by_size("apollo", weight_decay=0, num_training_steps=tuple(STEPS.values())),
    *by_size("apollo_mini", lr=0.02, rank=1, scale=128, update_proj_gap=200, clip_grad_norm=0),
    *by_size("scale", lr=(1e-3, 1e-3, 1e-3, 2e-4), adam_lr=(0.02, 0.02, 0.02, 1e-3), weight_decay=0, clip_grad_norm=0),
    *by_size("scale", matrix_momentum=0.9, num_training_steps=(11_000, 20_000, 60_000, 100_000)),
    *by_size("scale", "7b", lr=(1e-4,), adam_lr=(1e-3,)),
    *by_size("rmnp", lr=(0.005, 0.03, 0.005, 0.005), weight_decay=0.1, clip_grad_norm=1),
    *by_size("rmnp", num_training_steps=(10_000, 20_000, 60_000, 90_000)),
    *by_size("fira", lr=0.01, rank=(128, 256, 256, 512), scale=(0.25, 0.25, 0.25, 0.0625), update_proj_gap=200),
    *by_size("fira", weight_decay=0, clip_grad_norm=0),
    ("fira", "7b", {"lr": 0.005, "rank": 64, "update_proj_gap": 500, "scale": 0.0625, "clip_grad_norm": 1}),
    *by_size("stable_spam", "130m", lr=(8e-4,), update_proj_gap=1000, stable_spam_gamma1=(0.85,)),
    *by_size("stable_spam", "130m", stable_spam_gamma2=(0.99999,), clip_grad_norm=0),
    *by_size("racs", lr=0.02, scale=(0.05, 0.05, 0.05, 0.02), clip_grad_norm=0, weight_decay=0),
    *by_size("alice", lr=0.02, scale=(0.3, 0.3, 0.3, 0.25), alice_compensation=(0.4, 0.4, 0.4, 0.2)),
    *by_size("alice", rank=(128, 256, 256, 512), alice_leading=(40, 40, 40, 160), update_proj_gap=200),
    *by_size("alice", clip_grad_norm=0),
    *by_size("foam", lr=0.01, weight_decay=0, scale=0.25, foam_level=2, clip_grad_norm=1),
    ("ldadam", "350m", {"lr": 1e-3, "clip_grad_norm": 1}),
    ("frugal", "130m", {"lr": 1e-3, "frugal_space": "blocks", "frugal_density": 0.25, "update_proj_gap": 200}),
    ("soap", "350m", {"lr": 3e-3, "weight_decay": 0.01, "update_proj_gap": 10}),
    *[("galore", size, COMMON | SCHEDULE[size] | GALORE) for size in ("60m", "130m", "350m", "1b")],
    ("galore", "7b", COMMON | SCHEDULE["7b"] | GALORE_7B | {"optimizer": "galore_adamw8bit_per_layer"}),
    ("galore", "7b", {"single_gpu": "True", "activation_checkpointing": "True", "batch_size": 16}),
    *[
        ("online_subspace_descent", size, COMMON | SCHEDULE[size] | GALORE | {"proj_type": "continuous"})
        for size in ("60m", "130m", "350m", "1b")
    ],
    ("online_subspace_descent", "7b", GALORE_7B | {"proj_type": "continuous_adam8bit", "single_gpu": "True"}),
    ("golore", "60m", COMMON | {"lr": 0.001, "rank": 128, "update_proj_gap": 200, "scale": 1, "rand_ratio": 0.8}),
    ("switchlora", "350m", SWITCHLORA | {"lr": 0.02, "rank": 256, "max_length": 512, "total_batch_size": 1152}),
    ("switchlora", "350m", {"num_training_steps": 40_000, "warmup_steps": 100, "min_lr_ratio": 0}),
    ("switchlora", "250m", SWITCHLORA | {"lr": 0.01, "rank": 128, "scheduler": "cosine_with_min_lr"}),
    ("relora", "250m", {"lr": 0.001, "relora": 5000, "scheduler": "cosine_restarts", "restart_warmup_steps": 100}),
    ("relora", "250m", {"batch_size": 24, "total_batch_size": 1152, "max_length": 512, "warmup_steps": 500}),
]


def same(given: str, expected: object) -> bool:
    return given == expected if isinstance(expected, str) else float(given) == expected


@pytest.mark.parametrize(("method", "size", "expected"), PUBLISHED)
def test_recipe_has_the_published_numbers(method, size, expected):
    settings = recipe.settings(size, method, world_size=1)
    wrong = {name: settings.get(name) for name, value in expected.items() if not same(settings.get(name, "nan"), value)}
    assert wrong == {}


def test_adam_mini_has_adamws_settings():
    for size in SIZES:
        assert recipe.settings(size, "adam_mini", 1) == {
            **recipe.settings(size, "full_rank", 1),
            "clip_grad_norm": "1.0",
        }


def test_a_size_without_published_rates_is_said(capsys):
    """Every file lists what is published, and says in a comment what the other sizes have."""
    for method in METHOD_NAMES:
        file, text = recipe._read(method), (recipe.RECIPES / f"{method}.yaml").read_text()
        assert set(file["published"]) <= set(SIZES)
        assert text.startswith("#") and (set(file["published"]) == {*SIZES} or len(text.split("#")) > 1)
    for arguments, notes in (("60m scale", 0), ("250m scale", 1), ("60m soap", 1), ("130m stable_spam", 0)):
        assert launch.main([*arguments.split(), "--dry_run"]) == 0
        said = capsys.readouterr().err
        assert said.count("note: no rates of") == notes == said.count("\n")


def test_every_size_and_method_is_known():
    assert recipe.known_sizes() == SIZES
    assert recipe.known_methods() == METHOD_NAMES
    assert set(methods.METHODS) - {"golore_adapter"} == set(METHOD_NAMES), "a method without a recipe, or the reverse"


def flags_of(command: list[str]) -> dict[str, str]:
    """Every flag after torchrun_main.py: all of them take one value."""
    words = command[command.index(str(recipe.TRAINER)) + 1 :]
    assert all(name.startswith("--") for name in words[::2])
    return dict(zip((name[2:] for name in words[::2]), words[1::2], strict=True))


@pytest.mark.parametrize("processes", [1, 2, 4, 8])
@pytest.mark.parametrize("method", METHOD_NAMES)
@pytest.mark.parametrize("size", SIZES)
def test_recipe_is_consistent(size, method, processes):
    command = recipe.command(size, method, recipe.Devices(processes))
    assert command[1:4] == ["--standalone", "--nproc_per_node", str(processes)]
    flags = flags_of(command)

    problems = []
    words = command[command.index(str(recipe.TRAINER)) + 1 :]
    given = parse_command_line(cli.all_flags(), words, prog="", description="", problems=problems)
    assert problems == []  # every flag exists, every value converts
    chosen = legacy.choose(given, problems)
    assert problems == []  # the selectors agree with each other
    assert chosen.method == method
    assert {name: flags[name] for name in ("method", "save_dir", "autoresume")} == {
        "method": method,
        "save_dir": f"checkpoints/llama_{size}_{method}",
        "autoresume": "True",
    }
    assert Path(flags["model_config"]) == PROJECT / "configs" / f"llama_{size}.json"

    value = {name: item.value for name, item in given.items()}
    assert value["total_batch_size"] % (value["batch_size"] * processes) == 0
    schedule = ScheduleConfig(**{name: value[name] for name in vars(ScheduleConfig()) if name in value})
    assert schedule_problems(schedule, schedule.num_training_steps) == []
    assert 0 < value["lr"] <= 0.03
    if value["max_length"] == 256:  # the common protocol
        assert schedule.warmup_steps * 10 == schedule.num_training_steps
    if "rank" in value:
        assert value["rank"] < SHAPES[size][0]
    assert value.get("relora") == value.get("cycle_length")
    assert ("single_gpu" in value) == (size == "7b" and processes == 1 and "proj_type" in value)


@pytest.fixture(scope="module")
def blocks(tmp_path_factory):
    """Sequence length -> a data folder that models of every size can be trained on."""
    folder = tmp_path_factory.mktemp("blocks")
    lengths = (256, 512)
    return {length: write_blocks(folder / str(length), train=8, validation=2, block=length) for length in lengths}


@pytest.mark.parametrize("method", METHOD_NAMES)
def test_every_size_can_be_run_as_it_stands(method, blocks):
    """No flag is refused, and none is without effect."""
    for size in SIZES:
        words = recipe.command(size, method, recipe.Devices(8))
        words = words[words.index(str(recipe.TRAINER)) + 1 :]
        data = blocks[int(words[words.index("--max_length") + 1])]
        launched = cli.load([*words, "--dataset_path", str(data)], {"WORLD_SIZE": "8"})
        assert launched.config.method.method == method
        assert not launched.warnings, (size, launched.warnings)


def test_batch_size_per_device():
    assert recipe.largest_batch_size(512, limit=256, world_size=1) == 256
    assert recipe.largest_batch_size(512, limit=256, world_size=8) == 64  # a device's share
    assert recipe.largest_batch_size(1152, limit=128, world_size=8) == 72  # the share of 144 in two micro-batches


def test_batch_size_follows_what_the_user_gives():
    def batch_size(*overrides, processes=1):
        return flags_of(recipe.command("60m", "galore", recipe.Devices(processes), overrides)).get("batch_size")

    assert batch_size("--total_batch_size", "384") == "192"
    assert batch_size("--batch_size", "32") == "32"
    assert batch_size("--gradient_accumulation", "4") is None  # torchrun_main.py derives it
    assert batch_size("--total_batch_size", "many") == "256"  # torchrun_main.py refuses it
    with pytest.raises(ConfigError, match=r"512 cannot be divided over 3 processes"):
        batch_size(processes=3)


def test_training_config_of_the_1b_relora_run():
    path = PROJECT / "training_configs" / "llama_1b_relora.yaml"
    problems = []
    given = parse_yaml(cli.all_flags(), str(path), problems)
    assert problems == []
    value = {name: item.value for name, item in given.items()}
    assert (value["relora"], value["cycle_length"]) == (1000, 1000)
    assert float(value["optimizer_magnitude_pruning"]) == 0.8
    assert value["model_config"] == "configs/llama_1b.json"
    assert "reset_optimizer_on_relora" not in value  # beside a pruning, True would be an error
    schedule = ScheduleConfig(**{name: value[name] for name in vars(ScheduleConfig()) if name in value})
    assert schedule.scheduler == "cosine_restarts"
    assert schedule_problems(schedule, schedule.num_training_steps) == []
    assert value["total_batch_size"] % (value["batch_size"] * 8) == 0


def pretrain(*arguments: str, cwd: Path) -> subprocess.CompletedProcess:
    """scripts/pretrain.sh from another folder, with this Python on PATH in case there is no .venv."""
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    script = [str(PROJECT / "scripts" / "pretrain.sh"), *arguments]
    return subprocess.run(script, cwd=cwd, env=environment, capture_output=True, text=True)


def test_dry_run_from_another_folder_and_overrides_win(tmp_path):
    done = pretrain("60M", "galore", "--lr", "0.02", "--dry_run", "--nproc=2", "--with_tracking", cwd=tmp_path)
    assert (done.returncode, done.stdout.count("\n")) == (0, 1)
    assert done.stderr == (  # 8 x (4 (128·512 + 2·128·512) + 3 (128·512 + 2·128·1376))
        "optimizer state of an m x n matrix, m <= n with AdamW: mr + 2nr, r = 128; of the 56 matrices of the decoder "
        "16,318,464 elements, 65.3 MB in float32\n"
    )
    words = shlex.split(done.stdout)
    assert Path(words[0]).name == "torchrun"
    assert words[1:5] == ["--standalone", "--nproc_per_node", "2", str(PROJECT / "torchrun_main.py")]
    assert words[-3:] == ["--lr", "0.02", "--with_tracking"]
    assert words.count("--lr") == 1
    assert list(tmp_path.iterdir()) == []


def test_several_nodes_meet_at_the_endpoint(capsys):
    assert launch.main("350m galore --dry_run --nproc 8 --nnodes 2".split()) == 2
    assert capsys.readouterr().err == "error: --nnodes 2 needs --rdzv_endpoint HOST:PORT, the same on every node\n"
    assert launch.main("350m galore --dry_run --nproc 8 --nnodes 2 --rdzv_endpoint head:29500".split()) == 0
    words = shlex.split(capsys.readouterr().out)
    nodes = "--nnodes 2 --nproc_per_node 8 --rdzv_backend c10d --rdzv_endpoint head:29500"
    assert words[1 : words.index(str(recipe.TRAINER))] == nodes.split()
    assert flags_of(words)["batch_size"] == "32"  # 512 over 16 devices


def test_default_number_of_processes(monkeypatch, capsys):
    for visible, expected in (("0,1,2", 3), ("", 0), ("-1", 0)):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
        assert launch.visible_gpus() == expected
    assert launch.main(["60m", "galore", "--dry_run"]) == 0
    assert "--nproc_per_node 1 " in capsys.readouterr().out


def test_what_cannot_be_launched_is_refused(monkeypatch, capsys, tmp_path):
    done = pretrain("61m", "gallore", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.splitlines() == [
        f"error: unknown size '61m'; there is {', '.join(SIZES)}",
        f"error: unknown method 'gallore'; there is {', '.join(METHOD_NAMES)}",
    ]
    monkeypatch.setattr(recipe, "METHODS", {"full_rank": None})
    for arguments, message in (
        ("60m relora --dry_run", "method relora is not built yet; there is full_rank"),
        ("60m full_rank --nproc 0", "--nproc must be a positive integer, got '0'"),
        ("60m full_rank --training_config x.yaml", "--training_config would lose to the recipe's flags"),
    ):
        assert launch.main(arguments.split()) == 2
        assert capsys.readouterr().err.startswith(f"error: {message}")
