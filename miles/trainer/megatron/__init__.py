"""The Megatron backend. Importing anything of it first makes Megatron-Core fit for a machine without a GPU (`cpu`), and
silences what it says in every run (`noise`)."""

import warnings

from miles.trainer.megatron import cpu, noise

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of libraries that Megatron-Core would like to have
    cpu.install()
noise.quiet()
