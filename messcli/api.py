"""The names for notebooks and programs of your own: what the commands call, without a command line.

Importing this loads numpy and scipy; torch and models only when one is asked. See docs/api.md. (The names
stand here and not in `messcli` itself, where `simulate` and `record` are modules.)
"""

from messcli.calibration import CalibrateConfig, calibrate
from messcli.errors import MessError
from messcli.files.requests import InputFields
from messcli.jobs.config import Keeping, Promise, Reading, RouteConfig, Running, Writing
from messcli.jobs.record import record
from messcli.jobs.route import route
from messcli.jobs.summary import Summary
from messcli.metrics import Metric, load_metric
from messcli.records import Decision, Outcome, Request
from messcli.report import make_report
from messcli.routing.controller import Controller
from messcli.routing.setup import Setup, create_controller
from messcli.simulation import Result, SimulateConfig, simulate
from messcli.simulation.table import OutcomeTable, read_table
from messcli.zoo import ModelSpec, Zoo, load_zoo

__all__ = [
    "CalibrateConfig",
    "Controller",
    "Decision",
    "InputFields",
    "Keeping",
    "MessError",
    "Metric",
    "ModelSpec",
    "Outcome",
    "OutcomeTable",
    "Promise",
    "Reading",
    "Request",
    "Result",
    "RouteConfig",
    "Running",
    "Setup",
    "SimulateConfig",
    "Summary",
    "Writing",
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
