"""`training.loop` under its older name: the very module, so that what is replaced in one is replaced in the other."""

import sys

from peft_pretraining.training import loop

sys.modules[__name__] = loop
