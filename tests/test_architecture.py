"""Imports between the package's folders go one way, and only where a folder's `__init__` says so."""

import ast
import re

import pytest

from scripts import architecture

PACKAGE = architecture.PROJECT / "peft_pretraining"
LOOSE = {"__init__.py", "GoLore.py", "commands.py", "export.py", "generate.py", "rng.py", "train.py"}
FOLDERS = sorted(path.parent.name for path in PACKAGE.glob("*/__init__.py"))
OF_OPTIM = sorted(path.parent.name for path in PACKAGE.glob("optim/*/__init__.py"))


@pytest.fixture(scope="module")
def arrows():
    return architecture.arrows()


@pytest.mark.parametrize("folder", FOLDERS)
def test_a_folder_imports_what_it_says(folder, arrows):
    """No more, and nothing that it no longer needs."""
    docstring = ast.get_docstring(ast.parse((PACKAGE / folder / "__init__.py").read_text()))
    said = re.search(r"Imports of the package: ([^.]*)\.", docstring).group(1)
    imported = {below for above, below in arrows if above == folder}
    assert set(re.findall(r"`(\w+)`", said)) == imported
    assert imported or said == "nothing"


def test_there_are_no_circles(arrows):
    _, circles = architecture.layers(list(arrows))
    assert circles == []


def subfolder_of(module):
    """`optim.rules` of a module in that folder; the folder itself of one that lies loose in it."""
    below = module.split(".")[1:]
    return ".".join(below[: 2 if PACKAGE.joinpath(*below[:2]).is_dir() else 1]) or module


@pytest.fixture(scope="module")
def subfolder_arrows():
    return architecture.arrows(subfolder_of)


def test_there_are_no_circles_of_subfolders(subfolder_arrows):
    _, circles = architecture.layers(list(subfolder_arrows))
    assert circles == []


@pytest.mark.parametrize("folder", OF_OPTIM)
def test_a_folder_of_optim_imports_what_it_says(folder, subfolder_arrows):
    """The optimizers that are put together from the parts are not among them."""
    docstring = ast.get_docstring(ast.parse((PACKAGE / "optim" / folder / "__init__.py").read_text()))
    said = re.search(r"Imports of `optim`: ([^.]*)\.", docstring).group(1)
    found = {below for above, below in subfolder_arrows if above == f"optim.{folder}" and below.startswith("optim")}
    assert found == {f"optim.{name}" for name in re.findall(r"`(\w+)`", said)}
    assert found or said == "nothing"


def test_no_module_lies_loose():
    assert {path.name for path in PACKAGE.glob("*.py")} <= LOOSE
