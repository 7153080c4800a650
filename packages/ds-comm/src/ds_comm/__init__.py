"""What travels between ranks, in how many bytes and by which route."""

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

# public name -> module that defines it
_HOME: dict[str, str] = {
    "CodedCommunicator": "ds_comm.coded_communicator",
    "Delta": "ds_comm.delta",
    "ErrorFeedback": "ds_comm.loco",
    "ErrorRows": "ds_comm.error_feedback",
    "LambCoefficients": "ds_comm.onebit_lamb",
    "Fp8": "ds_comm.block_codecs",
    "Int4": "ds_comm.block_codecs",
    "Int8": "ds_comm.block_codecs",
    "LoCo": "ds_comm.loco",
    "NotFiniteError": "ds_comm.wire_rows",
    "OneBit": "ds_comm.onebit_codec",
    "MomentumWire": "ds_comm.signs_wire",
    "OnebitAdam": "ds_comm.onebit_adam",
    "OnebitLamb": "ds_comm.onebit_lamb",
    "VarianceTest": "ds_comm.freeze",
    "ZeroOneAdam": "ds_comm.zero_one_adam",
    "ZeroOneSchedule": "ds_comm.zero_one_adam",
    "bus_factor": "ds_comm.bandwidth",
    "CommLog": "ds_comm.log",
    "CommRow": "ds_comm.log_rows",
    "CommSummary": "ds_comm.log_rows",
    "QuantizedWeights": "ds_comm.quantized_weights",
    "TwoHop": "ds_comm.two_hop",
}

__all__ = ["__version__", *_HOME]


def __getattr__(name: str) -> Any:
    home = _HOME.get(name)
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(home), name)


def __dir__() -> list[str]:
    return sorted(__all__)
