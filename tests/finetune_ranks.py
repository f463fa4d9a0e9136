"""Under torchrun: runs of `run_glue.py` in the same processes, one after the other; argument: a JSON list of flags."""

import json
import sys

from finetune_helpers import glue_flags

if __name__ == "__main__":
    from peft_pretraining.finetune import glue
    from peft_pretraining.finetune.entry import leave_process_group

    for flags in json.loads(open(sys.argv[1]).read()):
        glue.run(glue_flags(**flags))
    leave_process_group()
