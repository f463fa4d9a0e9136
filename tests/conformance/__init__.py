"""What every training method must do, whoever wrote it: a method that is registered is tested here by existing.

    bash scripts/test.sh tests/conformance --method NAME                 # one method, every update rule that it has
    bash scripts/test.sh tests/conformance --method NAME -m "not slow"   # in the first of them alone

The fast tier of the whole suite has one method of each kind (`Case.is_representative`), in the first of its rules.

Nothing here knows a method by name: what is run follows from its spec (`update_rules`, `allows`, `state`), with the
settings in its `tiny`.
"""
