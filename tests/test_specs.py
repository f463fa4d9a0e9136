"""What methods and update rules say about themselves, and that nothing else knows them by name."""

from __future__ import annotations

import dataclasses
import importlib
import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import helpers
import pytest

from peft_pretraining.config import Config, cli, config_flags
from peft_pretraining.flags import ConfigError, MethodSettings, MethodSpec, number, setting, string
from peft_pretraining.methods import METHODS, load_method, registry
from peft_pretraining.methods.base import TrainingMethod
from peft_pretraining.optim.rule_settings import RULES
from peft_pretraining.optim.rules.update_rules import UPDATE_RULES
from scripts import generate_docs

PACKAGE = Path(registry.__file__).parents[1]


def fields(settings):
    return {item.name: item for item in dataclasses.fields(settings)}


def test_nothing_outside_knows_a_method_by_name():
    settings = {flag.name for flag in config_flags()}  # which may have a method's name
    names, both = ("|".join(sorted(found)) for found in (set(METHODS) - settings, set(METHODS) & settings))
    methods = rf"""["']({names})["']|(==|in|METHODS\[|load_method\() ?["']({both})["']"""
    quoted = re.compile(rf"""{methods}|startswith\(["']continuous""")
    found = [
        f"{path.relative_to(PACKAGE)}: {line.strip()}"
        for path in sorted(PACKAGE.rglob("*.py"))
        if "methods" not in path.parts and path != PACKAGE / "config" / "legacy.py"
        for line in path.read_text().splitlines()
        if quoted.search(line)
    ]
    assert found == [
        # The method of a run that names none.
        'flags/spec.py: method: str = setting("full_rank", string, "training method")',
    ]


def test_the_table_of_lines_outside_a_methods_folder_is_that_of_the_imports():
    """And what is listed there is read by several methods: nothing outside is one method's own."""
    page = (PACKAGE.parent / "docs" / "methods" / "index.md").read_text().partition("## Lines outside")[2]
    rows = re.findall(r"^\| `([\w/.]+)` \| ([a-z_, ]+) \|", page, re.MULTILINE)
    folders = {path.parent.name: path.parent for path in PACKAGE.glob("methods/[!_]*/settings.py")}
    code = {name: "\n".join(path.read_text() for path in folder.glob("*.py")) for name, folder in folders.items()}
    found = {}
    for file, _ in rows:
        assert (PACKAGE / file).exists(), file
        module = re.escape(file.removesuffix(".py").replace("/", "."))
        name = rf"\b{module}\b" + (r"|\bMatrixOptimizer\b" if file == "optim/matrix_optimizer.py" else "")
        found[file] = sorted(method for method, text in code.items() if re.search(name, text))
    assert {file: readers.split(", ") for file, readers in rows} == found
    assert len(rows) == 7 and all(len(readers) > 1 for readers in found.values())


def two_meanings(specs):
    """One line for each flag that means two things, of methods or update rules."""
    meanings, found = {}, []
    for spec in specs:
        for name, item in fields(spec.settings).items():
            said = (item.metadata["help"], item.metadata["aliases"], item.metadata["convert"], item.default)
            first, owner = meanings.setdefault(name, (said, spec.name))
            if first != said:
                found.append(f"--{name}: two meanings, in {owner} and {spec.name}")
    return found


def test_a_setting_means_the_same_in_every_method_and_rule():
    assert two_meanings((*METHODS.values(), *RULES.values())) == []


def test_a_setting_with_the_name_of_a_rules_flag_is_seen():
    @dataclasses.dataclass(frozen=True)
    class Settings(MethodSettings):
        momentum: float = setting(0.5, number, "another meaning")

    new = MethodSpec(name="new", title="New", summary="a test", settings=Settings)
    assert two_meanings((new, *RULES.values())) == ["--momentum: two meanings, in new and sgd"]


@pytest.mark.parametrize("spec", METHODS.values(), ids=list(METHODS))
def test_a_spec_names_what_there_is(spec):
    known = {flag.name for flag in config_flags()}
    conditions = [name for item in spec.conditions for name in item.names]
    for part, names in {
        **{part: getattr(spec, part) for part in ("defaults", "tiny", "refused", "reads", "meanings")},
        "conditions": conditions,
    }.items():
        assert not (unknown := sorted(set(names) - known)), f"{spec.name}: {part} names no settings: {unknown}"
    for part in ("values", "identity"):
        assert not (others := sorted(set(getattr(spec, part)) - set(spec.own))), f"{part} names {others}, not its own"
    assert not set(spec.refused) & set(spec.own), "its own settings are checked, not refused"
    assert spec.update_rules and set(spec.update_rules) <= set(RULES)
    assert spec.allows.per_layer == ("per_layer" in spec.own)
    assert spec.allows.quantized_weights == ("quantize" in spec.own)
    assert issubclass(load_method(spec.name), TrainingMethod)
    for name, value in (*spec.defaults.items(), *spec.tiny.items()):
        flag = next(flag for flag in config_flags() if flag.name == name)
        assert flag.convert(str(value)) == value
    assert Config.from_settings({"method": spec.name, **spec.defaults}).method.method == spec.name


def test_every_update_rule_has_a_formula():
    assert set(RULES) - {"adam_zero"} <= set(UPDATE_RULES)


def test_the_documentation_says_what_the_specs_say():
    assert generate_docs.main(["--check"]) == 0, "run: python scripts/generate_docs.py"


def test_what_is_generated_is_all_that_changes(tmp_path):
    page = f"# Title\n{generate_docs.BEGIN}\nold\n{generate_docs.END}\nby hand\n"
    changed = generate_docs.with_generated(page, "new")
    assert changed == page.replace("old", "new")
    with pytest.raises(ValueError, match="needs the lines"):
        generate_docs.with_generated("# Title\n", "new")


@pytest.mark.parametrize("name", METHODS)
def test_help_of_one_method(name, capsys):
    with pytest.raises(SystemExit) as end:
        cli.load(["--help", name])
    assert end.value.code == 0
    shown = " ".join(capsys.readouterr().out.split())
    spec = METHODS[name]
    assert f"{spec.title}: {spec.summary}" in shown
    assert all(f"--{setting} " in shown for setting in spec.own)
    others = {item for other in METHODS.values() for item in other.own} - set(spec.own) - set(spec.defaults)
    assert not any(f" --{setting} [VALUE]" in shown for setting in others)


def test_help_shows_groups_and_defaults(capsys):
    with pytest.raises(SystemExit):
        cli.load(["--help"])
    shown = " ".join(capsys.readouterr().out.split())
    for title in ("model:", "data:", "learning-rate schedule:", "method: golore, golore_adapter:"):
        assert title in shown
    assert "updates between two evaluations (default: 1000)" in shown


# Plug-ins.


class Point:
    """An entry point, as `importlib.metadata` has it."""

    def __init__(self, name, value):
        self.name, self.value = name, value

    def __lt__(self, other):
        return self.name < other.name


@pytest.fixture
def with_plugins(tmp_path, monkeypatch):
    """Installs modules `plugin_NAME.settings`, each with the text given for it."""

    def install(**texts):
        for name, text in texts.items():
            (tmp_path / f"plugin_{name}").mkdir()
            (tmp_path / f"plugin_{name}" / "__init__.py").touch()
            (tmp_path / f"plugin_{name}" / "settings.py").write_text(text)
        points = [Point(name, f"plugin_{name}.settings") for name in texts]
        monkeypatch.setattr(metadata, "entry_points", lambda group: points if group == registry.GROUP else [])
        monkeypatch.syspath_prepend(tmp_path)
        METHODS.forget()
        return METHODS

    yield install
    monkeypatch.undo()
    METHODS.forget()
    for name in [name for name in sys.modules if name.startswith("plugin_")]:
        del sys.modules[name]


SPEC = """
from dataclasses import dataclass
from peft_pretraining.flags import *
@dataclass(frozen=True)
class Settings(MethodSettings):
    {setting}: int = setting(3, positive_int, "{help}")
SPEC = MethodSpec(name="{name}", title="Plug-in", summary="a test", settings=Settings)
"""


def test_a_plugin_is_a_method_among_others(with_plugins, command):
    methods = with_plugins(mine=SPEC.format(setting="my_setting", help="what it is", name="mine"))
    assert list(methods)[-1] == "mine" and methods.module_of("mine") == "plugin_mine.method"
    config = cli.load([*command(), "--method", "mine", "--my_setting", "5"], environ={}).config
    assert config.method.my_setting == 5
    warnings = cli.load([*command(), "--my_setting", "5"], environ={}).warnings
    assert warnings == ("without effect for method full_rank with adamw: --my_setting",)
    with pytest.raises(cli.ConfigError, match="does not declare that it can be divided"):
        cli.load([*command(), "--method", "mine", "--distributed_type", "fsdp"], environ={})


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("import nothing_of_this_name", "ModuleNotFoundError"),
        ("SPEC = 3", "must be a MethodSpec"),
        (SPEC.format(setting="own", help="", name="other"), "calls itself 'other'"),
        (SPEC.format(setting="rank", help="another meaning", name="bad"), "rank means something else"),
        (SPEC.format(setting="momentum", help="another meaning", name="bad"), "momentum means something else"),
        (
            SPEC.format(setting="own", help="", name="bad").replace("settings=", 'update_rules=("mine",), settings='),
            "there is no update rule mine",
        ),
    ],
)
def test_a_plugin_that_does_not_work_is_left_out(with_plugins, text, why):
    with pytest.warns(UserWarning, match=why):
        assert "bad" not in with_plugins(bad=text)
    assert "galore" in METHODS


def test_a_plugins_setting_cannot_be_one_of_every_run(with_plugins, command):
    with_plugins(mine=SPEC.format(setting="seed", help="another meaning", name="mine"))
    with pytest.raises(cli.ConfigError, match=r"--seed has two meanings: .* of run and checkpoints, and of mine"):
        cli.load(command(), environ={})


@pytest.mark.parametrize(
    ("setting", "value", "why"),
    [("per_layer", "True", "move in the backward pass"), ("quantize", "8bit", "may be quantised")],
)
def test_what_a_plugin_does_not_declare_is_refused(with_plugins, command, setting, value, why):
    own = next(flag for flag in config_flags() if flag.name == setting)
    text = SPEC.format(setting=setting, help=own.help, name="mine")
    kind = "boolean" if setting == "per_layer" else "string"
    with_plugins(mine=text.replace("int = setting(3, positive_int", f"object = setting(None, {kind}"))
    with pytest.raises(cli.ConfigError, match=why):
        cli.load([*command(), "--method", "mine", f"--{setting}", value], environ={})


WHOLE = [spec.name for spec in METHODS.values() if spec.family.startswith(("whole gradients", "matrices by"))]


@pytest.mark.parametrize("name", WHOLE)
@pytest.mark.parametrize(
    ("setting", "value", "instead"), [("reduce_low_rank", "True", "False"), ("projected_backward", "on", "off")]
)
def test_less_than_whole_gradients_is_refused_where_they_are_needed(command, name, setting, value, instead):
    assert len(WHOLE) == 15
    with pytest.raises(ConfigError) as error:
        cli.load([*command(method=name), f"--{setting}", value], environ={})
    (line,) = error.value.problems
    assert line.startswith(f"--{setting} {value}: every update of {name} needs the whole gradient of every matrix")
    cli.load([*command(method=name), f"--{setting}", instead], environ={})


def test_a_plugin_cannot_take_the_place_of_a_method(with_plugins):
    with pytest.warns(UserWarning, match="there is a method of this name"):
        assert with_plugins(galore=SPEC.format(setting="own", help="", name="galore"))["galore"].title == "GaLore"


def test_a_module_must_have_one_class(with_plugins, tmp_path):
    with_plugins(mine=SPEC.format(setting="own", help="", name="mine"))
    (tmp_path / "plugin_mine" / "method.py").write_text("from peft_pretraining.methods.base import TrainingMethod\n")
    with pytest.raises(ConfigError, match="must define one public subclass of TrainingMethod, has none"):
        load_method("mine")


def test_what_is_wrong_with_a_method_is_one_line(with_plugins, tmp_path, command, capsys):
    """And no traceback: of a class that is missing, of two, and of what `method.py` itself fails to import."""
    with_plugins(mine=SPEC.format(setting="own", help="", name="mine"))
    argv = [*command(), "--method", "mine", "--num_training_steps", "1", "--warmup_steps", "0"]
    assert helpers.run(argv) == 2
    assert (
        capsys.readouterr()
        .err.splitlines()[-1]
        .endswith("--method mine: there is no plugin_mine.method, which has the class")
    )
    two = "from peft_pretraining.methods.base import TrainingMethod\nclass A(TrainingMethod): ...\nclass B(A): ...\n"
    (tmp_path / "plugin_mine" / "method.py").write_text(two)
    importlib.invalidate_caches()
    assert helpers.run(argv) == 2
    assert capsys.readouterr().err.splitlines()[-1].endswith("has A, B")
    sys.modules.pop("plugin_mine.method")
    (tmp_path / "plugin_mine" / "method.py").write_text("import nothing_of_this_name\n")
    with pytest.raises(ModuleNotFoundError, match="nothing_of_this_name"):
        load_method("mine")


def test_a_folder_and_its_spec_have_one_name(monkeypatch):
    galore = METHODS["galore"]
    monkeypatch.setattr(registry, "_spec_of", lambda module: galore)
    with pytest.raises(ConfigError, match=r"methods/\w+/settings.py: its SPEC calls itself 'galore'"):
        list(registry._Methods())


def test_specs_are_read_without_torch():
    code = "import sys; from peft_pretraining.methods import METHODS; list(METHODS); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], cwd=PACKAGE.parent, check=True)


def test_a_setting_that_a_method_has_not_cannot_be_replaced():
    with pytest.raises(ValueError, match="full_rank has no setting rank"):
        Config().replace(rank=4)
    assert Config().replace(rank=4, method="galore").method.rank == 4


def test_only_what_is_allowed_is_allowed():
    @dataclasses.dataclass(frozen=True)
    class Settings(MethodSettings):
        own: str = setting("", string, "a setting")

    spec = MethodSpec(name="new", title="New", summary="says nothing", settings=Settings)
    assert not any(dataclasses.asdict(spec.allows).values())
