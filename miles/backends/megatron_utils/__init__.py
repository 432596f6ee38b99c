"""Published import paths of what plug-ins use of the Megatron backend. Its modules import Megatron-Core."""
