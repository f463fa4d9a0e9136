"""The model card of an export: what was trained, on what, how, and with which result."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCardData
from transformers import PreTrainedModel

from peft_pretraining.checkpoint import resume, run_dir
from peft_pretraining.checkpoint.metrics_file import read_records
from peft_pretraining.checkpoint.train_state import read_counters
from peft_pretraining.config import Config
from peft_pretraining.data.folder import read_arguments
from peft_pretraining.data.mixture import first_folder, sources_of
from peft_pretraining.flags.settings import shown_default
from peft_pretraining.methods import METHODS

FILE = "README.md"
UNKNOWN = "unknown"
"""The licence that nobody has named, as the hub calls it."""

_PROJECT, _C4, _PEFT_TAG = "peft_pretraining", "allenai/c4", "peft"
_NOT_SHOWN = frozenset({"save_dir", "resume_from", "warmed_up_model", "autoresume", "allow_restart", "profile"})
"""Settings that say where a run lay, not what it computed; those of tracking go as well."""
_PATHS = frozenset({"model_config", "model_name_or_path", "dataset_path", "base_dir", "tokenizer"})


@dataclass(frozen=True)
class About:
    """What the card says of a checkpoint."""

    config: Config
    licence: str
    update: int
    tokens: int
    versions: dict[str, str]
    data: dict[str, Any]
    """`args.json` of the blocks that were read, as far as they are still there."""
    evaluation: dict[str, Any]
    """The record of the last evaluation up to this checkpoint; empty where there is none."""
    began_from: str | None
    """The trained model or checkpoint that the run started with."""

    @classmethod
    def of(cls, checkpoint: Path, config: Config, model: PreTrainedModel, licence: str) -> About:
        """From the checkpoint, and from its run's folder around it where it still lies there."""
        counters = read_counters(checkpoint)
        update = int(counters.get("update_step", 0))
        try:
            data = read_arguments(first_folder(config.data.dataset_path)) if config.data.dataset_path else {}
        except (OSError, ValueError):
            data = {}
        return cls(
            config,
            licence,
            update,
            int(counters.get("tokens_seen", 0)),
            dict(counters.get("versions") or {}),
            data,
            _evaluation(checkpoint, update),
            config.model.model_name_or_path or config.run.warmed_up_model,
        )

    def text(self, model: PreTrainedModel, as_adapter: bool) -> str:
        """The whole file: metadata as the hub reads it, and the text."""
        return f"---\n{self._metadata(as_adapter).to_yaml()}\n---\n\n{self._body(model, as_adapter)}"

    def _metadata(self, as_adapter: bool) -> ModelCardData:
        perplexity, began = self.evaluation.get("final_eval_perplexity"), self.began_from
        result = EvalResult(
            task_type="text-generation",
            dataset_type=self._hub_dataset() or "custom",
            dataset_name=f"{self.dataset} (validation)",
            metric_type="perplexity",
            metric_value=perplexity,
        )
        known = perplexity is not None
        return ModelCardData(
            license=self.licence,
            library_name=_PEFT_TAG if as_adapter else "transformers",
            pipeline_tag="text-generation",
            base_model=began if began and not os.path.exists(began) else None,
            datasets=[hub] if (hub := self._hub_dataset()) else None,
            tags=[_PROJECT, "llama", self.config.method.method, *([_PEFT_TAG] if as_adapter else [])],
            model_name=self.name if known else None,
            eval_results=[result] if known else None,
        )

    @property
    def name(self) -> str:
        model = self.config.model
        shape = Path(model.model_config or model.model_name_or_path or "llama").stem
        return f"{shape}-{self.config.method.method}"

    @property
    def dataset(self) -> str:
        """The data's name, without the folders that lead to it."""
        data = self.config.data
        if len(sources := sources_of(data.dataset_path or "")) > 1:
            return ", ".join(f"{source.share:.0%} {source.name}" for source in sources)
        if self.data.get("dataset"):
            parts = (Path(str(self.data["dataset"])).name, self.data.get("dataset_config"))
            return " ".join(str(part) for part in parts if part)
        return Path(data.dataset_path or data.base_dir or "C4 (en)").name

    def _hub_dataset(self) -> str | None:
        """The dataset's name on the hub, if that is where it came from."""
        blocks, name = self.config.data.dataset_path, self.data.get("dataset")
        if name in ("c4", _C4) or not (blocks or self.config.data.base_dir):
            return _C4
        if not (blocks and isinstance(name, str)) or os.path.exists(name):
            return None
        # `pretokenize.py` puts what it made of a hub's dataset into a folder of the owner's name.
        owner, _, own = name.partition("/")
        folder = Path(blocks).absolute()
        return name if own and owner == folder.parent.name and folder.name.startswith(own) else None

    def _body(self, model: PreTrainedModel, as_adapter: bool) -> str:
        spec = METHODS[self.config.method.method]
        paper = f" ([arXiv {spec.paper}](https://arxiv.org/abs/{spec.paper}))" if spec.paper else ""
        number = sum(param.numel() for param in model.parameters())
        kind = "An adapter (A and B of every layer) over the model in `base/`" if as_adapter else "A LLaMA"
        began = f"`{Path(self.began_from).name}`" if self.began_from else "none: the weights started at random"
        lines = [
            f"# {self.name}",
            "",
            f"{kind}, {number / 1e6:,.2f}M parameters, pre-trained with {_PROJECT} by {spec.title}{paper}: "
            f"{spec.summary}.",
            "",
            "| | |",
            "|---|---|",
            f"| licence | {self.licence} |",
            f"| base model | {began} |",
            f"| method | `{spec.name}` |",
            *self._data_rows(),
            f"| trained | {self.update:,} updates, {self.tokens:,} tokens |",
            *self._metric_rows(),
            f"| weights | {str(model.dtype).removeprefix('torch.')} |",
            *([f"| made with | {self._made_with()} |"] if self.versions else []),
            "",
            "## Use",
            "",
            *_use(as_adapter),
            "",
            "The tokenizer adds nothing to a prompt. In training one end token followed each document; none began it.",
            "",
            "## Settings",
            "",
            "| setting | value |",
            "|---|---|",
            *(f"| `{name}` | {value} |" for name, value in self._settings()),
        ]
        return "\n".join(lines) + "\n"

    def _data_rows(self) -> list[str]:
        rows = [f"| data | {self.dataset} |"]
        if self.data.get("tokenizer"):
            rows.append(f"| tokenizer | {Path(str(self.data['tokenizer'])).name} |")
        for split in ("train", "validation"):
            if counts := self.data.get(split):
                rows.append(
                    f"| {split} | {counts.get('documents', 0):,} documents, {counts.get('tokens', 0):,} tokens |"
                )
        rows.append(f"| sequence length | {self.config.data.max_length} tokens |")
        return rows

    def _metric_rows(self) -> list[str]:
        loss, perplexity = (self.evaluation.get(f"final_eval_{name}") for name in ("loss", "perplexity"))
        if loss is None or perplexity is None:
            return ["| validation | was not evaluated |"]
        tokens, update = self.evaluation.get("final_eval_tokens"), self.evaluation["update_step"]
        over = f" over {tokens:,} tokens" if tokens else ""
        return [f"| validation | loss {loss:.4f}, perplexity {perplexity:.2f}{over}, at update {update:,} |"]

    def _made_with(self) -> str:
        return ", ".join(f"{name} {version}" for name, version in self.versions.items())

    def _settings(self) -> list[tuple[str, str]]:
        """Those that have a value, in the order of `--help`."""
        left_out = _NOT_SHOWN | set(vars(self.config.tracking))
        found = []
        for name, value in self.config.settings().items():
            if name in left_out or value is None or value == ():
                continue
            shown = Path(str(value)).name if name in _PATHS else shown_default(value)
            found.append((name, shown.replace("|", "\\|").replace("\n", " ")))
        return found


def _use(as_adapter: bool) -> list[str]:
    if not as_adapter:
        return [
            "```python",
            "from transformers import pipeline",
            "",
            'generate = pipeline("text-generation", model="PATH_OF_THIS_FOLDER")',
            'print(generate("Once upon a time", max_new_tokens=50)[0]["generated_text"])',
            "```",
        ]
    return [
        "```python",
        "from peft import PeftModel",
        "from transformers import AutoModelForCausalLM",
        "",
        'base = AutoModelForCausalLM.from_pretrained("PATH_OF_THIS_FOLDER/base")',
        'model = PeftModel.from_pretrained(base, "PATH_OF_THIS_FOLDER")',
        "```",
        "",
        "`adapter_config.json` names the base by its path at the time of the export: where this folder has moved, load "
        "the base first, as here.",
    ]


def _evaluation(checkpoint: Path, update: int) -> dict[str, Any]:
    """The run's last evaluation up to the checkpoint, if the `metrics.jsonl` around it is that of the same run."""
    folder = checkpoint.absolute().parent
    try:
        own, around = resume.record_of(read_counters(checkpoint)), resume.record_in_config(folder)
    except ValueError:
        return {}
    if around is None or (own is not None and own.id != around.id):
        return {}
    records, _ = read_records(folder / run_dir.METRICS_FILE)
    known = [record for record in records if "final_eval_loss" in record and record["update_step"] <= update]
    return known[-1] if known else {}
