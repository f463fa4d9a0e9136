"""The option tasks as a table: where the rows are on the hub, their columns, and the words around them.

Prompts are those of MeZO (Malladi et al. 2023, appendix "Prompts", https://arxiv.org/abs/2305.17333), which GoLore's
fine-tuning experiments use; WinoGrande's is scored as Trinh and Le (2018, https://arxiv.org/abs/1806.02847) do it: each
option fills the blank, and what follows the blank is scored.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from peft_pretraining.finetune.rows import show

Fields = Mapping[str, str]


@dataclass(frozen=True)
class Choice:
    """One option of an example, in words: `text` is scored after `prompt`."""

    prompt: str
    text: str
    content_free: str
    """What stands in for the prompt with `--sfc`."""


@dataclass(frozen=True)
class Example:
    choices: tuple[Choice, ...]
    """In the order of the labels."""
    label: int
    """Index of the right one."""
    row: int
    """0-based number of the row it was made from."""

    @property
    def demonstration(self) -> str:
        right = self.choices[self.label]
        return (right.prompt + right.text).strip()


def _text_of(label: Any) -> str:
    """What a label is looked up by: text is taken without the spaces around it."""
    return label.strip() if isinstance(label, str) else show(label)


def _as_they_are(fields: Fields) -> dict[str, str]:
    return dict(fields)


def _nothing_wrong(fields: Fields) -> str | None:
    return None


@dataclass(frozen=True)
class OptionTask:
    """One task. The texts name columns of the row, or what `prepare` adds to them, in braces."""

    name: str
    hub: tuple[str, str]
    """Dataset and configuration; rows for training and dev are its `train` split, for tests its `validation`."""
    columns: tuple[str, ...]
    """Columns that are read as text, besides the label's."""
    labels: Mapping[str, int]
    """What may stand in the label's column, as text -> index of the right option."""
    options: tuple[str, ...]
    """What is scored, by label."""
    prompts: tuple[str, ...]
    """What stands before each option; one for all of them, or one each."""
    content_free: tuple[str, ...] = ("",)
    """As `prompts`, without what the row says."""
    label_column: str = "label"
    prepare: Callable[[Fields], dict[str, str]] = _as_they_are
    problem: Callable[[Fields], str | None] = _nothing_wrong
    """What else is wrong with a row's texts."""
    own_options: tuple[str, ...] = ()
    """Columns that hold the options, where each row has its own."""
    metrics: tuple[str, ...] = ("accuracy",)
    """Names in `METRICS`; the first one chooses the best checkpoint."""

    def example(self, row: Mapping[str, Any], number: int) -> Example:
        """The example of a row that `row_problem` has passed."""
        fields = self.prepare({name: str(row[name]).strip() for name in self.columns})
        count = len(self.options)
        prompts, content_free = (
            texts * count if len(texts) == 1 else texts for texts in (self.prompts, self.content_free)
        )
        choices = zip(prompts, self.options, content_free, strict=True)
        return Example(
            tuple(Choice(*(text.format(**fields) for text in choice)) for choice in choices),
            self.labels[_text_of(row[self.label_column])],
            number,
        )

    def row_problem(self, row: Mapping[str, Any]) -> str | None:
        """Why no example can be made of a row; None if one can."""
        for name in (*self.columns, self.label_column):
            if name not in row:
                return f"no column {name!r} (there is {', '.join(row)[:200] or 'none'})"
        for name in self.columns:
            if name in self.own_options and (row[name] is None or not str(row[name]).strip()):
                return f"{name} is empty: a choice needs {len(self.options)} options"
            if not isinstance(row[name], str):
                return f"{name} is not text but {show(row[name])}"
        if not any(row[name].strip() for name in self.columns):
            return f"there is no text in {' or '.join(self.columns)}"
        label = row[self.label_column]
        if isinstance(label, float | list | dict) or label is None or _text_of(label) not in self.labels:
            return f"{self.label_column} {show(label)} is not in the label set {', '.join(self.labels)}"
        return self.problem({name: row[name] for name in self.columns})


def _labels(*names: str) -> dict[str, int]:
    """Labels by number, as on the hub, and by name, as in the files of the tasks' own pages."""
    return {str(index): index for index in range(len(names))} | {name: index for index, name in enumerate(names)}


def _no_blank(fields: Fields) -> str | None:
    return None if fields["sentence"].count("_") == 1 else "sentence must have one _, where the options go"


def _winogrande(fields: Fields) -> dict[str, str]:
    before, after = fields["sentence"].split("_")
    filled = {name: fields[name] for name in ("option1", "option2")}
    if after.strip():
        return {
            **{f"prompt{n}": before + filled[f"option{n}"] for n in (1, 2)},
            **{f"scored{n}": after for n in (1, 2)},
            **{f"free{n}": filled[f"option{n}"] for n in (1, 2)},
        }
    # Nothing follows that could tell the options apart: then they are scored themselves.
    return {
        **{f"prompt{n}": before for n in (1, 2)},
        **{f"scored{n}": filled[f"option{n}"] for n in (1, 2)},
        **{f"free{n}": "" for n in (1, 2)},
    }


def _no_relation(fields: Fields) -> str | None:
    return None if fields["question"] in ("cause", "effect") else "question must be cause or effect"


def _copa(fields: Fields) -> dict[str, str]:
    def continued(choice: str) -> str:
        first, *others = choice.split(" ")
        return " ".join([first if first == "I" else first.lower(), *others])

    return {
        "premise": fields["premise"].removesuffix("."),
        "conjunction": "so" if fields["question"] == "effect" else "because",
        "choice1": continued(fields["choice1"]),
        "choice2": continued(fields["choice2"]),
    }


def _boolq(fields: Fields) -> dict[str, str]:
    question = fields["question"]
    question = question[:1].upper() + question[1:]
    return {**fields, "question": question if question.endswith("?") else question + "?"}


def _wsc(fields: Fields) -> dict[str, str]:
    return {**fields, "span2_text": fields["span2_text"].lower()}


SUPER_GLUE = "aps/super_glue"  # without a loading script, which `datasets` no longer runs

_TABLE = (
    OptionTask(
        name="WinoGrande",
        hub=("allenai/winogrande", "winogrande_xl"),
        columns=("sentence", "option1", "option2"),
        label_column="answer",
        labels={"1": 0, "2": 1},
        own_options=("option1", "option2"),
        problem=_no_blank,
        prepare=_winogrande,
        prompts=("{prompt1}", "{prompt2}"),
        options=("{scored1}", "{scored2}"),
        content_free=("{free1}", "{free2}"),
    ),
    OptionTask(
        name="SST2",
        hub=("nyu-mll/glue", "sst2"),
        columns=("sentence",),
        labels=_labels("negative", "positive"),
        prompts=("{sentence} It was",),
        options=(" terrible", " great"),
        content_free=("It was",),
    ),
    OptionTask(
        name="RTE",
        hub=(SUPER_GLUE, "rte"),
        columns=("premise", "hypothesis"),
        labels=_labels("entailment", "not_entailment"),
        prompts=('{premise}\nDoes this mean that "{hypothesis}" is true? Yes or No?\n',),
        options=("Yes", "No"),
    ),
    OptionTask(
        name="CB",
        hub=(SUPER_GLUE, "cb"),
        columns=("premise", "hypothesis"),
        labels=_labels("entailment", "contradiction", "neutral"),
        prompts=('Suppose {premise} Can we infer that "{hypothesis}"? Yes, No, or Maybe?\n',),
        options=("Yes", "No", "Maybe"),
        metrics=("accuracy", "f1"),
    ),
    OptionTask(
        name="BoolQ",
        hub=(SUPER_GLUE, "boolq"),
        columns=("passage", "question"),
        labels=_labels("False", "True"),
        prepare=_boolq,
        prompts=("{passage} {question}",),
        options=(" No", " Yes"),
    ),
    OptionTask(
        name="WSC",
        hub=(SUPER_GLUE, "wsc.fixed"),
        columns=("text", "span1_text", "span2_text"),
        labels=_labels("False", "True"),
        prepare=_wsc,
        prompts=(
            '{text}\nIn the previous sentence, does the pronoun "{span2_text}" refer to {span1_text}? Yes or No?\n',
        ),
        options=("No", "Yes"),
    ),
    OptionTask(
        name="WIC",
        hub=(SUPER_GLUE, "wic"),
        columns=("word", "sentence1", "sentence2"),
        labels=_labels("False", "True"),
        prompts=(
            'Does the word "{word}" have the same meaning in these two sentences? Yes, No?\n{sentence1}\n{sentence2}\n',
        ),
        options=("No", "Yes"),
    ),
    OptionTask(
        name="MultiRC",
        hub=(SUPER_GLUE, "multirc"),
        columns=("paragraph", "question", "answer"),
        labels=_labels("False", "True"),
        prompts=('{paragraph}\nQuestion: {question}\nI found this answer "{answer}". Is that correct? Yes or No?\n',),
        options=("No", "Yes"),
        metrics=("accuracy", "f1"),
    ),
    OptionTask(
        name="Copa",
        hub=(SUPER_GLUE, "copa"),
        columns=("premise", "question", "choice1", "choice2"),
        labels={"0": 0, "1": 1},
        own_options=("choice1", "choice2"),
        problem=_no_relation,
        prepare=_copa,
        prompts=("{premise} {conjunction}",),
        options=(" {choice1}", " {choice2}"),
        content_free=("{conjunction}",),
    ),
)

TASKS: dict[str, OptionTask] = {task.name: task for task in _TABLE}


def find_task(name: str) -> OptionTask:
    """A task by its name, in any capitals. `ValueError` if there is none."""
    by_name = {task.name.lower(): task for task in _TABLE}
    if name.lower() not in by_name:
        raise ValueError(f"must be one of {', '.join(TASKS)}")
    return by_name[name.lower()]
