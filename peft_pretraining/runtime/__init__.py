"""The process as its launcher and the operating system see it: signals, worker processes, a watchdog, launchers,
GPUs.

Imports of the package: `flags`. What an entry script needs before torch is free of it.
"""
