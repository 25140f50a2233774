"""The names for notebooks and programs of your own: what the commands call, without a command line.

Importing this loads numpy and scipy; torch and models only when one is asked. See docs/api.md. (The names
stand here and not in `messcli` itself, where `simulate` and `record` are modules.)
"""

from messcli.calibrate import CalibrateConfig, calibrate
from messcli.controller import Controller
from messcli.errors import MessError
from messcli.factory import Setup, create_controller
from messcli.inputs import InputFields
from messcli.metrics import Metric, load_metric
from messcli.record import record
from messcli.records import Decision, Outcome, Request
from messcli.report import make_report
from messcli.run import RouteConfig, route
from messcli.simulate import Result, SimulateConfig, simulate
from messcli.summary import Summary
from messcli.tables import OutcomeTable, read_table
from messcli.zoo import ModelSpec, Zoo, load_zoo

__all__ = [
    "CalibrateConfig",
    "Controller",
    "Decision",
    "InputFields",
    "MessError",
    "Metric",
    "ModelSpec",
    "Outcome",
    "OutcomeTable",
    "Request",
    "Result",
    "RouteConfig",
    "Setup",
    "SimulateConfig",
    "Summary",
    "Zoo",
    "calibrate",
    "create_controller",
    "load_metric",
    "load_zoo",
    "make_report",
    "read_table",
    "record",
    "route",
    "simulate",
]
